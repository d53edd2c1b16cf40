"""Dense attention by an explicit choice of tokens, which the methods are compared with, and how much attention a choice keeps.

    best_tokens     the oracle: sinks, recent tokens and, for each KV head, those of the largest weight summed over its group
    recent_tokens   sinks and as many more recent tokens as make up the number, as in StreamingLLM (arXiv 2309.17453)
    Chosen          a context in which a model's decode steps attend to such a choice only, through a mask inside attention
    Mass            records, by layer and KV head, the share of the softmax of all tokens that falls on a choice, and what the
                    best tokens of the same number would keep

Nothing of it comes from spin_hf: a choice is a boolean mask over all keys of a `DynamicCache`, whose weights are all computed.
Layers with a sliding window are left as they are, as SpinCache leaves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SINKS, RECENT = 4, 64
"""Tokens that every method of the benchmarks attends to: the first and the last ones."""
NAME = "chosen_tokens"

Choose = Callable[[Tensor], Tensor]
"""From weights [H, tokens], summed over a group, to the tokens attended to [H, tokens], bool."""


def always(num_tokens: int, device: torch.device | None = None) -> Tensor:
    """Sinks and recent tokens: [tokens], bool."""
    mask = torch.zeros(num_tokens, dtype=torch.bool, device=device)
    mask[:SINKS], mask[max(0, num_tokens - RECENT) :] = True, True
    return mask


def best_tokens(weights: Tensor, kept: Tensor) -> Tensor:
    """Sinks, recent tokens and the heaviest others, `kept` [H] in all, or what is always kept if that is more: [H, tokens]."""
    fixed = always(weights.shape[1], weights.device)
    others = weights.masked_fill(fixed, -1.0)
    rank = others.argsort(1, descending=True).argsort(1)
    return fixed | (rank < (kept.unsqueeze(1) - int(fixed.sum())))


def recent_tokens(weights: Tensor, kept: int) -> Tensor:
    """The first tokens and the last ones, `kept` in all: [H, tokens]."""
    mask = torch.zeros_like(weights, dtype=torch.bool)
    mask[:, :SINKS], mask[:, max(0, weights.shape[1] - (kept - SINKS)) :] = True, True
    return mask


def chooser(name: str, kept: int) -> Choose:
    """`oracle` or `window`, of this many tokens."""
    if name == "oracle":
        return lambda weights: best_tokens(weights, torch.full((len(weights),), kept, device=weights.device))
    if name == "window":
        return lambda weights: recent_tokens(weights, kept)
    raise ValueError(f"expected oracle or window, got {name!r}")


class Mass:
    """Sums, by layer and KV head, of the attention that choices keep, and of what the best of the same number would.

    `add` takes a step of a layer; `kept` and `best` are means over steps, [layers, H].
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._steps: dict[int, int] = {}

    def add(self, layer: int, weights: Tensor, chosen: Tensor) -> None:
        """`weights` [H, tokens] sum to 1 for each head, `chosen` [H, tokens] is what is attended to."""
        best = best_tokens(weights, chosen.sum(1))
        pair = torch.stack([(weights * chosen).sum(1), (weights * best).sum(1)]).double()
        self._sums[layer] = self._sums.get(layer, torch.zeros_like(pair)) + pair
        self._steps[layer] = self._steps.get(layer, 0) + 1

    def _mean(self, which: int) -> Tensor:
        return torch.stack([self._sums[layer][which] / self._steps[layer] for layer in sorted(self._sums)])

    @property
    def layers(self) -> list[int]:
        """The layers that were seen."""
        return sorted(self._sums)

    @property
    def kept(self) -> Tensor:
        """What the choices kept: [layers, H]."""
        return self._mean(0)

    @property
    def best(self) -> Tensor:
        """What the best tokens of the same number would have kept: [layers, H]."""
        return self._mean(1)


class Chosen:
    """While it is the context, decode steps of `model` on a dense cache attend to what `choose` says.

    Args:
        model: any that calls transformers' attention interface; batch of 1, without padding.
        choose: see `Choose`.
        mass: where to record what is kept, at every `every`th length; None for nowhere.
    """

    _active: Chosen | None = None

    def __init__(self, model: Any, choose: Choose, mass: Mass | None = None, every: int = 1) -> None:
        self.model, self.choose, self.mass, self.every = model, choose, mass, every

    def __enter__(self) -> Chosen:
        assert Chosen._active is None, "one choice at a time"
        self._before = self.model.config._attn_implementation
        self.model.config._attn_implementation, Chosen._active = NAME, self
        return self

    def __exit__(self, *error: Any) -> None:
        self.model.config._attn_implementation, Chosen._active = self._before, None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attention of one query [1, heads, 1, D] over the chosen ones of `key` and `value` [1, H, tokens, D]."""
        grouped = query[0, :, 0].unflatten(0, (key.shape[1], -1)).float()  # [H, G, D]
        weights = (grouped @ key[0].float().transpose(-1, -2) * scale).softmax(-1)
        shares = weights.mean(1)
        chosen = self.choose(shares)
        if self.mass is not None and (key.shape[2] - 1) % self.every == 0:
            self.mass.add(layer, shares, chosen)
        weights = weights * chosen.unsqueeze(1)
        out = (weights / weights.sum(-1, keepdim=True)) @ value[0].float()
        return out.flatten(0, 1)[None, None].to(query.dtype)  # [1, 1, heads, D]


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The attention function registered as "chosen_tokens"."""
    active = Chosen._active
    if active is None or kwargs.get("sliding_window") is not None or query.shape[2] > 1:
        dense = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return dense(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if len(query) > 1 or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError(
            "chosen tokens: expected one sequence and plain attention, got a batch, a softcap or learned sinks"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return active.attend(module.layer_idx, query, key, value, scale), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
