"""Attention over what a layer holds, in its three forms. The mathematics is in `kernels`, the pages in `storage`.

    prompt     the first tokens of a cache: dense and causal, on the states at hand
    masked     all tokens held, by a mask: prefill on a filled cache, dense steps, special masks
    selected   one query per sequence: sinks, recent window and what the method selects

Pages that do not fit the page frames at once are attended to in waves and merged, so that any amount of GPU memory that
holds one step's fixed pages gives the same result.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .. import kernels
from ..attention.methods.base import Estimate, Method, Query
from ..storage.page_store import PageStore
from .attention_weights import AttentionWeights
from .zones import StepPlan


@dataclass(frozen=True)
class Call:
    """The queries of one attention call and how their scores become weights.

    Attributes:
        query: [B, H, G, Q, Dk], query heads grouped by KV head.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(scores / softcap); None for as they are.
        sinks: [H * G], learned logits in the softmax's denominator; None for none.
        weights: collects the weights that are used; None where nobody asks for them.
    """

    query: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None
    weights: AttentionWeights | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch's fused attention computes it."""
        return self.softcap is None and self.sinks is None and self.weights is None

    def token(self, index: int) -> Call:
        """The call of one of the query tokens."""
        return replace(self, query=self.query[:, :, :, index : index + 1])

    def fused(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Plain attention [B, H, G, Q, Dv]; `mask` [B, 1 or heads, Q, tokens], or None for causal."""
        out = kernels.dense_attention(self.query.flatten(1, 2), keys, values, mask, self.scale)
        return out.view(*self.query.shape[:4], -1)

    def in_waves(
        self, waves: Iterable[tuple[slice, Tensor, Tensor]], mask: Tensor, page_size: int, rest: Estimate | None = None,
        pages: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention over `PageStore.read`'s waves, and over what stands for the rest.

        Args:
            mask: broadcastable to [B, H, G, Q, pages * P].
            pages: [B, H, n], those that are read, -1 for none; None for all in their order.
        """
        parts = []
        for wave, keys, values in waves:
            tokens = mask[..., wave.start * page_size : wave.stop * page_size]
            parts.append(kernels.attend(self.query, keys, values, tokens, self.scale, self.softcap))
            if self.weights is not None:
                self.weights.add_wave(self.query, keys, tokens, self.scale, self.softcap)
        if rest is not None:
            weight = rest.log_tokens[:, :, None, None]
            logit_correction = None if rest.logit_correction is None else rest.logit_correction.unsqueeze(3)
            parts.append(
                kernels.attend(self.query, rest.keys, rest.values, weight, self.scale, self.softcap, logit_correction)
            )
        out, lse = kernels.merge_attention(parts)
        if self.weights is not None:
            self.weights.close(lse, self.sinks, None if pages is None else _places(pages, page_size))
        return out if self.sinks is None else kernels.apply_attention_sinks(out, lse, self.sinks)


def attend_prompt(call: Call, key: Tensor, value: Tensor, plan: StepPlan) -> Tensor:
    """Causal attention of the last Q of the first tokens of a cache.

    Args:
        key, value: [B, H, n, Dk] and [B, H, n, Dv], all that the cache holds.
    Returns:
        [B, H, G, Q, Dv].
    """
    num_tokens, num_queries = key.shape[2], call.query.shape[3]
    if call.is_plain and plan.sequences.mask.valid is None and num_queries == num_tokens:
        return call.fused(key, value, None)
    allowed = plan.allowed_all(num_queries, key.device)
    if call.is_plain:
        return call.fused(key, value, allowed)
    return call.in_waves([(slice(0, num_tokens), key, value)], allowed.unsqueeze(1), page_size=1)


def attend_masked(call: Call, mask: Tensor, store: PageStore) -> Tensor:
    """Attention over all tokens held.

    Args:
        mask: [B, 1 or heads, 1 or Q, tokens], bool or additive; the tokens as they stand in the pages.
    Returns:
        [B, H, G, Q, Dv].
    """
    batch_size, num_heads, group = call.query.shape[:3]
    length, num_pages = store.sequences.length, store.sequences.num_pages
    waves = store.read(torch.arange(num_pages, device=mask.device).expand(batch_size, num_heads, -1))
    if call.is_plain and store.frames is None:
        _, keys, values = next(waves)
        mask = mask if mask.dtype == torch.bool else mask.to(call.query.dtype)
        return call.fused(keys[:, :, :length], values[:, :, :length], mask)
    unfilled = 0.0 if mask.dtype == torch.bool else float("-inf")
    mask = torch.nn.functional.pad(mask, (0, num_pages * store.page_size - length), value=unfilled)
    return call.in_waves(waves, mask.unflatten(1, (num_heads, group) if mask.shape[1] > 1 else (1, 1)), store.page_size)


def select_pages(
    call: Call, position: int, store: PageStore, plan: StepPlan, method: Method, layer: int
) -> Tensor:  # fmt: skip
    """The pages that the single query of `call`, at `position`, attends to in a layer: [B, H, n], int64, -1 for none.

    The plan's fixed pages come first, then what the method selects.
    """
    query, fixed = _query(call, position, store, plan, layer)
    selected = method.select(query, partial(_summary, store, query))
    return torch.cat([fixed.unsqueeze(1).expand(-1, store.num_heads, -1), selected], 2)


def estimate_rest(
    call: Call, position: int, store: PageStore, plan: StepPlan, method: Method, layer: int, pages: Tensor
) -> Estimate | None:  # fmt: skip
    """What stands for pages that are not among `pages`, as `select_pages` returned them, in the softmax of its query."""
    if type(method).estimate is Method.estimate:
        return None
    query, fixed = _query(call, position, store, plan, layer)
    return method.estimate(query, partial(_summary, store, query), pages[:, :, fixed.shape[1] :])


def _query(call: Call, position: int, store: PageStore, plan: StepPlan, layer: int) -> tuple[Query, Tensor]:
    """What a method is asked, and the pages [B, F] that are attended to anyway."""
    zones = plan.query(position, call.query.device)
    query = Query(
        states=call.query.squeeze(3).float(), candidates=zones.candidates, budget_tokens=zones.budget_tokens,
        page_size=store.page_size, scale=call.scale, layer=layer, page_tokens=zones.page_tokens,
        positions=zones.positions,
    )  # fmt: skip
    return query, zones.fixed


def _summary(store: PageStore, query: Query, name: str, pages: Tensor | None = None) -> Tensor:
    kept = store.summary(name, pages)
    kept = kept[:, :, : query.candidates.shape[1]] if pages is None else kept
    return kept.float() if kept.is_floating_point() else kept


def attend_pages(
    call: Call, pages: Tensor, allowed: Tensor, store: PageStore, rest: Estimate | None = None
) -> Tensor:  # fmt: skip
    """Attention of one query per sequence: [B, H, G, 1, Dv].

    Args:
        pages: [B, H, n]; allowed: [B, H, n * P], their tokens.
        rest: what stands for other pages.
    """
    return call.in_waves(store.read(pages), allowed[:, :, None, None], store.page_size, rest, pages)


def _places(pages: Tensor, page_size: int) -> Tensor:
    """Where the tokens of pages [B, H, n] (-1 for none) stand: [B, H, n * P], negative for none."""
    return (pages.unsqueeze(-1) * page_size + torch.arange(page_size, device=pages.device)).flatten(2)
