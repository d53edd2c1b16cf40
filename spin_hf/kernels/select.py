"""Selection of pages, exactly, without sorting: two launches behind the scores.

    rank_kernel     every part of the context: scores as sortable integers, its own best pages
    choose_kernel   every (sequence, KV head): the best of all parts, beside the fixed pages; then retrieve

The k highest of n integers are found by search for the value that exactly k reach. A round counts how many keys reach three
values: two about where k would be if the keys in question were evenly spread, and the middle, so that it halves at worst.
Pages that tie are taken from the lowest number on. Parts make the work parallel, and keep it in registers however long the
context is. The specification is `kernels.select_top_pages`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    FIRST,
    HIGHEST,
    LIST_CAPACITY,
    LIST_PAGE,
    LOGITS,
    LOWEST,
    NUM_OUTLIERS,
    NUM_PAGES,
    NUM_SELECTED,
    PAGE_CAPACITY,
    PLAN_FIELDS,
    POSITION,
    RANKED_COUNT,
    RANKED_KEY,
    RANKED_PAGE,
    RANKED_PARTS,
    RANKED_SHIFT,
    STOP,
    candidates,
    count_valid,
    outlier_keys,
    sortable,
)
from .residency import retrieve


@triton.jit
def _reached_by(keys, wanted, held):
    """The highest value that at least `wanted` keys reach (more only where keys tie); the `held` keys above LOWEST count."""
    outliers = tl.sum((keys == HIGHEST).to(tl.int32), 0)
    low = tl.min(tl.where(keys > LOWEST, keys, HIGHEST), 0).to(tl.int64)  # reached by all
    high = tl.max(tl.where(keys < HIGHEST, keys, LOWEST), 0).to(tl.int64) + 1  # reached by outliers only
    if outliers >= wanted:
        low = tl.full([], HIGHEST, tl.int64)
    reach_low, reach_high = held, outliers
    while high - low > 1:  # a round costs a reduction, whose latency is all: three values a round, counted in one
        width = high - low
        share = (reach_low - wanted + 0.5) / (reach_low - reach_high)
        guess = low + (share * width.to(tl.float32)).to(tl.int64)
        margin = width // 16
        under = tl.minimum(tl.maximum(guess - margin, low + 1), high - 1)
        over = tl.maximum(tl.minimum(guess + margin, high - 1), under)
        middle = low + width // 2
        first, third = tl.minimum(under, middle), tl.maximum(over, middle)
        second = tl.minimum(tl.maximum(under, middle), over)
        reached = (keys >= first.to(tl.int32)).to(tl.int32) + ((keys >= second.to(tl.int32)).to(tl.int32) << 15)
        counts = tl.sum(reached.to(tl.int64) + ((keys >= third.to(tl.int32)).to(tl.int64) << 32), 0)
        one, two, three = (
            (counts & 0x7FFF).to(tl.int32),
            ((counts >> 15) & 0x7FFF).to(tl.int32),
            (counts >> 32).to(tl.int32),
        )
        if three >= wanted:
            low, reach_low = third, three
        elif two >= wanted:
            low, reach_low, high, reach_high = second, two, third, three
        elif one >= wanted:
            low, reach_low, high, reach_high = first, one, second, two
        else:
            high, reach_high = first, one
        if reach_low == wanted:
            high = low + 1
    return low


@triton.jit
def _lists(step, bh):
    """The ranked pages of one (sequence, KV head): numbers, keys, length of each part's list, and log2 of its room."""
    parts = tl.load(step + RANKED_PARTS)
    room = tl.load(step + RANKED_SHIFT).to(tl.int32)
    stride = 1 << room
    page = tl.load(step + RANKED_PAGE).to(tl.pointer_type(tl.int32)) + bh * parts * stride
    key = tl.load(step + RANKED_KEY).to(tl.pointer_type(tl.int32)) + bh * parts * stride
    count = tl.load(step + RANKED_COUNT).to(tl.pointer_type(tl.int32)) + bh * parts
    return page, key, count, room


