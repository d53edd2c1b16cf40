"""Attention weights (`output_attentions=True`), collected while the reference backend attends.

    wave of pages  ->  scores [B, H, G, Q, tokens read]     as in attention
    all waves      ->  exp(score - log of denominator)      the denominator includes sinks and estimates of unread pages
    by place       ->  [B, heads, Q, tokens held]           in the order of positions, zero for unread tokens

The denominator is the one of the output. In an exact step the weights of a query therefore sum to 1, or to less with attention
sinks. With estimates of unread pages (`Method.estimate`) they sum to 1 minus the probability of the estimates.

Collecting takes 4 bytes per head, query and token. Weights carry no gradient.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ..storage.page_store import PageStore

logger = logging.getLogger("spin_hf")

_warned: set[str] = set()


def warn_of_memory() -> None:
    """Log once that attention weights take much memory."""
    if "memory" not in _warned:
        _warned.add("memory")
        logger.warning(
            "output_attentions=True: SpinCache returns weights over all tokens held, for every layer, head and query, and "
            "attends by the slower reference path; with a long context that takes far more memory than the cache itself"
        )


class AttentionWeights:
    """Collects the weights of one attention call. Queries that attend one at a time are concatenated in order."""

    def __init__(self) -> None:
        self._scores: list[Tensor] = []
        self._rows: list[tuple[Tensor, Tensor | None]] = []

    def add_wave(self, query: Tensor, keys: Tensor, mask: Tensor, scale: float, softcap: float | None) -> None:
        """Add the scores of one wave of tokens. Arguments as for `kernels.attend`."""
        scores = (query.float().flatten(2, 3) @ keys.float().transpose(-1, -2)).unflatten(2, query.shape[2:4]) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        else:
            scores = (scores + mask).masked_fill(mask == float("-inf"), float("-inf"))
        self._scores.append(scores)

    def close(self, lse: Tensor, sinks: Tensor | None, places: Tensor | None) -> None:
        """Normalise the scores of these queries after their last wave.

        Args:
            lse: [B, H, G, Q], log of the denominator without attention sinks.
            sinks: [H * G], or None.
            places: [B, H, tokens read], int64, index of each among the tokens held, negative for none; None for 0, 1, 2, ...
        """
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.float().view(lse.shape[1], lse.shape[2], 1))
        denominator = lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1)
        self._rows.append((torch.exp(torch.cat(self._scores, -1) - denominator), places))
        self._scores = []

    def result(self, store: PageStore, dtype: torch.dtype) -> Tensor:
        """The weights [B, heads, Q, tokens held] in the order of positions. `store` holds the tokens."""
        length = store.sequences.length
        rows = [_by_place(weights, places, length) for weights, places in self._rows]
        weights = torch.cat(rows, 3).to(dtype)
        heads = weights.shape[2:4]
        if store.sequences.spans.num_pages:
            weights = store.in_order(weights.flatten(2, 3).transpose(2, 3)).transpose(2, 3).unflatten(2, heads)
        return weights.flatten(1, 2).contiguous()


def _by_place(weights: Tensor, places: Tensor | None, length: int) -> Tensor:
    """Scatter weights [B, H, G, Q, tokens read] to [B, H, G, Q, length]."""
    if places is None:
        return weights[..., :length]
    spread = weights.new_zeros((*weights.shape[:4], length + 1))
    places = torch.where((places < 0) | (places > length), length, places)
    index = places[:, :, None, None].expand_as(weights)
    return spread.scatter_add_(4, index, weights)[..., :length]
