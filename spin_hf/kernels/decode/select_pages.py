"""Selection of pages, exactly, without sorting: what `rate_kernel` counted says in which bin the budget ends.

    histogram      2  0  5  9 | 7 | 12 ...        pages of better bins are chosen
    budget 19      2  2  7 16  23                 of the boundary bin the best 3 of 7: a search among these few alone

Program b * H + h does this for one (sequence, KV head), lists the fixed pages before, and retrieves (`assign_slots.py`). It
looks at the pages that were kept; should they be too few, it counts the others and looks at all. Which of pages that tie are
taken is always the same. The specification is `kernels.select_top_pages`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    FIRST,
    KEPT_COUNT,
    KEPT_PAGE,
    KEPT_SCORE,
    LEADING,
    LIST_CAPACITY,
    LIST_PAGE,
    LOGITS,
    NUM_PAGES,
    NUM_SELECTED,
    PAGE_CAPACITY,
    PLAN_FIELDS,
    POSITION,
    SCORES,
    STOP,
    TIED,
    count_valid,
    score_bins,
    sortable,
)
from ..descriptor_fields import BINS_PER_NAT, NUM_BINS, PART_PAGES
from ..launch import Launch, LaunchShape, LayerBuffers, StepBuffers
from ..recipe import KernelRecipe
from .assign_slots import retrieve

LAST = tl.constexpr(0x7FFFFFFF)
NO_KEY = tl.constexpr(-(1 << 63))
"""Below the key of every page."""

_SELECT_TILE, _SELECT_WARPS, _FEW_TIED, _FEW_TILE = 1024, 8, 64, 64
"""Pages of a tile, warps; pages of a bin that are compared each with each, so many at a time."""
_RERANKED_TILE, _RERANKED_WARPS, _RERANKED_TIED, _RERANKED_FEW_TILE = 4096, 16, 512, 32
"""Likewise where all reranked pages are there to select from: many more."""
_TILE_PARTS, _TIED_TILE = 128, 512
"""Parts of a tile; pages of one bin at a time in a search."""
_LIST_TILE, _HAND_TILE, _SLOT_TILE = 512, 512, 2048
"""Pages of a list at a time, if it may be longer twice as many; slots at the hand, and where all are looked at."""
_KEPT = 3
"""Candidates kept for each selected page, if scores are spread as they were at the last step."""


def select_pages(
    launch: Launch, buffers: StepBuffers, layer: LayerBuffers, plan: Tensor, *, query_index: int, group: int,
    most_listed: int | None, recipe: KernelRecipe, shape: LaunchShape,
) -> None:  # fmt: skip
    """List the pages that one query of a step attends to, and assign slots to those that are missing.

    Args:
        query_index: of the query in the step; group: query heads per KV head that were scored.
        most_listed: pages that a query lists at most; None if unknown.
    """
    reranks, share = recipe.rerank_factor > 0, recipe.estimated_billionths
    tile, few, few_tile, warps = _SELECT_TILE, _FEW_TIED, _FEW_TILE, _SELECT_WARPS
    if reranks:
        tile, few, few_tile, warps = _RERANKED_TILE, _RERANKED_TIED, _RERANKED_FEW_TILE, _RERANKED_WARPS
    launch(
        choose_kernel, (buffers.num_streams,), buffers.step, layer.descriptor, plan,
        buffers.rerank_histogram if reranks else buffers.histogram, buffers.list_count, layer.counters, layer.floors,
        layer.hands, buffers.zone_edges, share, query_index, COMPLETE=reranks, COUNTED=recipe.estimates_zone,
        ESTIMATES=share > 0, ZONE=recipe.estimates_zone, G=group, H=shape.num_heads, PAGE_BYTES=shape.page_bytes,
        PAGE=shape.page_size, PADDED=shape.padded, PART=PART_PAGES, PARTS=_TILE_PARTS, BINS=NUM_BINS, PER_NAT=BINS_PER_NAT,
        KEPT=_KEPT, TILE=tile, FEW=few, FEW_TILE=few_tile, TIED_TILE=_TIED_TILE,
        LIST_TILE=_LIST_TILE * (2 if (most_listed or 0) > _LIST_TILE else 1), HAND_TILE=_HAND_TILE, SLOT_TILE=_SLOT_TILE,
        num_warps=warps,
    )  # fmt: skip


@triton.jit
def choose_kernel(
    step, layer, plan, histogram, list_count, counters, floors, hand, edges, share, query_index,
    COMPLETE: tl.constexpr, COUNTED: tl.constexpr, ESTIMATES: tl.constexpr, ZONE: tl.constexpr, G: tl.constexpr,
    H: tl.constexpr, PAGE_BYTES: tl.constexpr, PAGE: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr,
    PARTS: tl.constexpr, BINS: tl.constexpr, PER_NAT: tl.constexpr, KEPT: tl.constexpr, TILE: tl.constexpr,
    FEW: tl.constexpr, FEW_TILE: tl.constexpr, TIED_TILE: tl.constexpr, LIST_TILE: tl.constexpr, HAND_TILE: tl.constexpr,
    SLOT_TILE: tl.constexpr,
):  # fmt: skip
    """Program b * H + h lists the pages that its query attends to, and retrieves them.

    Args:
        histogram: as `rate_kernel` left it. Added to where too few pages were kept.
        list_count, hand: see `StepBuffers` and `LayerBuffers`. Written; counters: likewise. Added to.
        edges: int32 [B, H]: the bin in which the zone ends that is estimated: `share` billionths of the candidates, behind
            those that are chosen. Written, if ZONE; `histogram` then counts all candidates.
        ESTIMATES: whether `estimate_kernel` follows: then the logits of what is listed become -infinity.
        COMPLETE: whether all pages that may be chosen were kept, however they score.
        COUNTED: whether `histogram` counts all candidates, and not only those that were kept.
        PARTS: parts whose numbers of kept pages are looked at together.
        FEW: tied pages up to this number are compared each with each, with FEW_TILE at a time.
        KEPT: the floor is set so that this many times the wanted pages are kept, if they stay as they are. It goes down by one
            bin a step, and anywhere after a step that kept too few.
        floors: int32 [B, H]: the last bin whose pages are kept at the next step. Written.
    """
    bh = tl.program_id(0)
    b = (bh // H).to(tl.int64)
    row = plan + b * PLAN_FIELDS
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram + bh * BINS + bins)
    floor = tl.load(floors + bh)
    position = tl.load(step + POSITION) + query_index
    listed = tl.load(step + LIST_PAGE).to(tl.pointer_type(tl.int32)) + bh * tl.load(step + LIST_CAPACITY)
    capacity = tl.load(step + PAGE_CAPACITY)
    scores = tl.load(step + SCORES).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * capacity
    kept_page = tl.load(step + KEPT_PAGE).to(tl.pointer_type(tl.int32)) + bh.to(tl.int64) * capacity
    kept_score = tl.load(step + KEPT_SCORE).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * capacity
    kept_count = tl.load(step + KEPT_COUNT).to(tl.pointer_type(tl.int32)) + bh * tl.cdiv(capacity, PART)
    tied = tl.load(step + TIED).to(tl.pointer_type(tl.int64)) + bh.to(tl.int64) * capacity
    first = tl.load(row + FIRST)
    stop = tl.load(row + STOP)
    wanted = tl.load(row + NUM_SELECTED)
    num_pages = tl.load(row + NUM_PAGES)
    leading = tl.load(row + LEADING)
    sinks = first - leading
    fixed = sinks + num_pages - stop
    count = fixed
    if PADDED:  # pages of nothing but padding may stand between them
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
        boundary, needed, enough = _boundary(counts, wanted, BINS, KEPT)
        too_few = boundary == BINS  # or there are no more candidates than wanted
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
            counts = tl.load(histogram + bh * BINS + bins, cache_modifier=".cg")  # where the atomics were
            tl.debug_barrier()
            boundary, needed, enough = _boundary(counts, wanted, BINS, KEPT)
        tl.store(floors + bh, tl.where(too_few, enough, tl.minimum(enough, floor + 1)))
    num_tied = tl.zeros([], tl.int32)
    if too_few:
        for start in range(0, stop, TILE):
            pages, score, inside = _all_pages(scores, start, first, stop, TILE)
            count, num_tied = _sort_out(listed, count, tied, num_tied, pages, score, inside, boundary, BINS, PER_NAT)
    else:
        parts = tl.cdiv(stop, PART)
        most = tl.zeros([], tl.int32)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            most = tl.maximum(most, tl.max(tl.load(kept_count + part, mask=part < parts, other=0), 0))
        places = most * parts
        for start in range(0, places, TILE):
            place = start + tl.arange(0, TILE)
            held = tl.load(kept_count + place % parts, mask=place < places, other=0)
            inside = place // parts < held
            pages = tl.load(kept_page + place, mask=inside, other=0)
            score = tl.load(kept_score + place, mask=inside, other=0.0)
            count, num_tied = _sort_out(listed, count, tied, num_tied, pages, score, inside, boundary, BINS, PER_NAT)
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
        tl.debug_barrier()  # retrieval marks pages in the list
    missing = retrieve(
        step, layer, counters, hand, bh, b, position, num_pages, count, query_index, H, PAGE_BYTES, PAGE, PADDED,
        LIST_TILE, HAND_TILE, SLOT_TILE,
    )  # fmt: skip
    tl.store(list_count + bh * 2 + 1, missing)


@triton.jit
def _boundary(counts, wanted, BINS: tl.constexpr, KEPT: tl.constexpr):
    """The bin with the last of the `wanted` pages, how many are wanted of it, and the bin that would keep KEPT times as many.

    Bins are BINS where not so many pages were counted.
    """
    upto = tl.cumsum(counts, 0)
    below = tl.sum(
        (upto < wanted).to(tl.int32) + ((upto < KEPT * wanted).to(tl.int32) << 16), 0
    )  # both in one exchange
    needed = wanted - tl.max(tl.where(upto < wanted, upto, 0), 0)
    return below & 0xFFFF, needed, below >> 16


@triton.jit
def _all_pages(scores, start, first, stop, TILE: tl.constexpr):
    """A tile of pages, their scores, and which of them are candidates."""
    pages = start + tl.arange(0, TILE)
    score = tl.load(scores + pages, mask=(pages >= first) & (pages < stop), other=float("-inf"))
    return pages, score, score > float("-inf")


@triton.jit
def _sort_out(
    listed, count, tied, num_tied, pages, score, inside, boundary, BINS: tl.constexpr, PER_NAT: tl.constexpr
):  # fmt: skip
    """Append pages of better bins to the list, and those of the boundary bin to the tied; returns the new lengths."""
    bin_of = score_bins(score, BINS, PER_NAT)
    better = inside & (bin_of < boundary)
    equal = inside & (bin_of == boundary)
    ranks = tl.cumsum(better.to(tl.int32) + (equal.to(tl.int32) << 16), 0)  # of both kinds in one scan
    tl.store(listed + count + (ranks & 0xFFFF) - 1, pages, mask=better)
    tl.store(tied + num_tied + (ranks >> 16) - 1, sortable(score).to(tl.int64) * (1 << 32) + (LAST - pages), mask=equal)
    last = tl.max(ranks, 0)
    return count + (last & 0xFFFF), num_tied + (last >> 16)


@triton.jit
def _take_best(listed, count, tied, num_tied, needed, FEW: tl.constexpr, FEW_TILE: tl.constexpr, TILE: tl.constexpr):
    """Append the best `needed` of the tied pages, which are at least so many, to the list; returns its new length."""
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
    """Keys of tied pages; NO_KEY behind the end."""
    return tl.load(tied + offsets, mask=offsets < num_tied, other=NO_KEY)


@triton.jit
def _page(keys):
    """The page that a key is of."""
    return LAST - (keys & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _reached_by(tied, num_tied, wanted, TILE: tl.constexpr):
    """A number that exactly `wanted` of the `num_tied` keys reach; no two keys are equal.

    A search between the lowest and the highest key. A round counts how many keys reach two numbers: one where the wanted one
    would be if the keys were evenly spread, and the middle, so that it halves at worst.
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
        width = high - low  # of scores in one bin: no overflow
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
