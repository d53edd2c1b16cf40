"""SeerAttention-R (arXiv 2506.08889): pages of 32 tokens, selected by small gates that were trained on the model's attention.

    k'(page)      = RoPE at the page's first token of  (max | min | mean of its keys before RoPE) x W_k        per KV head
    q'            = RoPE at the query's position of  (the group's queries before RoPE, concatenated) x W_q     per KV head
    score(page)   = softmax over candidates (k' . q' / sqrt(E))
    selected      = the best pages up to the budget; with a threshold only those that score above it

`python -m spin_hf.distill` trains the gates. The cache stores keys after RoPE, and positions are known, so RoPE is inverted
when pages are summarised. The original also scores the last block and always attends to it; here the recent window takes that
place. The original's softmax for the threshold is over all complete blocks; here it is over the candidates.
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
    """Gates by index among the paged layers, copied to devices on demand."""

    gates: Gates
    numbers: tuple[int, ...]
    _placed: dict[tuple[int, torch.device], LayerGate] = field(default_factory=dict)

    def layer(self, number: int, device: torch.device) -> LayerGate:
        """The gate of paged layer `number` on a device."""
        found = self._placed.get((number, device))
        if found is None:
            found = self._placed[number, device] = self.gates.on(self.numbers[number], device)
        return found

    @cached_property
    def rotate_alike(self) -> bool:
        """Whether all layers have the same rotation."""
        first, *others = (self.gates.layers[number] for number in self.numbers)
        return all(first.rotates_as(other) for other in others)

    def several(self, numbers: tuple[int, ...], device: torch.device) -> LayerGate:
        """One gate with the stacked key matrices of several layers, which must have the same rotation."""
        gates = [self.layer(number, device) for number in numbers]
        return gates[0] if len(gates) == 1 else replace(gates[0], key=torch.stack([gate.key for gate in gates]))

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundGates:
        return self  # immutable, except for the copies on devices


@dataclass(frozen=True)
class SeerAttention(PageMethod):
    """Selects pages by small gates that were trained on the model's own attention. A cache needs them: `gates=None` is refused.

    Args:
        gates: a folder or file that `python -m spin_hf.distill` wrote for this model. Its option `--convert` reads the authors'
            release (a pickle of `attn_gate` weights) and writes such a folder.
        page_size: tokens per page, 16, 32 or 64; the page size that the gates were trained for.
        threshold: select only pages with a score above it, in (0, 1), up to the budget. A budget that covers the context still
            selects all pages. None for no threshold.
    Raises:
        OptionTypeError, OptionError: a parameter is out of range. A cache without gates for its model raises OptionError.
    """

    name: ClassVar[str] = "seer"
    uses_positions: ClassVar[bool] = True
    layers_alike: ClassVar[bool] = False
    index_rounds: ClassVar[bool] = True
    has_tensors_by_head: ClassVar[bool] = True
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
        """Load the gates and check that they fit the model."""
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
        """Scores by the softmax of one gate query per KV head."""
        return KernelRecipe(Rating.LIKELIEST, projects_queries=True, threshold=self.threshold or 0.0)

    def project_queries(self, states: Tensor, positions: Tensor, layer: int) -> Tensor:
        """Gate queries, divided by sqrt(E)."""
        gate = self._gate(layer, states)
        return gate.scaled_queries(states, positions, 1.0 / math.sqrt(gate.query.shape[-1]))

    def projection_tensors(self, layer: int, device: torch.device) -> tuple[Tensor, ...]:
        """The gate of the layer."""
        return self._bound().layer(layer, device).tensors

    def saved_parameters(self) -> dict[str, Any]:
        """Without the path of the gates: a saved cache records their numbers."""
        return {name: value for name, value in super().saved_parameters().items() if name != "gates"}

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
        chunks = (tensor.chunk(len(groups)) for tensor in (pages.keys, pages.valid, pages.positions))
        gate_keys = [
            bound.several(group, device).of_pages(*chunk) for group, *chunk in zip(groups, *chunks, strict=True)
        ]
        return {"gate_key": torch.cat(gate_keys)}

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
        covers_all = query.budget_pages >= query.candidates.sum(1)
        high = scores.gather(2, pages.clamp(min=0)) > self.threshold
        return torch.where(high | covers_all[:, None, None], pages, -1)

    def _gate(self, layer: int, states: Tensor) -> LayerGate:
        """The gate of paged layer `layer`. Checks the shape of the query states, because its kernel reads by that shape."""
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
