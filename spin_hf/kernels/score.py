"""Scores of all candidate pages, and what the softmax over them needs. The specification is `ShadowKV.score`."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    FIRST,
    LANDMARK,
    LOGITS,
    NUM_SELECTED,
    PAGE_CAPACITY,
    PLAN_FIELDS,
    STOP,
    candidates,
    page_rows,
    row_addresses,
)


@triton.jit
def score_kernel(
    step, layer, query, stats, plan, num_splits, query_b, query_h, scale,
    SUMMARY: tl.constexpr, H: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, DK: tl.constexpr,
    BLOCK_K: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, split) scores its share of the candidates.

    Args:
        query: [B, H * G, 1, DK]; the last dimension is contiguous.
        stats: float32 [B * H, num_splits, 2, BLOCK_G]: maximum and sum of exponentials of each share. Written.
    """
    bh = tl.program_id(0)
    split = tl.program_id(1)
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
    most = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    if tl.load(row + NUM_SELECTED) < stop - first:
        queries = tl.load(
            query + b * query_b + (h * G + group)[:, None] * query_h + column[None, :],
            mask=(group < G)[:, None] & (column < DK)[None, :], other=0.0,
        ).to(SUMMARY)  # fmt: skip
        share = tl.cdiv(tl.cdiv(stop - first, num_splits), TILE) * TILE
        begin = first + split * share
        for start in range(begin, tl.minimum(begin + share, stop), TILE):
            pages = start + tl.arange(0, TILE)
            inside = candidates(step, b, pages, stop, PAGE, PADDED)
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
