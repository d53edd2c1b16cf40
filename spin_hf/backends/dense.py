"""Attention to all tokens, the same for every backend. `kernels` has the arithmetic, `storage` the pages.

    prompt    first tokens of a cache: causal, over the new keys and values
    held      all tokens held, with a mask: prefill on a filled cache, dense steps, masks from the caller

If the pages exceed the page frames, they are attended to in waves and the results are merged.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import kernels
from ..attention.methods.base import Estimate
from ..storage.page_store import PageStore
from .base import Call
from .zones import StepPlan


def attend_all(
    call: Call, key: Tensor, value: Tensor, mask: Tensor | None, store: PageStore, zones: StepPlan, out: Tensor
) -> None:
    """Attention to all tokens held, the new ones included.

    Args:
        key, value: [B, H, n, Dk] and [B, H, n, Dv], the new tokens. The queries are those of the last Q of them.
        mask: [B, 1 or heads, Q, tokens], bool or additive, in the order of positions; None for causal.
        out: [B, Q, heads, Dv]; written.
    """
    if mask is not None:
        result = attend_held(call, store.by_place(mask, call.query.shape[2]), store)
    elif store.sequences.start == 0:
        result = attend_prompt(call, key, value, zones)
    else:
        result = attend_held(call, zones.allowed_all(call.query.shape[3], key.device), store)
    out.copy_(result.flatten(1, 2).transpose(1, 2))


def attend_prompt(call: Call, key: Tensor, value: Tensor, plan: StepPlan) -> Tensor:
    """Causal attention over the first tokens of a cache, for the last Q of them.

    Args:
        key, value: [B, H, n, Dk] and [B, H, n, Dv], all tokens of the cache.
    Returns:
        [B, H, G, Q, Dv].
    """
    num_tokens, num_queries = key.shape[2], call.query.shape[3]
    if call.is_plain and plan.sequences.mask.valid is None and num_queries == num_tokens:
        return fused(call, key, value, None)
    allowed = plan.allowed_all(num_queries, key.device)
    if call.is_plain:
        return fused(call, key, value, allowed)
    return attend_in_waves(call, [(slice(0, num_tokens), key, value)], allowed.unsqueeze(1), page_size=1)


def attend_held(call: Call, mask: Tensor, store: PageStore) -> Tensor:
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
        return fused(call, keys[:, :, :length], values[:, :, :length], mask)
    unfilled = 0.0 if mask.dtype == torch.bool else float("-inf")
    mask = torch.nn.functional.pad(mask, (0, num_pages * store.page_size - length), value=unfilled)
    return attend_in_waves(
        call, waves, mask.unflatten(1, (num_heads, group) if mask.shape[1] > 1 else (1, 1)), store.page_size
    )


def fused(call: Call, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Plain attention [B, H, G, Q, Dv]; `mask` [B, 1 or heads, Q, tokens], or None for causal."""
    out = kernels.dense_attention(call.query.flatten(1, 2), keys, values, mask, call.scale)
    return out.view(*call.query.shape[:4], -1)


def attend_in_waves(
    call: Call, waves: Iterable[tuple[slice, Tensor, Tensor]], mask: Tensor, page_size: int, rest: Estimate | None = None,
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
        partials.append(kernels.attend(call.query, keys, values, tokens, call.scale, call.softcap))
        if call.weights is not None:
            call.weights.add_wave(call.query, keys, tokens, call.scale, call.softcap)
    if rest is not None:
        weight = rest.log_tokens[:, :, None, None]
        logit_correction = None if rest.logit_correction is None else rest.logit_correction.unsqueeze(3)
        partials.append(
            kernels.attend(call.query, rest.keys, rest.values, weight, call.scale, call.softcap, logit_correction)
        )
    out, lse = kernels.merge_attention(partials)
    if call.weights is not None:
        call.weights.close(lse, call.sinks, None if pages is None else _places(pages, page_size))
    return out if call.sinks is None else kernels.apply_attention_sinks(out, lse, call.sinks)


def _places(pages: Tensor, page_size: int) -> Tensor:
    """Indices of the tokens of pages [B, H, n] (-1 for none): [B, H, n * P], negative for none."""
    return (pages.unsqueeze(-1) * page_size + torch.arange(page_size, device=pages.device)).flatten(2)
