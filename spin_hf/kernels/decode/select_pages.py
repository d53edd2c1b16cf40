"""Exact top-k selection of pages without sorting: the histogram of `rate_kernel` gives the bin in which the budget ends.

    histogram      2  0  5  9 | 7 | 12 ...        pages of better bins are selected
    budget 19      2  2  7 16  23                 the best 3 of 7 pages of the boundary bin: a search among these only

Program b * H + h serves one (sequence, KV head). It lists the fixed pages, selects, and assigns slots (`assign_slots.py`).
It reads the bin lists only. If these have too few pages, it counts the other candidates and reads all scores. Ties are broken
deterministically, by page. The specification is `kernels.select_top_pages`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    FIRST, LEADING, LIST_CAPACITY, LIST_PAGE, LOGITS, NUM_PAGES, NUM_SELECTED, COUNTERS, PLAN_FIELDS, POSITION, STOP, TIED,
    count_valid, own_layer, own_step, score_bins, slots_of, sortable, wait_for_launch,
)  # fmt: skip
from ..descriptor_fields import BIN_TILE_PAGES, BINS_PER_NAT, NUM_BINS
from ..launch import Launch, LaunchShape, LayerBuffers, StepBuffers, dependent
from ..recipe import KernelRecipe
from .assign_slots import retrieve
from .bin_scores import rated_places

LAST = tl.constexpr(0x7FFFFFFF)
NO_KEY = tl.constexpr(-(1 << 63))
"""Below the key of every page."""

_SELECT_TILE, _SELECT_WARPS, _FEW_TIED, _FEW_TILE = 1024, 8, 64, 64
"""Pages per tile; warps; pages of the boundary bin that are ranked pairwise, and how many at a time."""
_RERANKED_TILE, _RERANKED_WARPS, _RERANKED_TIED, _RERANKED_FEW_TILE = 4096, 16, 512, 32
"""The same after reranking, where the bin lists are much longer."""
_TILE_LISTS, _TIED_TILE = 128, 512
"""Bin lists per tile; pages of the boundary bin per tile of the search."""
_LIST_TILE, _HAND_TILE, _SLOT_TILE = 512, 512, 2048
"""Pages of the page list per tile (twice as many for long lists); slots per tile of the clock hand, and of a full scan."""
_FLOOR_FACTOR = 3
"""Candidates in the bin lists per selected page. The floor is set from the last step's histogram to give about this many."""


def select_pages(
    launch: Launch, buffers: StepBuffers, layer: LayerBuffers, plan: Tensor, *, query_index: int, group: int,
    most_listed: int | None, recipe: KernelRecipe, shape: LaunchShape,
) -> None:  # fmt: skip
    """List the pages that one query of a step attends to, and assign slots to those that are missing.

    Args:
        query_index: index of the query in the step; group: query heads per KV head that were scored.
        most_listed: upper limit of pages per list; None if unknown.
    """
    reranks, share = recipe.rerank_factor > 0, recipe.estimated_billionths
    launch(
        choose_kernel, (buffers.num_streams,), buffers.step, layer.descriptor, plan,
        buffers.rerank_histogram if reranks else buffers.histogram, buffers.list_count, layer.counters, layer.floors,
        layer.hands, buffers.zone_edges, share, query_index, COMPLETE=reranks, COUNTED=recipe.estimates_zone,
        ESTIMATES=share > 0, ZONE=recipe.estimates_zone, G=group, H=shape.num_heads, PAGE_BYTES=shape.page_bytes,
        PAGE=shape.page_size, PADDED=shape.padded, BIN_TILE=BIN_TILE_PAGES, BINS=NUM_BINS,
        PER_NAT=BINS_PER_NAT, APART=shape.apart, **choice_tiles(reranks, most_listed), **dependent(shape),
    )  # fmt: skip