@triton.jit
def rank_kernel(
    step, layer, stats, plan, outliers, num_splits,
    SUMMARY: tl.constexpr, OUTLIERS: tl.constexpr, H: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr,
    SPLITS: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
    PART: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, i) ranks parts i, i + num_programs(1), ...

    Args:
        stats: as `score_kernel` left them; SPLITS is num_splits rounded up to a power of two.
        outliers: int64 [B, H]: as `find_outliers_kernel` left them, of this layer.
    """
    bh = tl.program_id(0)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    row = plan + b * PLAN_FIELDS
    ranked_page, ranked_key, ranked_count, room = _lists(step, bh)
    capacity = tl.load(step + PAGE_CAPACITY)
    logits = tl.load(step + LOGITS).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * G * capacity
    first = tl.load(row + FIRST)
    stop = tl.load(row + STOP)
    wanted = tl.load(row + NUM_SELECTED)
    num_outliers = tl.load(row + NUM_OUTLIERS)
    scored = wanted < stop - first
    for part in range(tl.program_id(1), tl.cdiv(stop - first, PART), tl.num_programs(1)):
        pages = first + part * PART + tl.arange(0, PART)
        inside = candidates(step, b, pages, stop, PAGE, PADDED)
        keys = tl.zeros([PART], tl.int32)
        if scored:
            best = tl.full([PART], float("-inf"), tl.float32)
            split = tl.arange(0, SPLITS)
            known = (split < num_splits)[None, :]
            for g in tl.static_range(0, G, HEADS):  # several query heads at once: a reduction costs its latency
                heads = g + tl.arange(0, HEADS)
                place = stats + (bh * num_splits + split)[None, :] * 2 * BLOCK_G + heads[:, None]
                most = tl.load(place, mask=known, other=float("-inf"))
                sums = tl.load(place + BLOCK_G, mask=known, other=0.0)
                highest = tl.max(most, 1)
                shift = tl.where(highest == float("-inf"), 0.0, highest)
                lse = shift + tl.log(tl.sum(sums * tl.exp(most - shift[:, None]), 1))
                there = inside[None, :] & (heads < G)[:, None]
                each = tl.load(logits + heads[:, None] * capacity + pages[None, :], mask=there, other=float("-inf"))
                best = tl.maximum(best, tl.max(tl.where(there, each - lse[:, None], float("-inf")), 0))
            keys = tl.maximum(sortable(best), LOWEST + 1)
            if OUTLIERS:
                unlike = outlier_keys(step, layer, b, h, pages, inside, SUMMARY, H, SEGMENT, ROWS)
                keys = tl.where((unlike <= tl.load(outliers + bh)) & (num_outliers > 0), HIGHEST, keys)
        keys = tl.where(inside, keys, LOWEST)
        here = tl.sum(inside.to(tl.int32), 0)
        taken = inside
        if wanted < here:
            edge = _reached_by(keys, wanted, here)
            over = keys > edge
            ties = keys == edge
            needed = wanted - tl.sum(over.to(tl.int32), 0)
            taken = over | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= needed))
            here = wanted
        place = (part << room) + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(ranked_page + place, pages, mask=taken)
        tl.store(ranked_key + place, keys, mask=taken)
        tl.store(ranked_count + part, here)


@triton.jit
def _ranked(offsets, ranked_page, ranked_key, ranked_count, room, num_parts):
    """Pages and keys at places of the parts' lists; LOWEST where there are none."""
    part = offsets >> room
    inside = part < num_parts
    inside = inside & (offsets - (part << room) < tl.load(ranked_count + part, mask=inside, other=0))
    pages = tl.load(ranked_page + offsets, mask=inside, other=-1)
    return pages, tl.load(ranked_key + offsets, mask=inside, other=LOWEST)


