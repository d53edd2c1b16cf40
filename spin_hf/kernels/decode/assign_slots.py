"""Retrieval: finds missing pages in the page list and assigns slots to them. Called by `choose_kernel`.

    look up     page -> slot; slots of resident pages are touched, missing pages are marked in the list
    victims     free slots and those of the oldest bucket, from the hand on, as many as are missing:   o o x o o x ...
                                                                                                      hand ^ ->
                if these are too few: by age in 64 buckets, all slots of older buckets and some of the boundary bucket
    admit       the i-th missing page takes the slot of the i-th victim

One program serves one (sequence, KV head), without sorting and without the host. In a buffer much larger than a step's pages
the hand finds old slots soon; a small buffer is scanned quickly. No page is copied here: attention reads a marked page from
the backing store and fills its frame. A missing page that gets no slot is only read. The specification is
`kernels.admit_pages`, which however takes all free slots before old ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import (
    CLOCK, EVICTIONS, HITS, LIST_CAPACITY, LOAD, LOADS, PAGE_SLOT, PAGE_SLOT_STRIDE, QUERIES, SLOT_PAGE, SLOT_STEP, TOKENS,
    VICTIMS, count_valid,
)  # fmt: skip
from ..reference import NUM_BUCKETS

OLDEST = tl.constexpr(NUM_BUCKETS - 1)
FREE = tl.constexpr(NUM_BUCKETS)
"""The bucket of free slots, after the 64 age buckets."""
NEVER = tl.constexpr(127)
"""The bucket of slots touched by this query, which are never victims."""


@triton.jit
def _age(slot_page, slot_step, slots, inside, clock):
    """The bucket of each slot."""
    step = tl.load(slot_step + slots, mask=inside, other=0)
    page = tl.load(slot_page + slots, mask=inside, other=0)
    age = tl.minimum(tl.maximum(clock - step, 0), OLDEST).to(tl.int32)
    age = tl.where((clock == step) & (page >= 0), NEVER, age)
    age = tl.where(page < 0, FREE, age)
    return tl.where(inside, age, NEVER)


@triton.jit
def _victims_from_hand(slot_page, slot_step, victims, hand, origin, missing, num_slots, clock, SLOT_TILE: tl.constexpr):
    """List up to `missing` free or oldest slots from `origin` on, and move the hand past the last one. Returns their number."""
    origin = tl.where(origin < num_slots, origin, 0)
    found = tl.zeros([], tl.int32)
    scanned = tl.zeros([], tl.int32)
    behind = tl.zeros([], tl.int32)
    while (found < missing) & (scanned < num_slots):
        steps = scanned + tl.arange(0, SLOT_TILE)
        slots = origin + steps
        slots = tl.where(slots < num_slots, slots, slots - num_slots)
        age = _age(slot_page, slot_step, slots, steps < num_slots, clock)
        old = (age == OLDEST) | (age == FREE)
        rank = found + tl.cumsum(old.to(tl.int32), 0)
        taken = old & (rank <= missing)
        tl.store(victims + rank - 1, slots, mask=taken)
        behind = tl.maximum(behind, tl.max(tl.where(taken, steps + 1, 0), 0))
        found = tl.minimum(found + tl.sum(old.to(tl.int32), 0), missing)
        scanned += SLOT_TILE
    origin += behind
    tl.store(hand, tl.where(origin < num_slots, origin, origin - num_slots))
    return found


@triton.jit
def _victims_by_age(slot_page, slot_step, victims, missing, num_slots, clock, SLOT_TILE: tl.constexpr):
    """List up to `missing` slots, older buckets first. Returns their number."""
    buckets = tl.zeros([128], tl.int32)
    for start in range(0, num_slots, SLOT_TILE):
        slots = start + tl.arange(0, SLOT_TILE)
        buckets += tl.histogram(_age(slot_page, slot_step, slots, slots < num_slots, clock), 128)
    bucket = tl.arange(0, 128)
    usable = (bucket >= 1) & (bucket <= FREE)
    buckets = tl.where(usable, buckets, 0)
    at_least = tl.sum(buckets, 0) - tl.cumsum(buckets, 0) + buckets  # slots in this bucket and in older ones
    boundary = tl.sum((usable & (at_least >= missing)).to(tl.int32), 0)
    older = tl.sum(tl.where(bucket > boundary, buckets, 0), 0)
    from_boundary = tl.where(boundary > 0, missing - older, 0)
    available = tl.minimum(missing, older + from_boundary)
    found = tl.zeros([], tl.int32)
    ties_before = tl.zeros([], tl.int32)
    start = tl.zeros([], tl.int32)
    while found < available:
        slots = start + tl.arange(0, SLOT_TILE)
        age = _age(slot_page, slot_step, slots, slots < num_slots, clock)
        ties = (age == boundary) & (boundary > 0)
        tie_rank = ties_before + tl.cumsum(ties.to(tl.int32), 0)
        taken = ((age > boundary) & (age <= FREE)) | (ties & (tie_rank <= from_boundary))
        tl.store(victims + found + tl.cumsum(taken.to(tl.int32), 0) - 1, slots, mask=taken.to(tl.int1))
        found += tl.sum(taken.to(tl.int32), 0)
        ties_before += tl.sum(ties.to(tl.int32), 0)
        start += SLOT_TILE
    return available


@triton.jit
def _look_up(listed, page_slot, slot_step, clock, start, count, LIST_TILE: tl.constexpr):
    """Load a tile of the list and touch the slots of its pages. Returns pages, whether each is missing, and its miss rank."""
    offsets = start + tl.arange(0, LIST_TILE)
    pages = tl.load(listed + offsets, mask=offsets < count, other=-1)
    slots = tl.load(page_slot + pages, mask=pages >= 0, other=0)
    miss = (pages >= 0) & (slots < 0)
    tl.store(slot_step + slots, clock + tl.zeros([LIST_TILE], tl.int64), mask=(pages >= 0) & (slots >= 0))
    return pages, miss, tl.cumsum(miss.to(tl.int32), 0)


@triton.jit
def _admit(
    listed, page_slot, slot_page, slot_step, victims, clock, start, pages, miss, rank, available, LIST_TILE: tl.constexpr
):  # fmt: skip
    """Mark a tile's missing pages, and give those of ranks 1 to `available` the victims' slots. Returns the evicted pages."""
    tl.store(listed + start + tl.arange(0, LIST_TILE), pages + LOAD, mask=miss)
    admitted = miss & (rank <= available)
    slots = tl.load(victims + rank - 1, mask=admitted, other=0)
    old = tl.load(slot_page + slots, mask=admitted, other=-1)
    evicted = admitted & (old >= 0)
    tl.store(page_slot + old, tl.full([LIST_TILE], -1, tl.int32), mask=evicted)
    tl.store(page_slot + pages, slots, mask=admitted)
    tl.store(slot_page + slots, pages, mask=admitted)
    tl.store(slot_step + slots, clock + tl.zeros([LIST_TILE], tl.int64), mask=admitted)
    return tl.sum(evicted.to(tl.int32), 0)


@triton.jit
def retrieve(
    step, layer, counters, hand, listed, slots, bh, b, position, num_pages, count, query_index,
    PAGE_BYTES: tl.constexpr, PAGE: tl.constexpr, PADDED: tl.constexpr, LIST_TILE: tl.constexpr, HAND_TILE: tl.constexpr,
    SLOT_TILE: tl.constexpr,
):  # fmt: skip
    """Mark the missing pages among the `count` listed pages of one (sequence, KV head), and update its tables and counters.

    Args:
        listed: its page list.
        slots: its number of slots and its first frame, from `slots_of`.
    Returns:
        the number of missing pages.
    """
    num_slots = slots[0].to(tl.int32)
    first_frame = slots[1]
    missing = tl.zeros([], tl.int32)
    if PADDED:
        tokens = tl.zeros([], tl.int32)
        for start in range(0, count, LIST_TILE):
            offsets = start + tl.arange(0, LIST_TILE)
            inside = offsets < count
            pages = tl.load(listed + offsets, mask=inside, other=0)
            upto = count_valid(step, b, tl.minimum((pages + 1) * PAGE, position + 1), inside, PADDED)
            tokens += tl.sum(tl.where(inside, upto - count_valid(step, b, pages * PAGE, inside, PADDED), 0), 0)
    else:  # every page is full except the query's own, which is always listed
        tokens = count * PAGE - (num_pages * PAGE - position.to(tl.int32) - 1)
    tl.atomic_add(counters + TOKENS, tokens.to(tl.int64), sem="relaxed")
    tl.atomic_add(counters + QUERIES, tl.full([], 1, tl.int64), sem="relaxed")
    if num_slots > 0:
        capacity = tl.load(step + LIST_CAPACITY)
        clock = tl.load(step + CLOCK) + query_index
        victims = tl.load(step + VICTIMS).to(tl.pointer_type(tl.int32)) + bh * capacity
        page_slot = tl.load(layer + PAGE_SLOT).to(tl.pointer_type(tl.int32)) + bh * tl.load(layer + PAGE_SLOT_STRIDE)
        slot_page = tl.load(layer + SLOT_PAGE).to(tl.pointer_type(tl.int32)) + first_frame
        slot_step = tl.load(layer + SLOT_STEP).to(tl.pointer_type(tl.int64)) + first_frame
        origin = tl.load(hand + bh)
        pages, miss, rank = _look_up(listed, page_slot, slot_step, clock, 0, count, LIST_TILE)
        missing = tl.max(rank, 0)
        for start in range(LIST_TILE, count, LIST_TILE):  # few lists are longer
            _, _, more_rank = _look_up(listed, page_slot, slot_step, clock, start, count, LIST_TILE)
            missing += tl.max(more_rank, 0)
        tl.atomic_add(counters + HITS, (count - missing).to(tl.int64), sem="relaxed")
        tl.atomic_add(counters + LOADS, missing.to(tl.int64), sem="relaxed")
        if missing > 0:
            tl.debug_barrier()
            available = _victims_from_hand(
                slot_page, slot_step, victims, hand + bh, origin, missing, num_slots, clock, HAND_TILE
            )
            if available < missing:
                tl.debug_barrier()
                available = _victims_by_age(slot_page, slot_step, victims, missing, num_slots, clock, SLOT_TILE)
            tl.debug_barrier()
            evicted = _admit(
                listed, page_slot, slot_page, slot_step, victims, clock, 0, pages, miss, rank, available, LIST_TILE
            )
            before = tl.max(rank, 0)
            for start in range(LIST_TILE, count, LIST_TILE):
                more, more_miss, more_rank = _look_up(listed, page_slot, slot_step, clock, start, count, LIST_TILE)
                evicted += _admit(
                    listed, page_slot, slot_page, slot_step, victims, clock, start, more, more_miss, before + more_rank,
                    available, LIST_TILE,
                )  # fmt: skip
                before += tl.max(more_rank, 0)
            tl.atomic_add(counters + EVICTIONS, evicted.to(tl.int64), sem="relaxed")
    return missing
