"""The PyTorch backend: attention over one layer's pages. `kernels` has the arithmetic, `storage` the pages.

    prompt      first tokens of a cache: dense and causal, over the new keys and values
    masked      all tokens held, with a mask: prefill on a filled cache, dense steps, special masks
    selected    one query per sequence: sinks, recent window and selected pages

If the pages exceed the page frames, they are attended to in waves and the results are merged. The result does not depend on
the number of frames.
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
    """Queries and softmax parameters of one attention call.

    Attributes:
        query: [B, H, G, Q, Dk], query heads grouped by KV head.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(scores / softcap); None for no cap.
        sinks: [H * G], learned logits in the softmax's denominator; None for none.
        weights: collects attention weights; None if they are not returned.
    """

    query: Tensor
    scale: float
    softcap: float | None
    sinks: Tensor | None
    weights: AttentionWeights | None = None

    @property
    def is_plain(self) -> bool:
        """Whether torch's fused attention can compute it."""
        return self.softcap is None and self.sinks is None and self.weights is None

    def token(self, index: int) -> Call:
        """The call restricted to query token `index`."""
        return replace(self, query=self.query[:, :, :, index : index + 1])

    def fused(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Plain attention [B, H, G, Q, Dv]; `mask` [B, 1 or heads, Q, tokens], or None for causal."""
        out = kernels.dense_attention(self.query.flatten(1, 2), keys, values, mask, self.scale)
        return out.view(*self.query.shape[:4], -1)

    def in_waves(
        self, waves: Iterable[tuple[slice, Tensor, Tensor]], mask: Tensor, page_size: int, rest: Estimate | None = None,
        pages: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention over the waves of `PageStore.read`, and over the estimate of unread pages.

        Args:
            waves: (range of pages, keys, values) of each wave.
            mask: broadcastable to [B, H, G, Q, pages * P].
            rest: estimate of the unread pages; None for none.
            pages: [B, H, n], the pages that are read, -1 for none; None for 0, 1, 2, ...
        Returns:
            [B, H, G, Q, Dv].
        """
        partials = []
        for wave, keys, values in waves:
            tokens = mask[..., wave.start * page_size : wave.stop * page_size]
            partials.append(kernels.attend(self.query, keys, values, tokens, self.scale, self.softcap))
            if self.weights is not None:
                self.weights.add_wave(self.query, keys, tokens, self.scale, self.softcap)
        if rest is not None:
            weight = rest.log_tokens[:, :, None, None]
            logit_correction = None if rest.logit_correction is None else rest.logit_correction.unsqueeze(3)
            partials.append(
                kernels.attend(self.query, rest.keys, rest.values, weight, self.scale, self.softcap, logit_correction)
            )
        out, lse = kernels.merge_attention(partials)
        if self.weights is not None:
            self.weights.close(lse, self.sinks, None if pages is None else _places(pages, page_size))
        return out if self.sinks is None else kernels.apply_attention_sinks(out, lse, self.sinks)


def attend_prompt(call: Call, key: Tensor, value: Tensor, plan: StepPlan) -> Tensor:
    """Causal attention over the first tokens of a cache, for the last Q of them.

    Args:
        key, value: [B, H, n, Dk] and [B, H, n, Dv], all tokens of the cache.
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
        mask: [B, 1 or heads, 1 or Q, tokens], bool or additive; tokens in the order of the pages.
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
    """Pages that the single query of `call`, at `position`, attends to in a layer: [B, H, n], int64, -1 for none.

    The plan's fixed pages come first, then the selected ones.
    """
    query, fixed = _query(call, position, store, plan, layer)
    selected = method.select(query, partial(_summary, store, query))
    return torch.cat([fixed.unsqueeze(1).expand(-1, store.num_heads, -1), selected], 2)


def estimate_rest(
    call: Call, position: int, store: PageStore, plan: StepPlan, method: Method, layer: int, pages: Tensor
) -> Estimate | None:  # fmt: skip
    """The method's estimate of the pages that are not in `pages`, the result of `select_pages`; None if it makes none."""
    if type(method).estimate is Method.estimate:
        return None
    query, fixed = _query(call, position, store, plan, layer)
    return method.estimate(query, partial(_summary, store, query), pages[:, :, fixed.shape[1] :])


def _query(call: Call, position: int, store: PageStore, plan: StepPlan, layer: int) -> tuple[Query, Tensor]:
    """The method's input, and the fixed pages [B, F]."""
    zones = plan.query(position, call.query.device)
    query = Query(
        states=call.query.squeeze(3).float(), candidates=zones.candidates, budget_tokens=zones.budget_tokens,
        page_size=store.page_size, scale=call.scale, layer=layer, page_tokens=zones.page_tokens,
        positions=zones.positions,
    )  # fmt: skip
    return query, zones.fixed


def _summary(store: PageStore, query: Query, name: str, pages: Tensor | None = None) -> Tensor:
    summary = store.summary(name, pages)
    summary = summary[:, :, : query.candidates.shape[1]] if pages is None else summary
    return summary.float() if summary.is_floating_point() else summary


def attend_pages(
    call: Call, pages: Tensor, allowed: Tensor, store: PageStore, rest: Estimate | None = None
) -> Tensor:  # fmt: skip
    """Attention of one query per sequence: [B, H, G, 1, Dv].

    Args:
        pages: [B, H, n], -1 for none.
        allowed: [B, H, n * P], bool, which of their tokens are attended to.
        rest: estimate of the other pages; None for none.
    """
    return call.in_waves(store.read(pages), allowed[:, :, None, None], store.page_size, rest, pages)


def _places(pages: Tensor, page_size: int) -> Tensor:
    """Indices of the tokens of pages [B, H, n] (-1 for none): [B, H, n * P], negative for none."""
    return (pages.unsqueeze(-1) * page_size + torch.arange(page_size, device=pages.device)).flatten(2)
