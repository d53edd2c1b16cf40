"""Attention to all tokens, the same for every backend: prompts, and masks from the caller.

    causal, any length    earlier tokens in pieces, without a mask (`storage/page_stream.py`)      fused attention of each,
                          new tokens among themselves, causal                                      merged by log-sum-exp
    causal, few queries   earlier and new tokens in one piece, if they fit, causal                 fused attention
    mask                  all pages, in waves that fit the page frames

No mask of queries by tokens is made for a causal forward, and no layer is read whole. Padding is left out before attention, one
sequence at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from .. import kernels
from ..attention.handed_states import take_over
from ..attention.methods.base import Estimate
from ..storage.page_store import PageStore
from ..storage.page_stream import TokenStream, gather_all
from .base import Call, put
from .zones import StepPlan

_FEW_QUERIES = 256
"""Queries of all sequences whose attention takes less time than the launches for several pieces. Prompts are read in chunks of
as many or more, so the memory of a chunk's other states is free."""

Partial = tuple[Tensor, Tensor]
"""Output [B, H, G, Q, Dv] and log-sum-exp [B, H, G, Q] of attention to some of the tokens."""


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
        put(attend_held(call, store.by_place(mask, call.query.shape[2]), store), out)
    elif call.weights is not None:
        put(_attend_for_weights(call, key, value, store, zones), out)
    elif (whole := _whole(call, store)) is not None:
        _put_merged([_partial(call, zones, 0, *whole, True)], call, out)
    else:
        attend_in_pieces(call, key, value, store, out, partial(_partial, call, zones))


def _whole(call: Call, store: PageStore) -> tuple[Tensor, Tensor] | None:
    """Keys and values of all tokens held, the new ones included, for few queries behind others; None if they are not one piece.

    Pages in host memory may be int8, and new tokens are attended to as they are.
    """
    if store.sequences.start and _reads_large_pieces(call, store):
        return gather_all(store, store.sequences.length)
    return None


def attend_in_pieces(
    call: Call, key: Tensor, value: Tensor, store: PageStore, out: Tensor,
    attend: Callable[[int, Tensor, Tensor, bool], Partial],
) -> None:  # fmt: skip
    """Attention to the new tokens and, piece by piece, to all earlier ones, merged.

    Args:
        key, value, out: as for `attend_all`.
        attend: attention of the queries to a piece, given the position of its first token, its keys and values, and whether
            they are the new tokens, so that causality matters.
    """
    start = store.sequences.start
    if not start:
        _put_merged([attend(start, key, value, True)], call, out)
        return
    # Its first load runs beside the attention of the new tokens.
    with TokenStream(store, start, _reads_large_pieces(call, store)) as earlier:
        partials = [attend(start, key, value, True)]
        for piece in earlier:
            partials.append(attend(*piece, False))
            del piece
            if len(partials) == kernels.MOST_PARTIALS:
                partials = [kernels.merge_attention(partials)]
    _put_merged(partials, call, out)


def _put_merged(partials: list[Partial], call: Call, out: Tensor) -> None:
    if len(partials) == 1 and call.sinks is None and take_over(out, partials[0][0].flatten(1, 2).transpose(1, 2)):
        return
    with torch.inference_mode(out.is_inference()):  # as in `put`
        kernels.merge_into(partials, call.sinks, out)


def _reads_large_pieces(call: Call, store: PageStore) -> bool:
    """Whether the queries are few, and attend to pieces as they are, without a copy or a matrix of scores."""
    few = len(call.query) * call.query.shape[3] <= _FEW_QUERIES
    plain = call.softcap is None and store.sequences.mask.valid is None
    return few and plain and kernels.reads_in_place(store.key_dim, store.value_dim, store.dtype)


def _partial(call: Call, zones: StepPlan, first: int, keys: Tensor, values: Tensor, causal: bool) -> Partial:
    """Attention to keys [B, H, M, Dk] and values from position `first` on, without the padding among them.

    Args:
        causal: whether the keys are new tokens, and the queries those of the last Q of them.
    """
    real = zones.real_tokens(first, first + keys.shape[2], keys.device)

    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Partial:
        return kernels.fused_attention(query, keys, values, call.scale, causal, call.softcap)

    query = call.query
    if real is None:
        return attend(query, keys, values)
    out = query.new_zeros((*query.shape[:4], values.shape[3]))
    lse = torch.full(query.shape[:4], float("-inf"), dtype=torch.float32, device=query.device)
    for row, tokens in enumerate(real):
        one = slice(row, row + 1)
        if tokens is None:
            out[one], lse[one] = attend(query[one], keys[one], values[one])
        elif len(tokens):
            states = query[one], keys[one].index_select(2, tokens), values[one].index_select(2, tokens)
            if not causal:
                out[one], lse[one] = attend(*states)
                continue
            queries = tokens - (keys.shape[2] - query.shape[3])
            queries = queries[queries >= 0]
            if len(queries):
                attended = attend(query[one].index_select(3, queries), *states[1:])
                out[one].index_copy_(3, queries, attended[0].to(out.dtype))
                lse[one].index_copy_(3, queries, attended[1])
    return out, lse


def _attend_for_weights(call: Call, key: Tensor, value: Tensor, store: PageStore, zones: StepPlan) -> Tensor:
    """As `attend_in_pieces`, and collects the attention weights of all tokens."""
    mask = zones.allowed_all(call.query.shape[3], key.device)
    if store.sequences.start:
        return attend_held(call, mask, store)
    return attend_in_waves(call, [(slice(0, key.shape[2]), key, value)], mask.unsqueeze(1), page_size=1)


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
        weight = (rest.log_tokens if rest.log_tokens.dim() == 4 else rest.log_tokens.unsqueeze(2)).unsqueeze(3)
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
