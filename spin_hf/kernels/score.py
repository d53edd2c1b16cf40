"""New tokens to their pages, and scores of all candidate pages: the first launch of a layer.

    append_kernel   tokens -> home page, page frame if resident, summaries of complete pages     PageStore.append, index
    score_kernel    landmarks -> logits, and what the softmax over them needs                    ShadowKV.score

In a decode step both are one launch: the new token's page holds the query, so it is no candidate yet and the programs
do not meet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    FIRST,
    FRAMES,
    HOME,
    LANDMARK,
    LOGITS,
    MIN_COSINE,
    NUM_SELECTED,
    NUM_SLOTS,
    PAGE_CAPACITY,
    PAGE_SLOT,
    PAGE_SLOT_STRIDE,
    PLAN_FIELDS,
    POSITION,
    STOP,
    count_valid,
    page_rows,
    row_addresses,
    tokens_valid,
)


@triton.jit
def _append_page(
    step, layer, key, value, b, h, page, count, key_b, key_h, key_n, value_b, value_h, value_n,
    SUMMARY: tl.constexpr, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Write the tokens of one page, of `count` new ones behind POSITION, and its summaries if that completes it."""
    dtype: tl.constexpr = key.dtype.element_ty
    item: tl.constexpr = key.dtype.element_ty.primitive_bitwidth // 8
    start = tl.load(step + POSITION)
    tokens = page * PAGE + tl.arange(0, PAGE)
    new = (tokens >= start) & (tokens < start + count)
    column_k = tl.arange(0, BLOCK_K)
    column_v = tl.arange(0, BLOCK_V)
    inside_k = new[:, None] & (column_k < DK)[None, :]
    inside_v = new[:, None] & (column_v < DV)[None, :]
    source = tl.where(new, tokens - start, 0)
    keys = tl.load(key + b * key_b + h * key_h + source[:, None] * key_n + column_k[None, :], mask=inside_k, other=0.0)
    values = tl.load(
        value + b * value_b + h * value_h + source[:, None] * value_n + column_v[None, :], mask=inside_v, other=0.0
    )
    row = tl.sum(page_rows(step, b, h, page + tl.zeros([1], tl.int64), tl.full([1], 1, tl.int1), H, SEGMENT), 0)
    table = tl.load(layer + HOME).to(tl.pointer_type(tl.int64))
    home = tl.load(table + row // ROWS) + (row % ROWS) * (PAGE * (DK + DV) * item)
    place_k = tl.arange(0, PAGE)[:, None] * DK + column_k[None, :]
    place_v = PAGE * DK + tl.arange(0, PAGE)[:, None] * DV + column_v[None, :]
    pointer = tl.multiple_of(home.to(tl.pointer_type(dtype)), 16)
    tl.store(pointer + place_k, keys, mask=inside_k)
    tl.store(pointer + place_v, values, mask=inside_v)
    num_slots = tl.load(layer + NUM_SLOTS)
    if num_slots > 0:
        slots = tl.load(layer + PAGE_SLOT).to(tl.pointer_type(tl.int32))
        slot = tl.load(slots + (b * H + h) * tl.load(layer + PAGE_SLOT_STRIDE) + page)
        if slot >= 0:
            frame = tl.load(layer + FRAMES) + ((b * H + h) * num_slots + slot) * (PAGE * (DK + DV) * item)
            resident = tl.multiple_of(frame.to(tl.pointer_type(dtype)), 16)
            tl.store(resident + place_k, keys, mask=inside_k)
            tl.store(resident + place_v, values, mask=inside_v)
    if (page + 1) * PAGE <= start + count:
        old = (tokens < start)[:, None] & (column_k < DK)[None, :]
        everything = tl.load(pointer + place_k, mask=old, other=0.0).to(tl.float32) + keys.to(tl.float32)
        valid = tokens >= 0
        if PADDED:
            valid = tokens_valid(step, b, tokens, tokens >= 0)
        weight = valid.to(tl.float32)
        landmark = tl.sum(everything * weight[:, None], 0) / tl.maximum(tl.sum(weight, 0), 1.0)
        norm = tl.maximum(tl.sqrt(tl.sum(landmark * landmark, 0)), 1e-8)
        norms = tl.maximum(tl.sqrt(tl.sum(everything * everything, 1)), 1e-8)
        cosine = tl.sum(everything * landmark[None, :], 1) / (norms * norm)
        worst = tl.min(tl.where(valid, cosine, 1.0), 0)
        size: tl.constexpr = SUMMARY.primitive_bitwidth // 8
        table = tl.load(layer + LANDMARK).to(tl.pointer_type(tl.int64))
        address = tl.load(table + row // ROWS) + (row % ROWS) * (DK * size)
        tl.store(address.to(tl.pointer_type(SUMMARY)) + column_k, landmark.to(SUMMARY), mask=column_k < DK)
        table = tl.load(layer + MIN_COSINE).to(tl.pointer_type(tl.int64))
        address = tl.load(table + row // ROWS) + (row % ROWS) * size
        tl.store(address.to(tl.pointer_type(SUMMARY)), worst.to(SUMMARY))


@triton.jit
def append_kernel(
    step, layer, key, value, count, key_b, key_h, key_n, value_b, value_h, value_n,
    SUMMARY: tl.constexpr, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Program (page, b * H + h) appends what of `count` new tokens belongs to one page.

    Args:
        key, value: [B, H, count, D]; the last dimension is contiguous.
    """
    bh = tl.program_id(1)
    page = tl.load(step + POSITION) // PAGE + tl.program_id(0)
    _append_page(
        step, layer, key, value, (bh // H).to(tl.int64), (bh % H).to(tl.int64), page, count, key_b, key_h, key_n,
        value_b, value_h, value_n, SUMMARY, H, DK, DV, BLOCK_K, BLOCK_V, PAGE, SEGMENT, ROWS, PADDED,
    )  # fmt: skip


@triton.jit
def _score_pages(
    step, layer, query, stats, plan, bh, split, num_splits, query_b, query_h, scale,
    SUMMARY: tl.constexpr, H: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, DK: tl.constexpr,
    BLOCK_K: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    row = plan + b * PLAN_FIELDS
    first = tl.load(row + FIRST)
    stop = tl.load(row + STOP)
    group = tl.arange(0, BLOCK_G)
    column = tl.arange(0, BLOCK_K)
    most = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    if tl.load(row + NUM_SELECTED) < stop - first:
        queries = tl.load(
            query + b * query_b + (h * G + group)[:, None] * query_h + column[None, :],
            mask=(group < G)[:, None] & (column < DK)[None, :], other=0.0,
        ).to(SUMMARY)  # fmt: skip
        capacity = tl.load(step + PAGE_CAPACITY)
        logits = tl.load(step + LOGITS).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * G * capacity
        table = tl.load(layer + LANDMARK)
        share = tl.cdiv(tl.cdiv(stop - first, num_splits), TILE) * TILE
        begin = first + split * share
        for start in range(begin, tl.minimum(begin + share, stop), TILE):
            pages = start + tl.arange(0, TILE)
            inside = pages < stop
            if PADDED:
                before = count_valid(step, b, pages * PAGE, inside, PADDED)
                inside = inside & (count_valid(step, b, (pages + 1) * PAGE, inside, PADDED) > before)
            rows = page_rows(step, b, h, pages, inside, H, SEGMENT)
            address = row_addresses(table, rows, inside, ROWS, DK * (SUMMARY.primitive_bitwidth // 8))
            pointer = tl.multiple_of(address.to(tl.pointer_type(SUMMARY)), 16)
            landmarks = tl.load(
                pointer[:, None] + column[None, :], mask=inside[:, None] & (column < DK)[None, :], other=0.0
            )
            scores = tl.dot(queries, tl.trans(landmarks), input_precision="ieee") * scale
            scores = tl.where(inside[None, :], scores, float("-inf"))
            tl.store(
                logits + group[:, None] * capacity + pages[None, :], scores,
                mask=(group < G)[:, None] & (pages < stop)[None, :],
            )  # fmt: skip
            higher = tl.maximum(most, tl.max(scores, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(most - shift) + tl.sum(tl.exp(scores - shift[:, None]), 1)
            most = higher
    place = stats + ((bh * num_splits + split) * 2) * BLOCK_G + group
    tl.store(place, most)
    tl.store(place + BLOCK_G, total)


@triton.jit
def score_kernel(
    step, layer, query, key, value, stats, plan, num_splits, query_b, query_h, key_b, key_h, value_b, value_h, scale,
    APPEND: tl.constexpr, SUMMARY: tl.constexpr, H: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PAGE: tl.constexpr,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, split) scores its share of the candidates; split == num_splits appends the new token.

    Args:
        query: [B, H * G, 1, DK]; key, value: [B, H, 1, D]; the last dimension is contiguous.
        stats: float32 [B * H, num_splits, 2, BLOCK_G]: maximum and sum of exponentials of each share. Written.
    """
    bh = tl.program_id(0)
    split = tl.program_id(1)
    if split < num_splits:
        _score_pages(
            step, layer, query, stats, plan, bh, split, num_splits, query_b, query_h, scale,
            SUMMARY, H, G, BLOCK_G, DK, BLOCK_K, PAGE, SEGMENT, ROWS, PADDED, TILE,
        )  # fmt: skip
    elif APPEND:
        _append_page(
            step, layer, key, value, (bh // H).to(tl.int64), (bh % H).to(tl.int64), tl.load(step + POSITION) // PAGE,
            1, key_b, key_h, 0, value_b, value_h, 0, SUMMARY, H, DK, DV, BLOCK_K, BLOCK_V, PAGE, SEGMENT, ROWS, PADDED,
        )  # fmt: skip
