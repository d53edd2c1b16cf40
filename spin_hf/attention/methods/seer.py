"""SeerAttention-R (arXiv 2506.08889): pages of 32 tokens, chosen by small gates that were trained on the model's own attention.

    k'(page)      = RoPE at the page's first token of  (max | min | mean of its keys before RoPE) x W_k      per KV head
    q'            = RoPE at the query's position of  (the group's queries before RoPE, side by side) x W_q   per KV head
    score(page)   = softmax over candidates (k' . q' / sqrt(E))
    choice        = the best pages up to the budget; with a threshold only those that score above it

`python -m spin_hf.distill` makes the gates. The cache holds keys after RoPE; as rotations are undone where positions are
known, nothing else needs to be kept. The original scores the last block too and always attends to it; here that is the recent
window. It takes the threshold's softmax over all complete blocks; here over those that are neither sinks nor recent.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import kernels
from ...config import require_one_of, require_real
from ...errors import OptionError, OptionTypeError
from ...kernels.descriptor_fields import Rating
from ...kernels.recipe import KernelRecipe
from .base import PageMethod, Pages, Query, Summaries
from .seer_gate_file import load_gates
from .seer_gates import REMEDY, Gates, LayerGate, check_heads

PAGE_SIZES = (16, 32, 64)


@dataclass(frozen=True, eq=False)
class BoundGates:
    """Gates by number among the paged layers, on the devices where they were asked for."""

    gates: Gates
    numbers: tuple[int, ...]
    _placed: dict[tuple[int, torch.device], LayerGate] = field(default_factory=dict)

    def layer(self, number: int, device: torch.device) -> LayerGate:
        """The gate of the paged layer `number` on a device."""
        found = self._placed.get((number, device))
        if found is None:
            found = self._placed[number, device] = self.gates.on(self.numbers[number], device)
        return found

    @cached_property
    def rotate_alike(self) -> bool:
        """Whether the rotations of all layers are the same."""
        first, *others = (self.gates.layers[number] for number in self.numbers)
        return all(first.rotates_as(other) for other in others)

    def several(self, numbers: tuple[int, ...], device: torch.device) -> LayerGate:
        """The keys' gates of layers that rotate alike as one."""
        gates = [self.layer(number, device) for number in numbers]
        return gates[0] if len(gates) == 1 else replace(gates[0], key=torch.stack([gate.key for gate in gates]))

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundGates:
        return self  # nothing in it changes


