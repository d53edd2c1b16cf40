"""The estimate of the pages that are not read: that of all candidates, less the pages that attention reads.

    merge_partials     partial estimates of the scan's splits -> one per query head, out of the values' basis; called by some
                       programs of `choose_kernel`
    subtract_pages     partial sums of the candidates that are read; called by some programs of `attend_kernel`
    unread_sums        all candidates less those sums, for the merge

All sums are of plain values in float32, relative to the same power of two, so that a difference needs no factor. The
specification is `reference_scan.subtract`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import (
    BASIS_VECTORS, FIRST, LIST_CAPACITY, LOAD, LOGITS, NUM_SELECTED, PAGE_CAPACITY, PLAN_FIELDS, STOP, SUMMARY_3, SUMMARY_4,
    VALUE_BASIS, directory_of, directory_rows, row_addresses, wait_for_launch,
)  # fmt: skip
from .coded_fields import coordinate_fields, halves, value_fields, value_weights, whole_sums

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LEAST_SHARE = tl.constexpr(2.0**-16)
"""Share of the candidates' weight below which the rest is taken for rounding."""


@triton.jit
def merge_partials(
    layer, partials, estimate, num_splits, bh, head, DTYPE: tl.constexpr, G: tl.constexpr, SPLITS: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the partial estimates of one query head of a (sequence, KV head), and make plain values of the sum.

    Waits for the previous kernel, as the caller has not.

    Args:
        partials, estimate: see `ScanBuffers`. `estimate` is written.
        DTYPE: of the value axes.
        SPLITS: num_splits, rounded up to a power of two.
    """
    TILE: tl.constexpr = SPLITS if SPLITS < 64 else 64
    column = tl.arange(0, BLOCK_V)
    width: tl.constexpr = DV + 2
    vectors = (
        tl.load(layer + BASIS_VECTORS).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * (2 * DK + 2 * DV) + 2 * DK
    )
    axes = tl.multiple_of(tl.load(layer + VALUE_BASIS).to(tl.pointer_type(DTYPE)) + bh.to(tl.int64) * DV * DV, 16)
    square = (column < DV)[:, None] & (column < DV)[None, :]
    matrix = tl.load(axes + column[:, None] * DV + column[None, :], mask=square, other=0.0)  # before it is needed
    origin = tl.load(vectors + column, mask=column < DV, other=0.0)
    widths = tl.load(vectors + DV + column, mask=column < DV, other=0.0)
    wait_for_launch(PDL)
    total = tl.zeros([BLOCK_V], tl.float32)
    weight = tl.zeros([], tl.float32)
    power = tl.full([], float("-inf"), tl.float32)
    for start in tl.static_range(0, SPLITS, TILE):
        split = start + tl.arange(0, TILE)
        known = split < num_splits
        place = partials + ((bh * num_splits + split) * G + head) * width
        powers = tl.load(place + DV, mask=known, other=float("-inf"))
        weights = tl.load(place + DV + 1, mask=known, other=0.0)
        values = tl.load(place[:, None] + column[None, :], mask=known[:, None] & (column < DV)[None, :], other=0.0)
        higher = tl.maximum(power, tl.max(powers, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        factors, decay = tl.exp2(powers - base), tl.exp2(power - base)
        weight = weight * decay + tl.sum(weights * factors, 0)
        some = (powers > float("-inf"))[:, None]  # the sums of other splits are not written
        total = total * decay + tl.sum(tl.where(some, values, 0.0) * factors[:, None], 0)
        power = higher
    first, second, coded, fine = coordinate_fields(BLOCK_V, DV)
    coordinates = tl.gather(total, first, 0) + tl.where(fine, 4.0 * tl.gather(total, second, 0), 0.0)
    coordinates = tl.where(coded, coordinates * widths, 0.0)
    plain = tl.sum(matrix.to(tl.float32) * coordinates[None, :], 1) + weight * origin
    place = estimate + (bh * G + head) * width
    tl.store(place + column, plain, mask=column < DV)
    tl.store(place + DV, power)
    tl.store(place + DV + 1, weight)


@triton.jit
def subtract_pages(
    step, layer, plan, estimate, subtracted, listed, list_count, share, num_shares, bh, b, h, DTYPE: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, COLUMNS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr,
    VALUE_BYTES: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, VALUES: tl.constexpr, COMPILED: tl.constexpr,
    WAITS: tl.constexpr,
):  # fmt: skip
    """Add up the candidates in one share of a page list, as `scan_kernel` does, and make plain values of the sum.

    Args:
        subtracted: float32 [B * H, num_shares, G, DV + 1]. Written.
        listed, list_count: the page list of one (sequence, KV head), and the address of its length.
        DTYPE: of the value axes.
        WAITS: whether this waits for the previous kernel, as the caller has not.
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
    vectors = (
        tl.load(layer + BASIS_VECTORS).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * (2 * DK + 2 * DV) + 2 * DK
    )
    axes = tl.multiple_of(tl.load(layer + VALUE_BASIS).to(tl.pointer_type(DTYPE)) + bh.to(tl.int64) * DV * DV, 16)
    group = tl.arange(0, COLUMNS)
    byte = tl.arange(0, VALUE_BYTES)
    lane = tl.arange(0, TILE)
    column = tl.arange(0, BLOCK_V)
    aligned: tl.constexpr = 16 if DV % 64 == 0 else 8 if DV % 32 == 0 else 4
    some: tl.constexpr = BLOCK_V if BLOCK_V < 64 else 64
    square = (tl.arange(0, some) < DV)[:, None] & (column < DV)[None, :]
    ahead = tl.load(axes + tl.arange(0, some)[:, None] * DV + column[None, :], mask=square, other=0.0)
    widths = tl.load(vectors + DV + column, mask=column < DV, other=0.0)
    directory = directory_of(step, b)
    entry = share * TILE + lane
    there = entry < tl.load(step + LIST_CAPACITY)
    wait_for_launch(WAITS)
    count = tl.load(list_count)
    entered = tl.load(listed + entry, mask=there, other=-1)  # does not wait for `count`
    power = tl.load(estimate + (bh * G + group) * (DV + 2) + DV, mask=group < G, other=0.0)
    power = tl.where(power == float("-inf"), 0.0, power)
    taken = tl.zeros([4 * VALUE_BYTES, 2 * COLUMNS], tl.float32)
    weight = tl.zeros([TILE, COLUMNS], tl.float32)
    if scanned:
        for _ in range(share * TILE, count, num_shares * TILE):
            pages = tl.where(entry < count, entered, -1)
            entry += num_shares * TILE
            entered = tl.load(listed + entry, mask=entry < count, other=-1)
            pages = tl.where(pages >= LOAD, pages - LOAD, pages)
            inside = (pages >= first) & (pages < stop)
            weighed = inside[:, None] & (group < G)[None, :]
            logs = tl.load(logits + group[None, :] * capacity + pages[:, None], mask=weighed, other=float("-inf"))
            rows = directory_rows(directory, h, pages, inside, H, SEGMENT)
            codes = row_addresses(code_table, rows, inside, ROWS, DV // 4)
            scales = row_addresses(scale_table, rows, inside, ROWS, 2)
            code = tl.load(
                tl.multiple_of(codes.to(tl.pointer_type(tl.int8)), aligned)[:, None] + byte[None, :],
                mask=inside[:, None] & (byte < DV // 4)[None, :], other=0,
            )  # fmt: skip
            scale = tl.load(scales.to(tl.pointer_type(tl.bfloat16)), mask=inside, other=0.0).to(tl.float32)
            each = tl.where(weighed, tl.exp2(logs * LOG2_E - power[None, :]), 0.0)
            parts = halves(value_weights(each, scale[:, None]), VALUES)
            taken = tl.dot(tl.trans(value_fields(code, VALUES, COMPILED)), parts, acc=taken, input_precision="ieee")
            weight += each
    weights = tl.sum(weight, 0)
    place = subtracted + ((bh * num_shares + share) * G + group) * (DV + 1)
    tl.store(place + DV, weights, mask=group < G)
    sums = whole_sums(taken)
    first, second, coded, fine = coordinate_fields(BLOCK_V, DV)
    one = tl.gather(sums, _rows_of(first, VALUE_BYTES, COLUMNS), 0)
    two = tl.gather(sums, _rows_of(second, VALUE_BYTES, COLUMNS), 0)
    widths = tl.where(coded, widths, 0.0)
    coordinates = (one + tl.where(fine[:, None], 4.0 * two, 0.0)) * widths[:, None]
    # Coordinates up to 1 as pairs. The axes are orthonormal: float16 holds their numbers to 2^-25.
    unit = tl.exp2(tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(coordinates), 0), 1e-30))))
    pairs = halves(coordinates / unit[None, :], VALUES)
    for begin in tl.static_range(0, BLOCK_V, some):
        into = begin + tl.arange(0, some)
        matrix = ahead
        if begin + some < BLOCK_V:
            square = (into + some < DV)[:, None] & (column < DV)[None, :]
            ahead = tl.load(axes + (into + some)[:, None] * DV + column[None, :], mask=square, other=0.0)
        origin = tl.load(vectors + into, mask=into < DV, other=0.0)
        if tl.float16 == VALUES:
            plain = whole_sums(tl.dot(matrix.to(tl.float16), pairs)) * unit[None, :]
            plain += origin[:, None] * weights[None, :]
            tl.store(place[None, :] + into[:, None], plain, mask=(into < DV)[:, None] & (group < G)[None, :])
        else:
            for head in range(G):  # without tensor cores Triton would unroll a product number by number
                mine = group == head
                state = tl.sum(tl.where(mine[None, :], coordinates, 0.0), 1)
                own = tl.sum(matrix.to(tl.float32) * state[None, :], 1)
                own += origin * tl.sum(tl.where(mine, weights, 0.0), 0)
                tl.store(subtracted + ((bh * num_shares + share) * G + head) * (DV + 1) + into, own, mask=into < DV)


