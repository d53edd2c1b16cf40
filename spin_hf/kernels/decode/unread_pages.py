"""The estimate of the pages that are not read: that of all candidates, less the pages that attention reads.

    merge_partials     partial estimates of the scan's splits -> one per KV head; called by `rate_kernel`
    subtract_pages     partial sums of the candidates that are read; called by some programs of `attend_kernel`
    write_unread       all candidates less those sums, out of the values' basis, as one more split output for the merge

All sums are relative to the same power of two, so that a difference needs no factor. The specification is
`reference_scan.subtract`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import (
    BASIS_VECTORS, FIRST, LOAD, LOGITS, NUM_SELECTED, PAGE_CAPACITY, PLAN_FIELDS, STOP, SUMMARY_3, SUMMARY_4, VALUE_BASIS,
    page_rows, row_addresses,
)  # fmt: skip
from .coded_fields import field_places, halves, value_fields, whole_sums

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LEAST_SHARE = tl.constexpr(2.0**-16)
"""Share of the candidates' weight below which the rest is taken for rounding."""


@triton.jit
def merge_partials(
    partials, estimate, num_splits, bh, G: tl.constexpr, BLOCK_G: tl.constexpr, SPLITS: tl.constexpr, DV: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Merge the partial estimates of one (sequence, KV head); see `ScanBuffers`.

    Args:
        SPLITS: num_splits, rounded up to a power of two.
    """
    group = tl.arange(0, BLOCK_G)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, BLOCK_V)
    width: tl.constexpr = DV + 2
    mine = partials + bh * num_splits * G * width
    known = (split < num_splits)[None, :] & (group < G)[:, None]
    place = mine + (split[None, :] * G + group[:, None]) * width + DV
    powers = tl.load(place, mask=known, other=float("-inf"))
    power = tl.max(powers, 1)
    base = tl.where(power == float("-inf"), 0.0, power)
    weight = tl.sum(tl.load(place + 1, mask=known, other=0.0) * tl.exp2(powers - base[:, None]), 1)
    total = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    for other in tl.range(0, num_splits, loop_unroll_factor=8):  # unrolled, so that the loads of several are in flight
        row = mine + (other * G + group)[:, None] * width + 0 * column[None, :]
        its_power = tl.load(row + DV, mask=(group < G)[:, None], other=float("-inf"))  # equal along a row
        values = tl.load(row + column[None, :], mask=(group < G)[:, None] & (column < DV)[None, :], other=0.0)
        total += values * tl.exp2(its_power - base[:, None])
    place = estimate + (bh * G + group) * width
    tl.store(place[:, None] + column[None, :], total, mask=(group < G)[:, None] & (column < DV)[None, :])
    tl.store(place + DV, power, mask=group < G)
    tl.store(place + DV + 1, weight, mask=group < G)


@triton.jit
def subtract_pages(
    step, layer, plan, estimate, subtracted, listed, count, share, num_shares, bh, b, h,
    H: tl.constexpr, G: tl.constexpr, COLUMNS: tl.constexpr, DV: tl.constexpr, VALUE_BYTES: tl.constexpr,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, VALUES: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Add up the candidates in one share of a page list, as `scan_kernel` does.

    Args:
        subtracted: float32 [B * H, num_shares, G, DV + 1]. Written.
        listed, count: the page list of one (sequence, KV head).
    """
    TILE: tl.constexpr = 64
    row = plan + b * PLAN_FIELDS
    first = tl.load(row + FIRST)
    stop = tl.load(row + STOP)
    scanned = tl.load(row + NUM_SELECTED) < stop - first
    capacity = tl.load(step + PAGE_CAPACITY)
    logits = tl.load(step + LOGITS).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * G * capacity
    code_table = tl.load(layer + SUMMARY_3)
    scale_table = tl.load(layer + SUMMARY_4)
    group = tl.arange(0, COLUMNS)
    byte = tl.arange(0, VALUE_BYTES)
    lane = tl.arange(0, TILE)
    number, known = field_places(VALUE_BYTES, DV)
    aligned: tl.constexpr = 16 if DV % 64 == 0 else 8 if DV % 32 == 0 else 4
    power = tl.load(estimate + (bh * G + group) * (DV + 2) + DV, mask=group < G, other=0.0)
    power = tl.where(power == float("-inf"), 0.0, power)
    taken = tl.zeros([4 * VALUE_BYTES, 2 * COLUMNS], tl.float32)
    weight = tl.zeros([TILE, COLUMNS], tl.float32)
    if scanned:
        for start in range(share * TILE, count, num_shares * TILE):
            pages = tl.load(listed + start + lane, mask=start + lane < count, other=-1)
            pages = tl.where(pages >= LOAD, pages - LOAD, pages)
            inside = (pages >= first) & (pages < stop)
            weighed = inside[:, None] & (group < G)[None, :]
            logs = tl.load(logits + group[None, :] * capacity + pages[:, None], mask=weighed, other=float("-inf"))
            rows = page_rows(step, b, h, pages, inside, H, SEGMENT)
            codes = row_addresses(code_table, rows, inside, ROWS, DV // 4)
            scales = row_addresses(scale_table, rows, inside, ROWS, 2)
            code = tl.load(
                tl.multiple_of(codes.to(tl.pointer_type(tl.int8)), aligned)[:, None] + byte[None, :],
                mask=inside[:, None] & (byte < DV // 4)[None, :], other=0,
            )  # fmt: skip
            scale = tl.load(scales.to(tl.pointer_type(tl.bfloat16)), mask=inside, other=0.0).to(tl.float32)
            each = tl.where(weighed, tl.exp2(logs * LOG2_E - power[None, :]), 0.0)
            parts = value_fields(code, scale, VALUES, COMPILED)
            taken = tl.dot(tl.trans(parts), halves(each, VALUES), acc=taken, input_precision="ieee")
            weight += each
    place = subtracted + ((bh * num_shares + share) * G + group) * (DV + 1)
    tl.store(place[None, :] + number[:, None], whole_sums(taken), mask=known[:, None] & (group < G)[None, :])
    tl.store(place + DV, tl.sum(weight, 0), mask=group < G)


@triton.jit
def write_unread(
    layer, estimate, subtracted, bh, out, DTYPE: tl.constexpr, VALUES: tl.constexpr, SPLITS: tl.constexpr,
    G: tl.constexpr, MERGED_G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the estimate of unread candidates as a split output; its lse is -infinity if there are none.

    Args:
        subtracted: float32 [B * H, SPLITS, G, DV + 1], written by `subtract_pages`. The first of them is overwritten.
        out: float32 [2, G, DV], output and log-sum-exp. Written.
    """
    TILE: tl.constexpr = 32
    heads = tl.arange(0, MERGED_G)[:, None]
    column = tl.arange(0, BLOCK_V)[None, :]
    there = (heads < G) & (column < DV)
    fine = column < DV // 4
    coded = there & (column < 3 * (DV // 4))
    number = tl.where(fine, 2 * column, column + DV // 4)  # as `reference_scan.levels`
    row = estimate + (bh * G + heads) * (DV + 2) + 0 * column
    power = tl.load(row + DV, mask=heads < G, other=float("-inf"))
    whole = tl.load(row + DV + 1, mask=heads < G, other=0.0)
    one = tl.load(row + number, mask=coded, other=0.0)
    two = tl.load(row + number + 1, mask=coded & fine, other=0.0)
    weight = whole
    parts = subtracted + (bh * SPLITS * G + heads) * (DV + 1) + 0 * column
    for split in tl.range(0, SPLITS, loop_unroll_factor=8):
        part = parts + split * G * (DV + 1)
        weight -= tl.load(part + DV, mask=heads < G, other=0.0, cache_modifier=".cg")
        one -= tl.load(part + number, mask=coded, other=0.0, cache_modifier=".cg")
        two -= tl.load(part + number + 1, mask=coded & fine, other=0.0, cache_modifier=".cg")
    left = (weight > whole * LEAST_SHARE) & (power > float("-inf"))
    weight = tl.where(left, weight, 1.0)
    vectors = (
        tl.load(layer + BASIS_VECTORS).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * (2 * DK + 2 * DV) + 2 * DK
    )
    width = tl.load(vectors + DV + column, mask=column < DV, other=0.0)
    coordinates = tl.where(left, (one + 4.0 * two) * width / weight, 0.0)
    lse = tl.where(left, (power + tl.log2(weight)) * LN_2, float("-inf"))
    tl.store(out + G * DV + heads * DV + column, lse, mask=there)
    tl.debug_barrier()  # all threads have read what is overwritten
    mine = subtracted + bh * SPLITS * G * (DV + 1)
    tl.store(mine + heads * DV + column, coordinates, mask=there)
    tl.debug_barrier()
    column = tl.arange(0, BLOCK_V)
    axes = tl.multiple_of(tl.load(layer + VALUE_BASIS).to(tl.pointer_type(DTYPE)) + bh.to(tl.int64) * DV * DV, 16)
    for start in tl.static_range(0, DV, TILE):
        into = start + tl.arange(0, TILE)
        part = tl.load(
            axes + into[:, None] * DV + column[None, :], mask=(into < DV)[:, None] & (column < DV)[None, :], other=0.0
        )
        origin = tl.load(vectors + into, mask=into < DV, other=0.0)
        if tl.float32 == VALUES:  # as in `project_queries`
            for head in range(G):
                state = tl.load(mine + head * DV + column, mask=column < DV, other=0.0, cache_modifier=".cg")
                tl.store(
                    out + head * DV + into, tl.sum(part.to(tl.float32) * state[None, :], 1) + origin, mask=into < DV
                )
        else:
            for group in tl.static_range(0, G, 16):
                rows = group + tl.arange(0, 16)
                states = tl.load(
                    mine + rows[:, None] * DV + column[None, :], mask=(rows < G)[:, None] & (column < DV)[None, :],
                    other=0.0, cache_modifier=".cg",
                ).to(DTYPE)  # fmt: skip
                values = tl.dot(states, tl.trans(part)) + origin[None, :]
                place = out + rows[:, None] * DV + into[None, :]
                tl.store(place, values, mask=(rows < G)[:, None] & (into < DV)[None, :])
    tl.debug_barrier()
