"""Scores of all candidate pages, and what the softmax over them needs. The specification is `ShadowKV.score`.

Landmarks are by far the most that a step reads of a long context: here they are read once, at the speed of memory. One more
program of each (sequence, KV head) appends the step's token meanwhile: its page is no candidate yet.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .append import append_page
from .common import (
    FIRST,
    LANDMARK,
    LANDMARK_SCALE,
    LOGITS,
    NUM_SELECTED,
    PAGE_CAPACITY,
    PLAN_FIELDS,
    POSITION,
    STOP,
    candidates,
    page_rows,
    row_addresses,
)


@triton.jit
def _two_digits(queries, BLOCK_G: tl.constexpr, BLOCK_K: tl.constexpr):
    """Queries [BLOCK_G, BLOCK_K] as whole numbers of two digits of base 256, and the unit [BLOCK_G] of each query.

    So int8 landmarks are multiplied as they are, exactly. The digits [2 * BLOCK_G, BLOCK_K] stand one below the other: rows
    of a matrix instruction that would be empty.
    """
    unit = tl.maximum(tl.max(tl.abs(queries), 1), 1e-30) / 32512.0
    whole = (queries / unit[:, None] + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds
    high = tl.floor((whole + 128.0) / 256.0)
    first = (tl.arange(0, 2) == 0)[:, None, None]
    digits = tl.where(first, high[None, :, :], (whole - high * 256.0)[None, :, :])
    return tl.reshape(digits, (2 * BLOCK_G, BLOCK_K)).to(tl.int8), unit


@triton.jit
def score_kernel(
    step, layer, query, stats, plan, histogram, num_splits, query_b, query_h, scale,
    key, value, key_b, key_h, value_b, value_h,
    APPEND: tl.constexpr, DIGITS: tl.constexpr, SUMMARY: tl.constexpr, QUANTIZED: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, BLOCK_G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
    BINS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, split) scores its share of the candidates; program (b * H + h, num_splits) appends, if APPEND.

    Args:
        query: [B, H * G, 1, DK]; the last dimension is contiguous.
        stats: float32 [B * H, num_splits, 2, BLOCK_G]: maximum and sum of exponentials of each share. Written.
        histogram: int32 [B * H, BINS]: made zeros for `rate_kernel`.
        key, value: [B, H, 1, D], the new token, as for `append_page`; read where APPEND.
        DIGITS: whether int8 landmarks are multiplied as such, which devices before Ampere cannot do.
    """
    bh = tl.program_id(0)
    split = tl.program_id(1)
    if APPEND and split == num_splits:
        append_page(
            step, layer, key, value, 1, key_b, key_h, 0, value_b, value_h, 0, tl.load(step + POSITION) // PAGE, bh,
            SUMMARY, QUANTIZED, H, DK, DV, BLOCK_K, BLOCK_V, PAGE, SEGMENT, ROWS, PADDED,
        )  # fmt: skip
    else:
        if split == 0:
            tl.store(histogram + bh * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
        b = (bh // H).to(tl.int64)
        h = (bh % H).to(tl.int64)
        row = plan + b * PLAN_FIELDS
        capacity = tl.load(step + PAGE_CAPACITY)
        logits = tl.load(step + LOGITS).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * G * capacity
        table = tl.load(layer + LANDMARK)
        first = tl.load(row + FIRST)
        stop = tl.load(row + STOP)
        group = tl.arange(0, BLOCK_G)
        column = tl.arange(0, BLOCK_K)
        most = tl.full(
            [BLOCK_G, TILE], float("-inf"), tl.float32
        )  # by place in the tile: exchanged between threads at the end
        total = tl.zeros([BLOCK_G, TILE], tl.float32)
        if tl.load(row + NUM_SELECTED) < stop - first:
            queries = tl.load(
                query + b * query_b + (h * G + group)[:, None] * query_h + column[None, :],
                mask=(group < G)[:, None] & (column < DK)[None, :], other=0.0,
            )  # fmt: skip
            if DIGITS:
                digits, query_unit = _two_digits(queries.to(tl.float32), BLOCK_G, BLOCK_K)
            share = tl.cdiv(tl.cdiv(stop, num_splits), TILE) * TILE
            begin = split * share
            for start in range(begin, tl.minimum(begin + share, stop), TILE):
                pages = start + tl.arange(0, TILE)
                inside = candidates(step, b, pages, first, stop, PAGE, PADDED)
                rows = page_rows(step, b, h, pages, inside, H, SEGMENT)
                there = inside[:, None] & (column < DK)[None, :]
                if QUANTIZED:
                    address = row_addresses(table, rows, inside, ROWS, DK)
                    pointer = tl.multiple_of(address.to(tl.pointer_type(tl.int8)), 16)
                    landmarks = tl.load(pointer[:, None] + column[None, :], mask=there, other=0)
                    units = row_addresses(tl.load(layer + LANDMARK_SCALE), rows, inside, ROWS, 4)
                    unit = tl.load(units.to(tl.pointer_type(tl.float32)), mask=inside, other=0.0) * scale
                    if DIGITS:
                        products = tl.dot(digits, tl.trans(landmarks), out_dtype=tl.int32)
                        weight = tl.where(tl.arange(0, 2) == 0, 256, 1)[:, None, None]
                        whole = tl.sum(tl.reshape(products, (2, BLOCK_G, TILE)) * weight, 0)
                        scores = whole.to(tl.float32) * (query_unit[:, None] * unit[None, :])
                    else:
                        scores = tl.dot(queries, tl.trans(landmarks.to(queries.dtype))) * unit[None, :]
                else:
                    address = row_addresses(table, rows, inside, ROWS, DK * (SUMMARY.primitive_bitwidth // 8))
                    pointer = tl.multiple_of(address.to(tl.pointer_type(SUMMARY)), 16)
                    landmarks = tl.load(pointer[:, None] + column[None, :], mask=there, other=0.0)
                    scores = tl.dot(queries.to(SUMMARY), tl.trans(landmarks), input_precision="ieee") * scale
                scores = tl.where(inside[None, :], scores, float("-inf"))
                tl.store(
                    logits + group[:, None] * capacity + pages[None, :], scores,
                    mask=(group < G)[:, None] & (pages < stop)[None, :],
                )  # fmt: skip
                higher = tl.maximum(most, scores)
                shift = tl.where(higher == float("-inf"), 0.0, higher)
                total = total * tl.exp(most - shift) + tl.exp(scores - shift)
                most = higher
        highest = tl.max(most, 1)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        place = stats + ((bh * num_splits + split) * 2) * BLOCK_G + group
        tl.store(place, highest)
        tl.store(place + BLOCK_G, tl.sum(total * tl.exp(most - shift[:, None]), 1))