@triton.jit
def _rows_of(fields, VALUE_BYTES: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows of `value_fields` sums that hold `fields`, for each of COLUMNS columns."""
    rows = fields % 4 * VALUE_BYTES + fields // 4
    return tl.broadcast_to(rows[:, None], (fields.shape[0], COLUMNS))


@triton.jit
def unread_sums(
    estimate, subtracted, bh, SPLITS: tl.constexpr, G: tl.constexpr, MERGED_G: tl.constexpr, DV: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The estimate of unread candidates: output and lse, [MERGED_G, BLOCK_V] both; the lse is -infinity if there are none.

    Args:
        subtracted: float32 [B * H, SPLITS, G, DV + 1], written by `subtract_pages`.
    """
    heads = tl.arange(0, MERGED_G)[:, None]
    column = tl.arange(0, BLOCK_V)[None, :]
    there = (heads < G) & (column < DV)
    row = estimate + (bh * G + heads) * (DV + 2) + 0 * column
    power = tl.load(row + DV, mask=there, other=float("-inf"))
    whole = tl.load(row + DV + 1, mask=there, other=0.0)
    values = tl.load(row + column, mask=there, other=0.0)
    weight = whole
    parts = subtracted + (bh * SPLITS * G + heads) * (DV + 1) + 0 * column
    many: tl.constexpr = SPLITS if SPLITS < 16 else 16
    for split in tl.range(0, SPLITS, loop_unroll_factor=many):  # unrolled, so that the loads of several are in flight
        part = parts + split * G * (DV + 1)
        weight -= tl.load(part + DV, mask=there, other=0.0, cache_modifier=".cg")
        values -= tl.load(part + column, mask=there, other=0.0, cache_modifier=".cg")
    left = (weight > whole * LEAST_SHARE) & (power > float("-inf"))
    weight = tl.where(left, weight, 1.0)
    return tl.where(left, values / weight, 0.0), tl.where(left, (power + tl.log2(weight)) * LN_2, float("-inf"))
