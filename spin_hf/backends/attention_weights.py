"""Attention weights (`output_attentions=True`): what each query gave to each token, collected while the reference attends.

    wave of pages  ->  scores [B, H, G, Q, tokens read]            as attention computed them
    all waves      ->  exp(score - log of the denominator used)    the denominator has sinks and what stands for other pages
    by place       ->  [B, heads, Q, tokens held]                  in the order of positions, zero where nothing was read

The denominator is the one that the output was made with. So the rows of an exact step sum to 1 (to less with attention sinks),
and those of a step that lets estimates stand for pages (`Method.estimate`) to 1 less the share of the estimates.

Weights take 4 bytes for each head, query and token while they are collected. They carry no gradient.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..storage.page_store import PageStore

logger = logging.getLogger("spin_hf")

_warned: set[str] = set()


def warn_of_memory() -> None:
    if "memory" not in _warned:
        _warned.add("memory")
        logger.warning(
            "output_attentions=True: SpinCache returns weights over all tokens held, for every layer, head and query, and "
            "attends by the slower reference path; with a long context that takes far more memory than the cache itself"
        )


class AttentionWeights:
    """Collects the weights of one attention call. Queries that attend one after the other are added in their order."""

    def __init__(self) -> None:
        self._scores: list[Tensor] = []
        self._rows: list[tuple[Tensor, Tensor | None]] = []

    def add_wave(self, query: Tensor, keys: Tensor, mask: Tensor, scale: float, softcap: float | None) -> None:
        """Take the scores of tokens that are read together; arguments as for `kernels.attend`."""
        scores = (query.float().flatten(2, 3) @ keys.float().transpose(-1, -2)).unflatten(2, query.shape[2:4]) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        else:
            scores = (scores + mask).masked_fill(mask == float("-inf"), float("-inf"))
        self._scores.append(scores)

    def close(self, lse: Tensor, sinks: Tensor | None, places: Tensor | None) -> None:
        """All waves of these queries have come.

        Args:
            lse: [B, H, G, Q], the log of the denominator without attention sinks.
            sinks: [H * G], or None.
            places: [B, H, tokens read], int64, where each stands among the tokens held, negative for none; None if they stand
                in that order.
        """
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.float().view(lse.shape[1], lse.shape[2], 1))
        denominator = lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)
        self._rows.append((torch.exp(torch.cat(self._scores, -1) - denominator), places))
        self._scores = []

    def result(self, store: PageStore, dtype: torch.dtype) -> Tensor:
        """The weights [B, heads, Q, tokens held] in the order of positions, where `store` holds the tokens."""
        length = store.sequences.length
        rows = [_by_place(weights, places, length) for weights, places in self._rows]
        weights = torch.cat(rows, 3).to(dtype)
        heads = weights.shape[2:4]
        if store.sequences.spans.num_pages:
            weights = store.in_order(weights.flatten(2, 3).transpose(2, 3)).transpose(2, 3).unflatten(2, heads)
        return weights.flatten(1, 2).contiguous()


def _by_place(weights: Tensor, places: Tensor | None, length: int) -> Tensor:
    """Weights [B, H, G, Q, tokens read] as [B, H, G, Q, length]."""
    if places is None:
        return weights[..., :length]
    spread = weights.new_zeros((*weights.shape[:4], length + 1))
    places = torch.where((places < 0) | (places > length), length, places)
    index = places[:, :, None, None].expand_as(weights)
    return spread.scatter_add_(4, index, weights)[..., :length]