def choice_tiles(reranks: bool, most_listed: int | None) -> dict[str, int]:
    """Sizes of tiles of `choose_pages`, and warps."""
    tile, few, few_tile, warps = _SELECT_TILE, _FEW_TIED, _FEW_TILE, _SELECT_WARPS
    if reranks:
        tile, few, few_tile, warps = _RERANKED_TILE, _RERANKED_TIED, _RERANKED_FEW_TILE, _RERANKED_WARPS
    return {
        "LISTS": _TILE_LISTS, "FLOOR_FACTOR": _FLOOR_FACTOR, "TILE": tile, "FEW": few, "FEW_TILE": few_tile,
        "TIED_TILE": _TIED_TILE, "LIST_TILE": _LIST_TILE * (2 if (most_listed or 0) > _LIST_TILE else 1),
        "HAND_TILE": _HAND_TILE, "SLOT_TILE": _SLOT_TILE, "num_warps": warps,
    }  # fmt: skip


@triton.jit
def choose_kernel(
    step, layer, plan, histogram, list_count, counters, floors, hand, edges, share, query_index,
    COMPLETE: tl.constexpr, COUNTED: tl.constexpr, ESTIMATES: tl.constexpr, ZONE: tl.constexpr, G: tl.constexpr,
    H: tl.constexpr, PAGE_BYTES: tl.constexpr, PAGE: tl.constexpr, PADDED: tl.constexpr, BIN_TILE: tl.constexpr,
    LISTS: tl.constexpr, BINS: tl.constexpr, PER_NAT: tl.constexpr, FLOOR_FACTOR: tl.constexpr, TILE: tl.constexpr,
    FEW: tl.constexpr, FEW_TILE: tl.constexpr, TIED_TILE: tl.constexpr, LIST_TILE: tl.constexpr, HAND_TILE: tl.constexpr,
    SLOT_TILE: tl.constexpr, APART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program b * H + h lists the pages that its query attends to, and assigns slots to missing ones.

    Args:
        histogram: written by `rate_kernel`. Added to if the bin lists have too few pages.
        list_count, hand: see `StepBuffers` and `LayerBuffers`. Written. counters: see `LayerBuffers`. Added to.
        edges: int32 [B, H]: the last bin that is estimated: the best `share` billionths of the candidates after the selected
            pages. Written if ZONE; `histogram` then counts all candidates.
        ESTIMATES: whether `estimate_kernel` follows. The logits of listed pages are then set to -infinity.
        COMPLETE: whether the bin lists hold every page that may be selected, whatever its score.
        COUNTED: whether `histogram` counts all candidates, not only those in the bin lists.
        LISTS: bin lists per tile, when their lengths are read.
        FEW: up to this many tied pages are ranked pairwise, against FEW_TILE at a time.
        FLOOR_FACTOR: the floor is set from this step's histogram to give FLOOR_FACTOR times the selected pages. It grows by
            at most one bin per step, or by any number after a step whose bin lists had too few pages.
        floors: int32 [B, H]: the last bin that enters the bin lists at the next step. Written.
    """
    bh = tl.program_id(0)
    step = own_step(step, bh // H, APART)
    layer = own_layer(layer, bh // H, APART)
    if APART and tl.load(step + POSITION) < 0:  # no sequence
        wait_for_launch(PDL)
        return
    if APART:
        counters += bh // H * COUNTERS
    given = choice_of(step, layer, plan, floors, bh, H, BIN_TILE)
    wait_for_launch(PDL)
    choose_pages(
        step, layer, histogram, list_count, counters, floors, hand, edges, share, query_index, bh, given, COMPLETE,
        COUNTED, ESTIMATES, ZONE, G, H, PAGE_BYTES, PAGE, PADDED, BIN_TILE, LISTS, BINS, PER_NAT, FLOOR_FACTOR, TILE,
        FEW, FEW_TILE, TIED_TILE, LIST_TILE, HAND_TILE, SLOT_TILE,
    )  # fmt: skip


@triton.jit
def choice_of(step, layer, plan, floors, bh, H: tl.constexpr, BIN_TILE: tl.constexpr):
    """What `choose_pages` needs of descriptors, plan and floor. The kernel before does not write these.

    Returns:
        the places that `rated_places` returns
        the page list, the keys of tied pages, and the position of the step's first query
        FIRST, STOP, NUM_SELECTED, NUM_PAGES and LEADING of the plan, and the floor
        the slots, from `slots_of`
    """
    b = (bh // H).to(tl.int64)
    row = plan + b * PLAN_FIELDS
    places = rated_places(step, bh, BIN_TILE)
    listed = tl.load(step + LIST_PAGE).to(tl.pointer_type(tl.int32)) + bh * tl.load(step + LIST_CAPACITY)
    tied = tl.load(step + TIED).to(tl.pointer_type(tl.int64)) + bh.to(tl.int64) * places[0]
    position = tl.load(step + POSITION)
    zones = (
        tl.load(row + FIRST), tl.load(row + STOP), tl.load(row + NUM_SELECTED), tl.load(row + NUM_PAGES),
        tl.load(row + LEADING), tl.load(floors + bh),
    )  # fmt: skip
    return places, (listed, tied, position), zones, slots_of(layer, b, (bh % H).to(tl.int64), H)


@triton.jit
def choose_pages(
    step, layer, histogram, list_count, counters, floors, hand, edges, share, query_index, bh, given,
    COMPLETE: tl.constexpr, COUNTED: tl.constexpr, ESTIMATES: tl.constexpr, ZONE: tl.constexpr, G: tl.constexpr,
    H: tl.constexpr, PAGE_BYTES: tl.constexpr, PAGE: tl.constexpr, PADDED: tl.constexpr, BIN_TILE: tl.constexpr,
    LISTS: tl.constexpr, BINS: tl.constexpr, PER_NAT: tl.constexpr, FLOOR_FACTOR: tl.constexpr, TILE: tl.constexpr,
    FEW: tl.constexpr, FEW_TILE: tl.constexpr, TIED_TILE: tl.constexpr, LIST_TILE: tl.constexpr, HAND_TILE: tl.constexpr,
    SLOT_TILE: tl.constexpr,
):  # fmt: skip
    """List the pages of one (sequence, KV head), and assign slots to missing ones; see `choose_kernel`.

    Args:
        given: from `choice_of`.
    """
    b = (bh // H).to(tl.int64)
    places, own, zones, slots = given
    capacity, scores, bin_list_length = places[0], places[1], places[4]
    listed, tied, start_position = own
    first, stop, wanted, num_pages, leading, floor = zones
    position = start_position + query_index
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram + bh * BINS + bins)
    num_lists = tl.cdiv(stop, BIN_TILE)
    lists = tl.arange(0, LISTS)
    place = tl.arange(0, TILE)
    # Before the first reduction, so that all of these loads are under way at once.
    lengths = tl.load(bin_list_length + lists, mask=lists < num_lists, other=0)
    held, entry, entry_score = _entries(places, place, num_lists, capacity)
    sinks = first - leading
    fixed = sinks + num_pages - stop
    count = fixed
    if PADDED:  # pages of padding only may lie between the fixed pages
        count = tl.zeros([], tl.int32)
    for start in range(0, fixed, LIST_TILE):
        offsets = start + tl.arange(0, LIST_TILE)
        pages = tl.where(offsets < sinks, offsets + leading, offsets - sinks + stop)
        inside = offsets < fixed
        if PADDED:
            before = count_valid(step, b, pages * PAGE, inside, PADDED)
            upto = count_valid(step, b, tl.minimum((pages + 1) * PAGE, position + 1), inside, PADDED)
            inside = inside & (upto > before)
            rank = tl.cumsum(inside.to(tl.int32), 0)
            tl.store(listed + count + rank - 1, pages, mask=inside)
            count += tl.max(rank, 0)
        else:
            tl.store(listed + offsets, pages, mask=inside)
    boundary = tl.full([], BINS, tl.int32)
    needed = tl.zeros([], tl.int32)
    too_few = wanted < 0
    if wanted < stop - first:
        boundary, needed, enough = _boundary(counts, wanted, BINS, FLOOR_FACTOR)
        too_few = boundary == BINS  # fewer than `wanted` pages were counted
        if COMPLETE:
            too_few = wanted < 0
        elif COUNTED:
            too_few = boundary > floor
        elif too_few:
            for start in range(0, stop, TILE):
                _, score, inside = _all_pages(scores, start, first, stop, TILE)
                bin_of = score_bins(score, BINS, PER_NAT)
                uncounted = inside & (bin_of > floor)
                tl.atomic_add(histogram + bh * BINS + bin_of, tl.full([TILE], 1, tl.int32), mask=uncounted)
            tl.debug_barrier()
            counts = tl.load(histogram + bh * BINS + bins, cache_modifier=".cg")  # from L2, where the atomics are done
            tl.debug_barrier()
            boundary, needed, enough = _boundary(counts, wanted, BINS, FLOOR_FACTOR)
        tl.store(floors + bh, tl.where(too_few, enough, tl.minimum(enough, floor + 1)))
    num_tied = tl.zeros([], tl.int32)
    if too_few:
        for start in range(0, stop, TILE):
            pages, score, inside = _all_pages(scores, start, first, stop, TILE)
            count, num_tied = _sort_out(listed, count, tied, num_tied, pages, score, inside, boundary, BINS, PER_NAT)
    else:
        most = tl.max(lengths, 0)
        for start in range(LISTS, num_lists, LISTS):
            bin_list = start + lists
            most = tl.maximum(most, tl.max(tl.load(bin_list_length + bin_list, mask=bin_list < num_lists, other=0), 0))
        entries = most * num_lists
        for start in range(0, entries, TILE):
            known = (start + place) // num_lists < held
            # The next tile is loaded while this one is sorted out.
            next_held, next_entry, next_score = _entries(places, start + TILE + place, num_lists, entries)
            count, num_tied = _sort_out(
                listed, count, tied, num_tied, entry, entry_score, known, boundary, BINS, PER_NAT
            )
            held, entry, entry_score = next_held, next_entry, next_score
    if ZONE:
        upto = tl.cumsum(counts, 0)
        number = tl.max(upto, 0).to(tl.int64)
        last = tl.minimum(number, wanted + (number * share + 999999999) // 1000000000)
        tl.store(edges + bh, tl.sum((upto < last).to(tl.int32), 0))
    if num_tied > 0:
        tl.debug_barrier()
        count = _take_best(listed, count, tied, num_tied, needed, FEW, FEW_TILE, TIED_TILE)
    tl.store(list_count + bh * 2, count)
    tl.debug_barrier()
    if ESTIMATES:
        logits = tl.load(step + LOGITS).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * G * capacity
        for start in range(0, count, LIST_TILE):
            offsets = start + tl.arange(0, LIST_TILE)
            pages = tl.load(listed + offsets, mask=offsets < count, other=-1)
            for g in tl.static_range(G):
                nothing = tl.full([LIST_TILE], float("-inf"), tl.float32)
                tl.store(logits + g * capacity + pages, nothing, mask=pages >= 0)
        tl.debug_barrier()  # `retrieve` marks pages in the list
    missing = retrieve(
        step, layer, counters, hand, listed, slots, bh, b, position, num_pages, count, query_index, PAGE_BYTES, PAGE,
        PADDED, LIST_TILE, HAND_TILE, SLOT_TILE,
    )  # fmt: skip
    tl.store(list_count + bh * 2 + 1, missing)


@triton.jit
def _entries(places, place, num_lists, stop):
    """Entries `place` of the bin lists: how many the list of each has, page and score. Past a list's end they mean nothing."""
    inside = place < stop
    held = tl.load(places[4] + place % tl.maximum(num_lists, 1), mask=inside, other=0)
    return held, tl.load(places[2] + place, mask=inside, other=0), tl.load(places[3] + place, mask=inside, other=0.0)


@triton.jit
def _boundary(counts, wanted, BINS: tl.constexpr, FLOOR_FACTOR: tl.constexpr):
    """The bin in which `wanted` pages end, the pages needed of that bin, and the bin in which FLOOR_FACTOR * wanted pages end.

    A bin is BINS if fewer pages were counted.
    """
    upto = tl.cumsum(counts, 0)
    below = tl.sum(
        (upto < wanted).to(tl.int32) + ((upto < FLOOR_FACTOR * wanted).to(tl.int32) << 16), 0
    )  # both sums in one reduction
    needed = wanted - tl.max(tl.where(upto < wanted, upto, 0), 0)
    return below & 0xFFFF, needed, below >> 16


@triton.jit
def _all_pages(scores, start, first, stop, TILE: tl.constexpr):
    """A tile of pages, their scores, and whether they are candidates."""
    pages = start + tl.arange(0, TILE)
    score = tl.load(scores + pages, mask=(pages >= first) & (pages < stop), other=float("-inf"))
    return pages, score, score > float("-inf")


@triton.jit
def _sort_out(listed, count, tied, num_tied, pages, score, inside, boundary, BINS: tl.constexpr, PER_NAT: tl.constexpr):
    """Append pages of better bins to the list and pages of the boundary bin to `tied`. Returns both new lengths."""
    bin_of = score_bins(score, BINS, PER_NAT)
    better = inside & (bin_of < boundary)
    equal = inside & (bin_of == boundary)
    ranks = tl.cumsum(better.to(tl.int32) + (equal.to(tl.int32) << 16), 0)  # both ranks in one scan
    tl.store(listed + count + (ranks & 0xFFFF) - 1, pages, mask=better)
    tl.store(tied + num_tied + (ranks >> 16) - 1, sortable(score).to(tl.int64) * (1 << 32) + (LAST - pages), mask=equal)
    last = tl.max(ranks, 0)
    return count + (last & 0xFFFF), num_tied + (last >> 16)


@triton.jit
def _take_best(listed, count, tied, num_tied, needed, FEW: tl.constexpr, FEW_TILE: tl.constexpr, TILE: tl.constexpr):
    """Append the best `needed` of the tied pages to the list. Returns its new length. Requires num_tied >= needed."""
    if num_tied <= FEW:
        keys = _keys(tied, tl.arange(0, FEW), num_tied)
        rank = tl.zeros([FEW], tl.int32)
        for start in range(0, num_tied, FEW_TILE):
            others = _keys(tied, start + tl.arange(0, FEW_TILE), num_tied)
            rank += tl.sum((others[None, :] > keys[:, None]).to(tl.int32), 1)
        tl.store(listed + count + rank, _page(keys), mask=(rank < needed) & (keys != NO_KEY))
    else:
        edge = _reached_by(tied, num_tied, needed, TILE)
        place = count - 1
        for start in range(0, num_tied, TILE):
            keys = _keys(tied, start + tl.arange(0, TILE), num_tied)
            ranks = tl.cumsum((keys >= edge).to(tl.int32), 0)
            tl.store(listed + place + ranks, _page(keys), mask=keys >= edge)
            place += tl.max(ranks, 0)
    return count + needed


@triton.jit
def _keys(tied, offsets, num_tied):
    """Keys of tied pages; NO_KEY past the end."""
    return tl.load(tied + offsets, mask=offsets < num_tied, other=NO_KEY)


@triton.jit
def _page(keys):
    """The page of a key."""
    return LAST - (keys & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _reached_by(tied, num_tied, wanted, TILE: tl.constexpr):
    """A threshold that exactly `wanted` of the `num_tied` distinct keys reach.

    An interpolation search between the lowest and the highest key. Each round counts the keys above two thresholds: the
    interpolated one, and the middle, which at least halves the interval.
    """
    low = tl.full([], (1 << 63) - 1, tl.int64)
    high = tl.full([], NO_KEY, tl.int64)
    first_keys = _keys(tied, tl.arange(0, TILE), num_tied)
    for start in range(0, num_tied, TILE):
        keys = _keys(tied, start + tl.arange(0, TILE), num_tied)
        low = tl.minimum(low, tl.min(tl.where(keys != NO_KEY, keys, (1 << 63) - 1), 0))
        high = tl.maximum(high, tl.max(keys, 0))
    high += 1
    reach_low, reach_high = num_tied, tl.zeros([], tl.int32)
    while reach_low != wanted:
        width = high - low  # all scores are in one bin, so this does not overflow
        share = (reach_low - wanted + 0.5) / (reach_low - reach_high)
        guess = tl.minimum(tl.maximum(low + (share * width.to(tl.float32)).to(tl.int64), low + 1), high - 1)
        middle = low + width // 2
        first, second = tl.minimum(guess, middle), tl.maximum(guess, middle)
        one = tl.sum((first_keys >= first).to(tl.int32), 0)
        two = tl.sum((first_keys >= second).to(tl.int32), 0)
        for start in range(TILE, num_tied, TILE):
            keys = _keys(tied, start + tl.arange(0, TILE), num_tied)
            one += tl.sum((keys >= first).to(tl.int32), 0)
            two += tl.sum((keys >= second).to(tl.int32), 0)
        if two >= wanted:
            low, reach_low = second, two
        elif one >= wanted:
            low, reach_low, high, reach_high = first, one, second, two
        else:
            high, reach_high = first, one
    return low