@triton.jit
def choose_kernel(
    step, layer, plan, list_count, counters, query_index,
    H: tl.constexpr, PAGE_BYTES: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr,
    ROWS: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr, TILE: tl.constexpr, NARROW: tl.constexpr,
    LIST_TILE: tl.constexpr, SLOT_TILE: tl.constexpr,
):  # fmt: skip
    """Program b * H + h lists the pages that its query attends to, and retrieves them.

    Args:
        list_count: int32 [B, H, 2]: length of each list, and how many of its pages are to be loaded. Written.
        counters: int64 [len(Counter)]. Added to.
    """
    bh = tl.program_id(0)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    row = plan + b * PLAN_FIELDS
    position = tl.load(step + POSITION) + query_index
    capacity = tl.load(step + LIST_CAPACITY)
    listed = tl.load(step + LIST_PAGE).to(tl.pointer_type(tl.int32)) + bh * capacity
    first = tl.load(row + FIRST)
    stop = tl.load(row + STOP)
    wanted = tl.load(row + NUM_SELECTED)
    num_pages = tl.load(row + NUM_PAGES)
    count = first + num_pages - stop
    for start in range(0, count, LIST_TILE):
        offsets = start + tl.arange(0, LIST_TILE)
        pages = tl.where(offsets < first, offsets, offsets - first + stop)
        inside = offsets < count
        if PADDED:
            before = count_valid(step, b, pages * PAGE, inside, PADDED)
            upto = count_valid(step, b, tl.minimum((pages + 1) * PAGE, position + 1), inside, PADDED)
            pages = tl.where(upto > before, pages, -1)
        tl.store(listed + offsets, pages, mask=inside)
    num_parts = tl.cdiv(stop - first, PART)
    if num_parts > 0:
        ranked_page, ranked_key, ranked_count, room = _lists(step, bh)
        width = num_parts << room
        total = tl.zeros([], tl.int32)
        for start in range(0, num_parts, 64):
            parts = start + tl.arange(0, 64)
            total += tl.sum(tl.load(ranked_count + parts, mask=parts < num_parts, other=0), 0)
        edge = tl.full([], -(1 << 31), tl.int64)
        needed = total
        if wanted < total:
            if width <= NARROW:
                _, few = _ranked(tl.arange(0, NARROW), ranked_page, ranked_key, ranked_count, room, num_parts)
                edge = _reached_by(few, wanted, total)
                needed = wanted - tl.sum((few > edge).to(tl.int32), 0)
            elif width <= TILE:
                _, keys = _ranked(tl.arange(0, TILE), ranked_page, ranked_key, ranked_count, room, num_parts)
                edge = _reached_by(keys, wanted, total)
                needed = wanted - tl.sum((keys > edge).to(tl.int32), 0)
            else:
                edge = _reached_in_tiles(wanted, width, ranked_page, ranked_key, ranked_count, room, num_parts, TILE)
                needed = wanted
                for start in range(0, width, TILE):
                    offsets = start + tl.arange(0, TILE)
                    _, keys = _ranked(offsets, ranked_page, ranked_key, ranked_count, room, num_parts)
                    needed -= tl.sum((keys > edge).to(tl.int32), 0)
        ties_before = tl.zeros([], tl.int32)
        for start in range(0, width, NARROW):
            offsets = start + tl.arange(0, NARROW)
            pages, keys = _ranked(offsets, ranked_page, ranked_key, ranked_count, room, num_parts)
            ties = (keys == edge) & (keys > LOWEST)
            tie_rank = ties_before + tl.cumsum(ties.to(tl.int32), 0)
            taken = ((keys > edge) & (keys > LOWEST)) | (ties & (tie_rank <= needed))
            place = count + tl.cumsum(taken.to(tl.int32), 0) - 1
            tl.store(listed + place, pages, mask=taken)
            count += tl.sum(taken.to(tl.int32), 0)
            ties_before += tl.sum(ties.to(tl.int32), 0)
    tl.store(list_count + bh * 2, count)
    tl.debug_barrier()
    missing = retrieve(
        step, layer, counters, bh, b, h, position, count, query_index, H, PAGE_BYTES, PAGE, SEGMENT, ROWS,
        PADDED, LIST_TILE, SLOT_TILE,
    )  # fmt: skip
    tl.store(list_count + bh * 2 + 1, missing)


@triton.jit
def _reached_in_tiles(
    wanted, width, ranked_page, ranked_key, ranked_count, room, num_parts, TILE: tl.constexpr
):  # fmt: skip
    """As `_reached_by`, over lists of any length."""
    low = tl.full([], -(1 << 31), tl.int64)
    high = tl.full([], (1 << 31), tl.int64)
    while high - low > 1:
        middle = low + (high - low) // 2
        count = tl.zeros([], tl.int32)
        for start in range(0, width, TILE):
            _, keys = _ranked(start + tl.arange(0, TILE), ranked_page, ranked_key, ranked_count, room, num_parts)
            count += tl.sum((keys >= middle).to(tl.int32), 0)
        if count >= wanted:
            low = middle
        else:
            high = middle
        if count == wanted:
            high = middle + 1
    return low