@dataclass(frozen=True)
class SeerAttention(PageMethod):
    """Pages by distilled gates.

    Args:
        gates: a folder or file that `python -m spin_hf.distill` wrote, for this very model. The authors' release (a pickle of
            `attn_gate` weights) is read by its option `--convert`, which writes such a folder.
        page_size: tokens of a page: 32, 64 or 16, as the gates were made for.
        threshold: choose only pages whose score is above it, a number in (0, 1), and at most the budget; a budget that covers
            the context still chooses everything. None for as many as the budget allows.
    Raises:
        OptionTypeError, OptionError: a parameter cannot work. A cache without gates for its model raises OptionError.
    """

    name: ClassVar[str] = "seer"
    uses_positions: ClassVar[bool] = True
    layers_alike: ClassVar[bool] = False
    index_rounds: ClassVar[bool] = True
    gates: str | os.PathLike[str] | None = None
    page_size: int = field(default=32, kw_only=True)  # type: ignore[misc]  # a parameter here, a constant of other methods
    threshold: float | None = field(default=None, kw_only=True)
    bound: BoundGates | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        gates = self.gates
        if gates is not None and not isinstance(gates, (str, os.PathLike)):
            raise OptionTypeError(
                f"gates: expected a path, got {type(gates).__name__}; pass the folder that distill wrote"
            )
        object.__setattr__(self, "page_size", require_one_of("page_size", self.page_size, PAGE_SIZES, example=32))
        if self.threshold is not None:
            threshold = require_real("threshold", self.threshold, 0.005)
            if not 0.0 < threshold < 1.0:
                raise OptionError(
                    f"threshold: expected a number in (0, 1) or None, got {threshold}; pass threshold=0.005"
                )
            object.__setattr__(self, "threshold", threshold)

    def bind(self, config: Any, layers: list[int]) -> SeerAttention:
        """Read the gates and check that they are for this model."""
        if self.gates is None:
            raise OptionError(
                f"SeerAttention: expected gates that were distilled from the model, got gates=None; {REMEDY}"
            )
        gates = load_gates(self.gates)
        gates.check(config, layers, self.page_size)
        bound = replace(self)
        object.__setattr__(bound, "bound", BoundGates(gates, tuple(layers)))
        return bound

    @property
    def recipe(self) -> KernelRecipe:
        """The share that the group's one gate query gives a page."""
        return KernelRecipe(Rating.LIKELIEST, projects_queries=True, threshold=self.threshold or 0.0)

    def project_queries(self, states: Tensor, positions: Tensor, layer: int) -> Tensor:
        """Gate queries, divided by the square root of their size."""
        gate = self._gate(layer, states)
        return gate.ask(states, positions, 1.0 / math.sqrt(gate.query.shape[-1]))

    def projection_tensors(self, layer: int, device: torch.device) -> tuple[Tensor, ...]:
        """The gate of the layer."""
        return self._bound().layer(layer, device).tensors

    def summary_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        """`gate_key` [E]."""
        return {"gate_key": (next(iter(self._bound().gates.layers.values())).key.shape[2],)}

    def index_pages(self, pages: Pages) -> Summaries:
        """Gate keys of the pages."""
        assert pages.positions is not None
        bound, device = self._bound(), pages.keys.device
        heads, _, head_dim = bound.layer(pages.layers[0], device).query.shape[:3]
        if (pages.keys.shape[1], pages.keys.shape[-1]) != (heads, head_dim):
            raise OptionError(
                f"gates: expected gates for {pages.keys.shape[1]} KV heads of {pages.keys.shape[-1]}, "
                f"got {heads} of {head_dim}; {REMEDY}"
            )
        groups = [pages.layers] if bound.rotate_alike else [(number,) for number in pages.layers]
        parts = (given.chunk(len(groups)) for given in (pages.keys, pages.valid, pages.positions))
        made = [bound.several(group, device).of_pages(*part) for group, *part in zip(groups, *parts, strict=True)]
        return {"gate_key": torch.cat(made)}

    def score(self, query: Query, summary: Callable[[str], Tensor]) -> Tensor:
        """Softmax over candidates of the products of gate queries and gate keys."""
        assert query.positions is not None
        gate = self._gate(query.layer, query.states)
        keys = summary("gate_key")
        projected = gate.of_queries(query.states, query.positions)
        logits = (keys @ projected.unsqueeze(-1)).squeeze(-1) / math.sqrt(keys.shape[-1])
        return torch.softmax(logits.masked_fill(~query.candidates.unsqueeze(1), float("-inf")), dim=-1).nan_to_num(0.0)

    def select(self, query: Query, summary: Callable[[str], Tensor]) -> Tensor:
        """The best candidates of every KV head up to the budget, above the threshold if there is one."""
        if self.threshold is None:
            return super().select(query, summary)
        scores = self.score(query, summary).masked_fill(~query.candidates.unsqueeze(1), float("-inf"))
        pages = kernels.select_top_pages(scores, query.budget_pages)
        whole = query.budget_pages >= query.candidates.sum(1)
        high = scores.gather(2, pages.clamp(min=0)) > self.threshold
        return torch.where(high | whole[:, None, None], pages, -1)

    def _gate(self, layer: int, states: Tensor) -> LayerGate:
        """The gate of the paged layer `layer`, which is for query states of this shape: its kernel reads by that."""
        bound = self._bound()
        gate = bound.layer(layer, states.device)
        check_heads(tuple(gate.query.shape[:3]), tuple(states.shape[1:4]), bound.numbers[layer])
        return gate

    def _bound(self) -> BoundGates:
        if self.bound is None:
            raise OptionError(
                "SeerAttention: expected a method bound to a model, got one by itself; pass it to a SpinCache"
            )
        return self.bound
