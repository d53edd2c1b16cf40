"""Brings the summaries of a tile to the L2 cache, for `scan_kernel` while it waits for its queries.

    array     means    units    codes    scales    value codes    value scales
    segment   a run of bytes in each, and two segments per tile: 12 runs, one per thread

The scan knows early where its tiles lie, and memory is idle while queries are projected. Compiled for GPUs that launch kernels
while the previous one still runs: these have an instruction for a whole run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prefetch_tile(
    places, DK: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, UNIT_PAGES: tl.constexpr, SEGMENT: tl.constexpr
):  # fmt: skip
    """Start bringing the summaries of the two segments at `places` to the L2 cache, one run of bytes per thread."""
    start, size = tile_runs(places, DK, DV, PAGE, UNIT_PAGES, SEGMENT)
    tl.inline_asm_elementwise(
        """
        {
        .reg .pred some;
        setp.gt.s32 some, $2, 0;
        @some cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }
        """,
        "=r,l,r", [start & -16, size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def tile_runs(
    places, DK: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, UNIT_PAGES: tl.constexpr, SEGMENT: tl.constexpr
):  # fmt: skip
    """Addresses and numbers of bytes, [32], of what two segments have in the six arrays; 0 bytes past these 12 runs."""
    runs = tl.zeros([32], tl.int64), tl.zeros([32], tl.int32)
    tokens: tl.constexpr = UNIT_PAGES * PAGE
    run: tl.constexpr = SEGMENT // UNIT_PAGES
    runs = _with_runs(runs, places, 0, DK, UNIT_PAGES, run)
    runs = _with_runs(runs, places, 1, 4, UNIT_PAGES, run)
    runs = _with_runs(runs, places, 2, tokens * (DK // 4), UNIT_PAGES, run)
    runs = _with_runs(runs, places, 3, tokens * 2, UNIT_PAGES, run)
    runs = _with_runs(runs, places, 4, UNIT_PAGES * (DV // 4), UNIT_PAGES, run)
    return _with_runs(runs, places, 5, UNIT_PAGES * 2, UNIT_PAGES, run)


@triton.jit
def _with_runs(runs, places, ARRAY: tl.constexpr, BYTES: tl.constexpr, UNIT_PAGES: tl.constexpr, RUN: tl.constexpr):
    """Addresses and numbers of bytes `runs`, one per thread, with those of two segments of an array, whose units have BYTES."""
    lane = tl.arange(0, 32)
    first = places[0][ARRAY] + places[0][6] // UNIT_PAGES * BYTES
    second = places[1][ARRAY] + places[1][6] // UNIT_PAGES * BYTES
    start = tl.where(lane == 2 * ARRAY, first, tl.where(lane == 2 * ARRAY + 1, second, runs[0]))
    return start, tl.where(lane // 2 == ARRAY, RUN * BYTES, runs[1])
