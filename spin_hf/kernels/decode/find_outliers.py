"""Marks ShadowKV's outlier pages of all layers, in one launch per step. The specification is `ShadowKV.score`.

    key(page)   sorts by lowest cosine, then by page number; the pages of the lowest keys are outliers
    edge        the highest key of an outlier, stored for each (layer, sequence, KV head)
    marks       1 for candidates with a key up to the edge, indexed by page, for `rate_kernel`

Outliers do not depend on the query. They change only when a page becomes a candidate:

    same plan           nothing to do
    one page more       if its key is below the edge, it replaces the page of the edge; else nothing changes
    anything else       a binary search finds the edge, and all pages are marked again
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    FIRST, NUM_OUTLIERS, OUTLIER, PAGE_CAPACITY, PLAN_FIELDS, POSITION, STOP, SUMMARY_1, candidates, own_layer, own_step,
    page_rows, row_addresses, sortable, triton_dtype,
)  # fmt: skip
from ..launch import Launch, LaunchShape

NO_EDGE = tl.constexpr((1 << 62) - 1)
"""Edge above all keys: every candidate is an outlier."""
NO_KEY = tl.constexpr(1 << 62)
"""The key of pages that are not candidates."""


def find_outliers(
    launch: Launch, step: Tensor, layers: Tensor, plan: Tensor, edges: Tensor, found_for: Tensor, *, first_layer: int,
    num_layers: int, shape: LaunchShape,
) -> None:  # fmt: skip
    """Mark the outliers of layers [first_layer, first_layer + num_layers) for the query of `plan`.

    Args:
        step, layers, plan, edges, found_for: as for `find_outliers_kernel`.
        shape: the shape of all these layers.
    """
    launch(
        find_outliers_kernel, (edges.shape[1], num_layers), step, layers, plan, edges, found_for, first_layer,
        SUMMARY=triton_dtype(shape.dtype), H=shape.num_heads, SEGMENT=shape.segment_pages, ROWS=shape.rows_per_chunk,
        PAGE=shape.page_size, PADDED=shape.padded, TILE=1024, APART=shape.apart,
    )  # fmt: skip


@triton.jit
def _keys(step, layer, b, h, pages, inside, SUMMARY: tl.constexpr, H: tl.constexpr, SEGMENT: tl.constexpr,
          ROWS: tl.constexpr):  # fmt: skip
    """Keys of pages; NO_KEY where `inside` is False."""
    rows = page_rows(step, b, h, pages, inside, H, SEGMENT)
    address = row_addresses(tl.load(layer + SUMMARY_1), rows, inside, ROWS, SUMMARY.primitive_bitwidth // 8)
    cosine = tl.load(address.to(tl.pointer_type(SUMMARY)), mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, sortable(cosine).to(tl.int64) * (1 << 32) + pages, NO_KEY)


@triton.jit
def _candidate_keys(step, layer, b, h, start, first, stop, SUMMARY: tl.constexpr, H: tl.constexpr,
                    SEGMENT: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, PADDED: tl.constexpr,
                    TILE: tl.constexpr):  # fmt: skip
    """A tile of pages from `start` on, and their keys; NO_KEY for pages that are not candidates."""
    pages = start + tl.arange(0, TILE)
    inside = candidates(step, b, pages, first, stop, PAGE, PADDED)
    return pages, _keys(step, layer, b, h, pages, inside, SUMMARY, H, SEGMENT, ROWS)


@triton.jit
def find_outliers_kernel(
    step, layers, plan, edges, found_for, first_layer, SUMMARY: tl.constexpr, H: tl.constexpr,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, layer) marks the outliers for the query of `plan`.

    Args:
        layers: int64 [L]: addresses of the layers' descriptors.
        edges: int64 [L, B, H]. Written.
        found_for: int32 [L, B, H, 2]: `stop` and the number of outliers of the current marks; -1 for no marks. Written.
    """
    bh = tl.program_id(0)
    index = tl.program_id(1) + first_layer
    b = bh // H
    h = bh % H
    step = own_step(step, b, APART)
    if APART and tl.load(step + POSITION) < 0:  # no sequence
        return
    row = plan + b * PLAN_FIELDS
    first = tl.load(row + FIRST)
    stop = tl.load(row + STOP)
    wanted = tl.load(row + NUM_OUTLIERS)
    entry = index * tl.num_programs(0) + bh
    found_stop = tl.load(found_for + entry * 2)
    same_number = tl.load(found_for + entry * 2 + 1) == wanted
    if (found_stop != stop) | (same_number == 0):
        layer = own_layer(tl.load(layers + index).to(tl.pointer_type(tl.int64)), b, APART)
        capacity = tl.load(step + PAGE_CAPACITY)
        stream = index * H + bh if APART else entry
        marks = tl.load(step + OUTLIER).to(tl.pointer_type(tl.int8)) + stream.to(tl.int64) * capacity
        edge = tl.load(edges + entry)
        if same_number & (found_stop >= 0) & (found_stop + 1 == stop) & (edge != NO_EDGE):
            _, new = _candidate_keys(
                step, layer, b, h, found_stop, first, stop, SUMMARY, H, SEGMENT, ROWS, PAGE, PADDED, 1
            )
            key = tl.sum(new, 0)
            tl.store(marks + found_stop, (key < edge).to(tl.int8))
            if key < edge:
                tl.store(marks + (edge & 0xFFFFFFFF), tl.zeros([], tl.int8))  # the page of that key
                tl.debug_barrier()
                edge = tl.full([], -(1 << 62), tl.int64)
                for start in range(0, stop, TILE):
                    pages = start + tl.arange(0, TILE)
                    marked = tl.load(marks + pages, mask=(pages >= first) & (pages < stop), other=0) != 0
                    keys = _keys(step, layer, b, h, pages, marked, SUMMARY, H, SEGMENT, ROWS)
                    edge = tl.maximum(edge, tl.max(tl.where(marked, keys, -(1 << 62)), 0))
        else:
            low = tl.full([], -(1 << 62), tl.int64)  # below the key of cosine -1
            high = tl.full(
                [], NO_EDGE, tl.int64
            )  # a threshold between the last outlier and the next page is in (low, high]
            if wanted < stop - first:
                _, kept = _candidate_keys(
                    step, layer, b, h, 0, first, stop, SUMMARY, H, SEGMENT, ROWS, PAGE, PADDED, TILE
                )
                while high - low > 1:
                    middle = low + (high - low) // 2
                    count = tl.sum((kept <= middle).to(tl.int32), 0)
                    for start in range(TILE, stop, TILE):
                        _, keys = _candidate_keys(
                            step, layer, b, h, start, first, stop, SUMMARY, H, SEGMENT, ROWS, PAGE, PADDED, TILE
                        )
                        count += tl.sum((keys <= middle).to(tl.int32), 0)
                    if count >= wanted:
                        high = middle
                    else:
                        low = middle
                    if count == wanted:
                        low = middle - 1
            edge = tl.full([], -(1 << 62), tl.int64)
            for start in range(0, stop, TILE):
                pages, keys = _candidate_keys(
                    step, layer, b, h, start, first, stop, SUMMARY, H, SEGMENT, ROWS, PAGE, PADDED, TILE
                )
                tl.store(marks + pages, (keys <= high).to(tl.int8), mask=pages < stop)
                edge = tl.maximum(edge, tl.max(tl.where(keys <= high, keys, -(1 << 62)), 0))
            if high == NO_EDGE:
                edge = high
        tl.store(edges + entry, edge)
        tl.store(found_for + entry * 2, stop)
        tl.store(found_for + entry * 2 + 1, wanted)
