"""The zones of a step, on the device: one launch for all layers. The specification is `plan.StepPlan`.

    plan_step       fixed pages, candidates and budget of every query     page_zones, QueryPlan.budget_tokens
    find_outliers   ShadowKV's outliers, as the largest key that is one   ShadowKV.outlier_pages

Outliers do not depend on the query. They change only when a page becomes a candidate, so their key is kept and found
again when the plan differs from the one it was found for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    FIRST,
    NUM_OUTLIERS,
    NUM_PAGES,
    NUM_SELECTED,
    PLAN_FIELDS,
    POSITION,
    SHARE,
    STOP,
    candidates,
    count_valid,
    outlier_keys,
)


@triton.jit
def plan_step_kernel(
    step, plan,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, BUDGET: tl.constexpr, DENSE_BELOW: tl.constexpr,
    OUTLIERS_PER_1024: tl.constexpr, PAGE: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (b, i) plans query i of sequence b."""
    b = tl.program_id(0)
    i = tl.program_id(1)
    total = tl.load(step + POSITION) + i + 1
    num_pages = (total + PAGE - 1) // PAGE
    if PADDED:
        everything = total + tl.zeros([1], tl.int64)
        held = tl.sum(count_valid(step, b, everything, everything > 0, PADDED), 0)
        first = 0
        stop = 0
        for start in range(0, num_pages, TILE):
            pages = start + tl.arange(0, TILE)
            inside = pages < num_pages
            before = count_valid(step, b, tl.minimum(pages * PAGE, total), inside, PADDED)
            upto = count_valid(step, b, tl.minimum((pages + 1) * PAGE, total), inside, PADDED)
            first += tl.sum((inside & (before < SINKS)).to(tl.int32), 0)
            stop += tl.sum((inside & (held - upto >= WINDOW)).to(tl.int32), 0)
    else:
        held = total.to(tl.int32)
        first = tl.minimum((SINKS + PAGE - 1) // PAGE, num_pages).to(tl.int32)
        stop = (tl.maximum(total - WINDOW, 0) // PAGE).to(tl.int32)
    stop = tl.maximum(first, stop)
    if BUDGET > 0:
        budget = held * 0 + BUDGET
    else:
        share = tl.load(step + SHARE).to(tl.float64, bitcast=True)
        exact = held.to(tl.float64) * share - 1e-9
        whole = exact.to(tl.int32)
        budget = whole + (exact > whole.to(tl.float64)).to(tl.int32)
    if held <= tl.maximum(budget, DENSE_BELOW):
        budget = (num_pages * PAGE).to(tl.int32)
    wanted = budget.to(tl.int64) * OUTLIERS_PER_1024
    outliers = wanted // 1024
    rest = wanted % 1024
    outliers += ((rest > 512) | ((rest == 512) & (outliers % 2 == 1))).to(tl.int64)  # torch.round: halves to even
    if OUTLIERS_PER_1024 > 0:
        outliers = tl.maximum(outliers, 1)
    row = plan + (i * tl.num_programs(0) + b) * PLAN_FIELDS
    tl.store(row + FIRST, first)
    tl.store(row + STOP, stop)
    tl.store(row + NUM_PAGES, num_pages.to(tl.int32))
    tl.store(row + NUM_SELECTED, (budget + PAGE - 1) // PAGE)
    tl.store(row + NUM_OUTLIERS, outliers.to(tl.int32))


@triton.jit
def _candidate_keys(step, layer, b, h, pages, stop, SUMMARY: tl.constexpr, H: tl.constexpr, SEGMENT: tl.constexpr,
                    ROWS: tl.constexpr, PAGE: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """`outlier_keys` of candidates, above all keys for other pages."""
    inside = candidates(step, b, pages, stop, PAGE, PADDED)
    return tl.where(inside, outlier_keys(step, layer, b, h, pages, inside, SUMMARY, H, SEGMENT, ROWS), 1 << 62)


@triton.jit
def find_outliers_kernel(
    step, layers, plan, outliers, found_for, first_layer, SUMMARY: tl.constexpr, H: tl.constexpr,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, layer, i) finds the key of the last outlier of query i.

    Args:
        layers: int64 [L]: addresses of the layers' descriptors.
        outliers: int64 [L, B, H]: the keys. Written.
        found_for: int32 [L, B, H]: the `stop` that a key was found for; -1 for none. Written.
    """
    bh = tl.program_id(0)
    index = tl.program_id(1) + first_layer
    b = bh // H
    h = bh % H
    row = plan + b * PLAN_FIELDS
    first = tl.load(row + FIRST)
    stop = tl.load(row + STOP)
    wanted = tl.load(row + NUM_OUTLIERS)
    entry = index * tl.num_programs(0) + bh
    if tl.load(found_for + entry) != stop + wanted * (1 << 24):
        layer = tl.load(layers + index).to(tl.pointer_type(tl.int64))
        low = tl.full([], -(1 << 62), tl.int64)  # below the key of cosine -1
        high = tl.full(
            [], (1 << 62) - 1, tl.int64
        )  # above that of cosine 1; the lowest key with `wanted` keys at or below it lies in (low, high]
        if wanted < stop - first:
            kept = _candidate_keys(step, layer, b, h, first + tl.arange(0, TILE), stop, SUMMARY, H, SEGMENT, ROWS, PAGE,
                                   PADDED)  # fmt: skip
            while high - low > 1:
                middle = low + (high - low) // 2
                count = tl.sum((kept <= middle).to(tl.int32), 0)
                for start in range(first + TILE, stop, TILE):
                    keys = _candidate_keys(step, layer, b, h, start + tl.arange(0, TILE), stop, SUMMARY, H, SEGMENT,
                                           ROWS, PAGE, PADDED)  # fmt: skip
                    count += tl.sum((keys <= middle).to(tl.int32), 0)
                if count >= wanted:
                    high = middle
                else:
                    low = middle
                if count == wanted:
                    low = middle - 1
        tl.store(outliers + entry, high)
        tl.store(found_for + entry, stop + wanted * (1 << 24))
