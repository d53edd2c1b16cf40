"""Attention of one query per sequence to all tokens, and the append of the step's token, in one launch per layer.

    program (b * H + h, split)    reads one split of the segments, whose pages lie one after the other in memory
                                  the one whose split has the last page appends the token first
                                  writes its split output; the last program of a (sequence, KV head) merges all splits

For steps that attend to everything anyway, while all pages are in the compute tier: there is no page list, and an address is
looked up once per tile. The specification is `reference.attend` and `reference.merge_attention`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    BACKING, DIRECTORY, DIRECTORY_STRIDE, POSITION, own_layer, own_step, tokens_valid, triton_dtype,
)  # fmt: skip
from ..launch import Launch, LaunchShape, LayerBuffers, StepBuffers, power_of_two
from .append_tokens import append_page
from .online_softmax import attend_tile, attended, tile_pages

_TILE_TOKENS = 64
"""Tokens per tile. Two tiles are in flight, as there is one program or two per multiprocessor."""


def attend_segments(
    launch: Launch, buffers: StepBuffers, layer: LayerBuffers, query: Tensor, out: Tensor, sinks: Tensor | None,
    new: tuple[Tensor, Tensor] | None, *, summarizes: bool, scale: float, softcap: float | None, shape: LaunchShape,
) -> None:  # fmt: skip
    """Append a step's token, and attend to all tokens with its query.

    Args:
        query: [B, H * G, 1, Dk]; the last dimension is contiguous.
        out: [B, H * G, Dv]. Written.
        sinks: [H * G], logits in the denominator; None for none.
        new: key and value [B, H, 1, D] of the token to append; None if it has been appended.
        summarizes: whether ShadowKV's summaries of a page that becomes complete are written too.
    """
    group, splits = query.shape[1] // shape.num_heads, buffers.splits.whole
    key, value = (query, query) if new is None else new
    launch(
        attend_segments_kernel, (buffers.num_streams, splits), buffers.step, layer.descriptor, query, out,
        query if sinks is None else sinks, key, value, buffers.split_outputs, buffers.arrivals, *query.stride()[:2],
        *out.stride()[:2], *key.stride()[:2], *value.stride()[:2], scale, softcap or 1.0, CAPPED=softcap is not None,
        SINKS=sinks is not None, NEW=new is not None, SUMMARISE=summarizes, QUANTIZED=shape.quantized[0],
        H=shape.num_heads, G=group, BLOCK_G=max(16, power_of_two(group)), DK=shape.key_dim, DV=shape.value_dim,
        BLOCK_K=shape.block_k, BLOCK_V=shape.block_v, PAGE=shape.page_size,
        TILE_PAGES=min(shape.segment_pages, tile_pages(shape), max(1, _TILE_TOKENS // shape.page_size)),
        SPLITS=splits, ALL_SPLITS=power_of_two(splits),
        HEADS=min(power_of_two(group), max(1, 512 // shape.block_v)),
        SEGMENT=shape.segment_pages, ROWS=shape.rows_per_chunk, PADDED=shape.padded,
        DTYPE=triton_dtype(shape.dtype), APART=shape.apart, num_warps=4, num_stages=2,
    )  # fmt: skip


@triton.jit
def attend_segments_kernel(
    step, layer, query, out, sinks, key, value, split_outputs, arrivals, query_b, query_h, out_b, out_h, key_b, key_h,
    value_b, value_h, scale, softcap,
    CAPPED: tl.constexpr, SINKS: tl.constexpr, NEW: tl.constexpr, SUMMARISE: tl.constexpr, QUANTIZED: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PAGE: tl.constexpr, TILE_PAGES: tl.constexpr, SPLITS: tl.constexpr, ALL_SPLITS: tl.constexpr,
    HEADS: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, split) attends to one split of the segments; see the module's head.

    Args:
        query: [B, H * G, 1, DK]; out: [B, H * G, DV], written; sinks: float [H * G], read if SINKS.
        key, value: [B, H, 1, D], the new token, if NEW, as for `append_page`.
        split_outputs: float32 [B * H, SPLITS, G, DV + 1], output and log-sum-exp of each split. Scratch.
        arrivals: int32 [B * H]: zeros, and zeros again afterwards.
        DTYPE: of the pages. ALL_SPLITS: SPLITS, rounded up to a power of two. HEADS: query heads that are merged at a time.
    """
    bh = tl.program_id(0)
    split = tl.program_id(1)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    step = own_step(step, b, APART)
    layer = own_layer(layer, b, APART)
    if APART and tl.load(step + POSITION) < 0:  # no sequence
        return
    position = tl.load(step + POSITION)
    tiles = tl.cdiv(position // PAGE + 1, TILE_PAGES)
    share = tl.cdiv(tiles, SPLITS)
    begin = split * share
    end = tl.minimum(begin + share, tiles)
    if NEW:  # noqa: SIM102  (known to the compiler)
        if (begin < tiles) & (end == tiles):
            append_page(
                step, layer, key, value, 1, key_b, key_h, 0, value_b, value_h, 0, position // PAGE, bh, DTYPE, QUANTIZED,
                H, DK, DV, BLOCK_K, BLOCK_V, PAGE, SEGMENT, ROWS, PADDED, 0, SUMMARISE,
            )  # fmt: skip
            tl.debug_barrier()  # the token is read below
    group = tl.arange(0, BLOCK_G)
    column_k = tl.arange(0, BLOCK_K)
    column_v = tl.arange(0, BLOCK_V)
    queries = tl.load(
        query + b * query_b + (h * G + group)[:, None] * query_h + column_k[None, :],
        mask=(group < G)[:, None] & (column_k < DK)[None, :], other=0.0,
    ).to(DTYPE)  # fmt: skip
    directory = tl.load(step + DIRECTORY).to(tl.pointer_type(tl.int32)) + b * tl.load(step + DIRECTORY_STRIDE)
    table = tl.load(layer + BACKING).to(tl.pointer_type(tl.int64))
    place = tl.arange(0, TILE_PAGES * PAGE)
    per_page: tl.constexpr = PAGE * (DK + DV)
    start = (place // PAGE) * per_page
    place_k = (start + place % PAGE * DK)[:, None] + column_k[None, :]
    place_v = (start + PAGE * DK + place % PAGE * DV)[:, None] + column_v[None, :]
    most = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    for tile in range(begin, end):
        page = tile * TILE_PAGES
        row = (tl.load(directory + page // SEGMENT).to(tl.int64) * H + h) * SEGMENT + page % SEGMENT
        base = tl.load(table + row // ROWS).to(tl.pointer_type(DTYPE)) + row % ROWS * per_page
        base = tl.multiple_of(base, 16)
        token = page * PAGE + place
        there = token <= position
        keys = tl.load(base + place_k, mask=there[:, None] & (column_k < DK)[None, :], other=0.0)
        values = tl.load(base + place_v, mask=there[:, None] & (column_v < DV)[None, :], other=0.0)
        if PADDED:
            there = tokens_valid(step, b, token, there)
            values = tl.where(there[:, None], values, 0.0)
        most, total, acc = attend_tile(queries, keys, values, there, most, total, acc, scale, softcap, CAPPED, DTYPE)
    acc, lse = attended(most, total, acc)
    width: tl.constexpr = DV + 1
    mine = split_outputs + ((bh * SPLITS + split) * G + group) * width
    tl.store(mine[:, None] + column_v[None, :], acc, mask=(group < G)[:, None] & (column_v < DV)[None, :])
    tl.store(mine + DV, lse, mask=group < G)
    tl.debug_barrier()  # the split output is complete before the arrival is counted
    if tl.atomic_add(arrivals + bh, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
        tl.store(arrivals + bh, 0)
        other = tl.arange(0, ALL_SPLITS)[:, None]
        there = other < tl.cdiv(tiles, share)  # later splits are empty
        for first in tl.static_range(0, G, HEADS):  # so many heads share the latency of their loads
            heads = first + tl.arange(0, HEADS)
            real = heads < G
            row = split_outputs + ((bh * SPLITS + other) * G + heads[None, :]) * width
            outs = tl.load(
                row[:, :, None] + column_v[None, None, :],
                mask=(there & real[None, :])[:, :, None] & (column_v < DV)[None, None, :], other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            lses = tl.load(row + DV, mask=there & real[None, :], other=float("-inf"), cache_modifier=".cg")
            top = tl.max(lses, 0)
            top = tl.where(top == float("-inf"), 0.0, top)
            weight = tl.exp(lses - top[None, :])
            denominator = tl.sum(weight, 0)
            if SINKS:
                logits = tl.load(sinks + h * G + heads, mask=real, other=float("-inf")).to(tl.float32)
                denominator += tl.exp(logits - top)
            merged = tl.sum(outs * weight[:, :, None], 0) / tl.where(denominator > 0, denominator, 1.0)[:, None]
            place_out = out + b * out_b + (h * G + heads)[:, None] * out_h + column_v[None, :]
            tl.store(place_out, merged.to(out.dtype.element_ty), mask=real[:, None] & (column_v < DV)[None, :])
