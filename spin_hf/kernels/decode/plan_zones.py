"""Zones of a step, computed on the device: fixed pages, candidates and budget of every query. One launch for all layers.

The specification is `backends/zones.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    BUDGET_FRACTION, CANDIDATES, FIRST, LEADING, NUM_OUTLIERS, NUM_PAGES, NUM_SELECTED, OWN_POSITION, PLAN_FIELDS,
    POSITION, STOP, count_valid, own_step,
)  # fmt: skip
from ..launch import Launch


def plan_zones(
    launch: Launch, step: Tensor, plan: Tensor, *, num_queries: int, num_sink_tokens: int, recent_window: int, budget: int,
    dense_below: int, outliers_per_1024: int, page_size: int, padded: bool,
    apart: bool = False,
) -> None:  # fmt: skip
    """Plan the first `num_queries` queries of a step, for all sequences.

    Args:
        step: the step descriptor.
        plan: int32 [Q, B, len(PlanField)]. Written.
        budget: tokens, or 0 if the step descriptor has a fraction of the context.
        num_sink_tokens, recent_window, dense_below, outliers_per_1024: see `SpinOptions` and `KernelRecipe`.
        padded: whether some tokens are padding.
        apart: whether each sequence has a step descriptor of its own.
    """
    launch(
        plan_step_kernel, (plan.shape[1], num_queries), step, plan, SINKS=num_sink_tokens, WINDOW=recent_window,
        BUDGET=budget, DENSE_BELOW=dense_below, OUTLIERS_PER_1024=outliers_per_1024, PAGE=page_size, PADDED=padded,
        TILE=1024, APART=apart,
    )  # fmt: skip


@triton.jit
def plan_step_kernel(
    step, plan,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, BUDGET: tl.constexpr, DENSE_BELOW: tl.constexpr,
    OUTLIERS_PER_1024: tl.constexpr, PAGE: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Program (b, i) plans query i of sequence b."""
    b = tl.program_id(0)
    i = tl.program_id(1)
    step = own_step(step, b, APART)
    if APART and tl.load(step + POSITION) < 0:  # no sequence
        return
    total = tl.load(step + POSITION) + i + 1
    num_pages = (total + PAGE - 1) // PAGE
    leading = 0
    if PADDED:
        everything = total + tl.zeros([1], tl.int64)
        held = tl.sum(count_valid(step, b, everything, everything > 0, PADDED), 0)
        first = 0
        stop = 0
        number = 0
        for start in range(0, num_pages, TILE):
            pages = start + tl.arange(0, TILE)
            inside = pages < num_pages
            before = count_valid(step, b, tl.minimum(pages * PAGE, total), inside, PADDED)
            upto = count_valid(step, b, tl.minimum((pages + 1) * PAGE, total), inside, PADDED)
            sink = inside & (before < SINKS)
            old = inside & (held - upto >= WINDOW)
            leading += tl.sum((inside & (upto == 0)).to(tl.int32), 0)
            first += tl.sum(sink.to(tl.int32), 0)
            stop += tl.sum(old.to(tl.int32), 0)
            number += tl.sum((old & (before >= SINKS) & (upto > before)).to(tl.int32), 0)
    else:
        held = total.to(tl.int32)
        first = tl.minimum((SINKS + PAGE - 1) // PAGE, num_pages).to(tl.int32)
        stop = (tl.maximum(total - WINDOW, 0) // PAGE).to(tl.int32)
    stop = tl.maximum(first, stop)
    if not PADDED:
        number = stop - first
    if BUDGET > 0:
        budget = held * 0 + BUDGET
    else:
        fraction = tl.load(step + BUDGET_FRACTION).to(tl.float64, bitcast=True)
        exact = held.to(tl.float64) * fraction - 1e-9
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
    tl.store(row + OWN_POSITION, held - 1)
    tl.store(row + CANDIDATES, number)
    tl.store(row + LEADING, leading)
