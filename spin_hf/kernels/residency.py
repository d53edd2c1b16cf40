"""Retrieval: where to read each page of the list from, and which page frame to copy it to. Called by `choose_kernel`.

    look up     page -> slot; slots of resident pages are touched
    count       slots by age, in 64 buckets
    victims     all slots of the oldest buckets, then of the boundary bucket as many as are missing
    admit       missing pages take the victims' slots, in the order of both

One program does this for one (sequence, KV head), without sorting and without the host. Nothing is copied: the list gets
the address to read from (page frame, or home where the page is missing) and the frame that attention fills on its way.
A missing page for which no slot is left is read from its home and stays there. The specification is
`kernels.admit_pages`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    CLOCK,
    EVICTIONS,
    FRAMES,
    HITS,
    HOME,
    LIST_CAPACITY,
    LIST_PAGE,
    LIST_SOURCE,
    LIST_TARGET,
    LOADS,
    NUM_SLOTS,
    PAGE_SLOT,
    PAGE_SLOT_STRIDE,
    QUERIES,
    SLOT_PAGE,
    SLOT_STEP,
    TOKENS,
    VICTIMS,
    count_valid,
    page_rows,
    row_addresses,
)
from .reference import NUM_BUCKETS

FREE = tl.constexpr(NUM_BUCKETS)
"""The bucket of free slots, behind those of 64 ages."""
NEVER = tl.constexpr(127)
"""The bucket of slots that this query touches."""


@triton.jit
def _age(slot_page, slot_step, slots, num_slots, clock):
    """The bucket of each slot."""
    inside = slots < num_slots
    step = tl.load(slot_step + slots, mask=inside, other=0)
    page = tl.load(slot_page + slots, mask=inside, other=0)
    age = tl.minimum(tl.maximum(clock - step, 0), FREE - 1).to(tl.int32)
    age = tl.where((clock == step) & (page >= 0), NEVER, age)
    age = tl.where(page < 0, FREE, age)
    return tl.where(inside, age, NEVER)


@triton.jit
def retrieve(
    step, layer, counters, bh, b, h, position, count, query_index, H: tl.constexpr,
    PAGE_BYTES: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
    LIST_TILE: tl.constexpr, SLOT_TILE: tl.constexpr,
):  # fmt: skip
    """Fill sources and targets of the `count` listed pages of one (sequence, KV head), and update its tables.

    Returns:
        how many of the pages were missing.
    """
    capacity = tl.load(step + LIST_CAPACITY)
    clock = tl.load(step + CLOCK) + query_index
    listed = tl.load(step + LIST_PAGE).to(tl.pointer_type(tl.int32)) + bh * capacity
    source = tl.load(step + LIST_SOURCE).to(tl.pointer_type(tl.int64)) + bh * capacity
    target = tl.load(step + LIST_TARGET).to(tl.pointer_type(tl.int64)) + bh * capacity
    victims = tl.load(step + VICTIMS).to(tl.pointer_type(tl.int32)) + bh * capacity
    home = tl.load(layer + HOME)
    num_slots = tl.load(layer + NUM_SLOTS).to(tl.int32)
    frames = tl.load(layer + FRAMES) + bh.to(tl.int64) * num_slots * PAGE_BYTES
    page_slot = tl.load(layer + PAGE_SLOT).to(tl.pointer_type(tl.int32)) + bh * tl.load(layer + PAGE_SLOT_STRIDE)
    slot_page = tl.load(layer + SLOT_PAGE).to(tl.pointer_type(tl.int32)) + bh * num_slots
    slot_step = tl.load(layer + SLOT_STEP).to(tl.pointer_type(tl.int64)) + bh * num_slots
    tokens = tl.zeros([], tl.int32)
    real = tl.zeros([], tl.int32)
    missing = tl.zeros([], tl.int32)
    for start in range(0, count, LIST_TILE):
        offsets = start + tl.arange(0, LIST_TILE)
        pages = tl.load(listed + offsets, mask=offsets < count, other=-1)
        inside = pages >= 0
        upto = count_valid(step, b, tl.minimum((pages + 1) * PAGE, position + 1), inside, PADDED)
        tokens += tl.sum(tl.where(inside, upto - count_valid(step, b, pages * PAGE, inside, PADDED), 0), 0)
        real += tl.sum(inside.to(tl.int32), 0)
        rows = page_rows(step, b, h, pages, inside, H, SEGMENT)
        address = row_addresses(home, rows, inside, ROWS, PAGE_BYTES)
        if num_slots > 0:
            slots = tl.load(page_slot + pages, mask=inside, other=-1)
            hit = slots >= 0
            tl.store(slot_step + slots, clock + tl.zeros([LIST_TILE], tl.int64), mask=hit)
            address = tl.where(hit, frames + slots.to(tl.int64) * PAGE_BYTES, address)
            missing += tl.sum((inside & (slots < 0)).to(tl.int32), 0)
        tl.store(source + offsets, tl.where(inside, address, 0), mask=offsets < count)
        tl.store(target + offsets, tl.zeros([LIST_TILE], tl.int64), mask=offsets < count)
    tl.atomic_add(counters + TOKENS, tokens.to(tl.int64))
    tl.atomic_add(counters + QUERIES, tl.full([], 1, tl.int64))
    if num_slots > 0:
        tl.atomic_add(counters + HITS, (real - missing).to(tl.int64))
        tl.atomic_add(counters + LOADS, missing.to(tl.int64))
    if missing > 0:
        tl.debug_barrier()
        buckets = tl.zeros([128], tl.int32)
        for start in range(0, num_slots, SLOT_TILE):
            slots = start + tl.arange(0, SLOT_TILE)
            buckets += tl.histogram(_age(slot_page, slot_step, slots, num_slots, clock), 128)
        bucket = tl.arange(0, 128)
        usable = (bucket >= 1) & (bucket <= FREE)
        buckets = tl.where(usable, buckets, 0)
        at_least = tl.sum(buckets, 0) - tl.cumsum(buckets, 0) + buckets  # slots in this bucket and in older ones
        boundary = tl.sum((usable & (at_least >= missing)).to(tl.int32), 0)
        older = tl.sum(tl.where(bucket > boundary, buckets, 0), 0)
        free = tl.sum(tl.where(bucket == FREE, buckets, 0), 0)
        from_boundary = tl.where(boundary > 0, missing - older, 0)
        available = tl.minimum(missing, older + from_boundary)
        tl.atomic_add(counters + EVICTIONS, tl.maximum(available - free, 0).to(tl.int64))
        found = tl.zeros([], tl.int32)
        ties_before = tl.zeros([], tl.int32)
        for start in range(0, num_slots, SLOT_TILE):
            if found < available:
                slots = start + tl.arange(0, SLOT_TILE)
                age = _age(slot_page, slot_step, slots, num_slots, clock)
                ties = (age == boundary) & (boundary > 0)
                tie_rank = ties_before + tl.cumsum(ties.to(tl.int32), 0)
                taken = ((age > boundary) & (age <= FREE)) | (ties & (tie_rank <= from_boundary))
                place = found + tl.cumsum(taken.to(tl.int32), 0) - 1
                tl.store(victims + place, slots, mask=taken.to(tl.int1))
                found += tl.sum(taken.to(tl.int32), 0)
                ties_before += tl.sum(ties.to(tl.int32), 0)
        tl.debug_barrier()
        misses_before = tl.zeros([], tl.int32)
        for start in range(0, count, LIST_TILE):
            offsets = start + tl.arange(0, LIST_TILE)
            pages = tl.load(listed + offsets, mask=offsets < count, other=-1)
            miss = (pages >= 0) & (tl.load(page_slot + pages, mask=pages >= 0, other=0) < 0)
            rank = misses_before + tl.cumsum(miss.to(tl.int32), 0) - 1
            misses_before += tl.sum(miss.to(tl.int32), 0)
            admitted = miss & (rank < available)
            slots = tl.load(victims + rank, mask=admitted, other=0)
            old = tl.load(slot_page + slots, mask=admitted, other=-1)
            tl.store(page_slot + old, tl.full([LIST_TILE], -1, tl.int32), mask=admitted & (old >= 0))
            tl.store(page_slot + pages, slots, mask=admitted)
            tl.store(slot_page + slots, pages, mask=admitted)
            tl.store(slot_step + slots, clock + tl.zeros([LIST_TILE], tl.int64), mask=admitted)
            tl.store(target + offsets, frames + slots.to(tl.int64) * PAGE_BYTES, mask=admitted)
    return missing
