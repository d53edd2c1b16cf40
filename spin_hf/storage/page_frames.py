"""The GPU tier of one layer: page frames, and the tables that map pages to slots.

    page_slot  [B, H, N]   page -> slot, -1 if not resident       a resident page is in both tables
    slot_page  [F]         slot -> page, -1 if free
    slot_step  [F]         step that last touched the slot
    frames     [F, page elements]   page contents in the model's dtype, as loaded from the cpu tier

    F:   sequence 0: H * slots[0]  | sequence 1: H * slots[1] | ...        slot s of KV head h of sequence b is
         head 0, head 1, ...       | head 0, head 1, ...      |            frame first[b] + h * slots[b] + s

Every (sequence, KV head) has its own slots, so slots are assigned independently. Pages of the current step are mandatory; other
resident pages are buffer pages. Eviction is SPIN's bucketed LRU, see `kernels.admit_pages`. Writes go to both tiers, so the cpu
tier is always complete: eviction never copies, and frames may be freed and allocated at any time between two steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..errors import require_integrity
from .out_of_memory import allocating, out_of_memory
from .tier_budget import coarsely

Load = Callable[[Tensor], Tensor]
"""Maps rows of the cpu tier to page contents [*rows.shape, page elements]."""

NO_PAGE = (1 << 31) - 1
"""Larger than every page index."""


class Group(NamedTuple):
    """Consecutive sequences [start, stop) with `num_slots` slots per KV head each. Their frames begin at `first`."""

    start: int
    stop: int
    first: int
    num_slots: int

    @property
    def rows(self) -> slice:
        """The sequences, as an index."""
        return slice(self.start, self.stop)


class PageFrames:
    """Page frames of `num_heads` KV heads.

    Args:
        page_elements: elements of one page, keys and values.
    """

    def __init__(self, num_heads: int, page_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_heads = num_heads
        self.page_elements = page_elements
        self.slots: tuple[int, ...] = ()
        """Slots per KV head of each sequence."""
        self.frames = torch.empty((0, page_elements), dtype=dtype, device=device)
        self.page_slot = torch.empty((0, num_heads, 0), dtype=torch.int32, device=device)
        self.slot_page = torch.empty((0,), dtype=torch.int32, device=device)
        self.slot_step = torch.empty((0,), dtype=torch.int64, device=device)
        self.slot_counts: Tensor | None = None
        """Slots per KV head and first frame of each sequence, for kernels: [B, 2], int64. None if slot counts are equal."""
        self.hits = self.loads = self.evictions = 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Frames and tables."""
        tables = (self.frames, self.page_slot, self.slot_page, self.slot_step)
        return tables if self.slot_counts is None else (*tables, self.slot_counts)

    @property
    def num_slots(self) -> int:
        """Smallest number of slots per KV head of any sequence."""
        return min(self.slots, default=0)

    @property
    def groups(self) -> list[Group]:
        """Runs of consecutive sequences with equal slot counts."""
        return [group for group, _ in self._pieces(self.slots)]

    @property
    def nbytes(self) -> int:
        """Bytes of frames and tables."""
        return sum(table.nbytes for table in self.tensors)

    @property
    def metadata(self) -> dict[str, int]:
        """Bytes of the tables, by name."""
        tables = {"page_slot": self.page_slot, "slot_page": self.slot_page, "slot_step": self.slot_step}
        sizes = {name: table.nbytes for name, table in tables.items()}
        return sizes if self.slot_counts is None else {**sizes, "slot_counts": self.slot_counts.nbytes}

    def held(self, row: int) -> Tensor:
        """Page in each slot of a sequence, -1 if free: [H, slots[row]], a view."""
        first = self._first(self.slots)[row]
        return self.slot_page[first : first + self.num_heads * self.slots[row]].view(self.num_heads, -1)

    def resize(self, batch_size: int, slots: int | Sequence[int], num_pages: int) -> None:
        """Set the slots per KV head and let `page_slot` cover at least `num_pages` pages.

        With fewer slots, the most recently touched pages stay resident. A new batch size drops all pages. If there is no memory
        to copy the resident pages, they are dropped too and loaded again on their next use.

        Args:
            slots: for all sequences, or for each.
        Raises:
            CapacityError: no memory for more slots. The old slots remain, or none until the next call.
        """
        wanted = (slots,) * batch_size if isinstance(slots, int) else tuple(slots)
        if len(self.slots) != batch_size:
            self.forget_sequences(batch_size)
        if self.page_slot.shape[2] < num_pages:  # grows in coarse steps, so it is seldom copied
            width = coarsely(num_pages) if self.page_slot.shape[2] else num_pages
            with allocating("the table of resident pages", 4 * batch_size * self.num_heads * width):
                self.page_slot = _fit(self.page_slot, width)
        if wanted != self.slots:
            frame_bytes = self.page_elements * self.frames.element_size()
            with allocating("page frames", self.num_heads * sum(wanted) * frame_bytes):
                self._take_slots(wanted)

    def without_pages(self) -> PageFrames:
        """Frames for another cache with the same pages: none until `resize`, and the same counters."""
        twin = PageFrames(self.num_heads, self.page_elements, self.frames.dtype, self.frames.device)
        twin.hits, twin.loads, twin.evictions = self.hits, self.loads, self.evictions
        return twin

    def forget_sequences(self, batch_size: int) -> None:
        """Free all frames and tables. `batch_size` sequences without slots remain."""
        frames = self.frames.new_empty((0, self.page_elements))
        page_slot = self.page_slot.new_empty((batch_size, self.num_heads, 0))
        slot_page, slot_step = self.slot_page.new_empty((0,)), self.slot_step.new_empty((0,))
        tables = {"page_slot": page_slot, "slot_page": slot_page, "slot_step": slot_step}
        self.__dict__.update(tables, slots=(0,) * batch_size, slot_counts=None, frames=frames)  # one update

    def _take_slots(self, wanted: tuple[int, ...]) -> None:
        """Set slot counts. Keep resident pages if there is memory to copy them, else drop them."""
        before = self.slots
        try:
            self._move_slots(wanted)
            return
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        width = self.page_slot.shape[2]
        self.forget_sequences(len(wanted))
        self.page_slot = _fit(self.page_slot, width)
        try:
            self._move_slots(wanted)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError):
            self._move_slots(before)
            raise

    def _move_slots(self, wanted: tuple[int, ...]) -> None:
        """Set slot counts and copy resident pages to the new frames. Changes nothing on an error."""
        total = self.num_heads * sum(wanted)
        frames = self.frames.new_empty((total, self.page_elements))
        slot_page, slot_step = self.slot_page.new_full((total,), -1), self.slot_step.new_zeros((total,))
        page_slot = torch.full_like(self.page_slot, -1)
        slot_counts = None
        if len(set(wanted)) > 1:
            table = torch.tensor([wanted, self._first(wanted)]).T.contiguous()
            slot_counts = table.to(frames.device, non_blocking=True)
        for old, new in self._pieces(wanted):
            keep = min(old.num_slots, new.num_slots)
            pages, steps = self._view(self.slot_page, old), self._view(self.slot_step, old)
            if keep < old.num_slots:
                touched = steps.masked_fill(pages < 0, -1)
                newest = touched.argsort(dim=2, descending=True, stable=True)[:, :, :keep].sort(2).values
                pages, steps = pages.gather(2, newest), steps.gather(2, newest)
                source = self._frame(newest, old).flatten()
                torch.index_select(self.frames, 0, source, out=frames[new.first : new.first + source.numel()])
            else:
                self._view(frames, new)[:, :, :keep] = self._view(self.frames, old)
            self._view(slot_page, new)[:, :, :keep] = pages
            self._view(slot_step, new)[:, :, :keep] = steps
            columns = torch.where(pages < 0, page_slot.shape[2], pages).long()  # free slots go to an extra column
            placed = page_slot.new_full((*pages.shape[:2], page_slot.shape[2] + 1), -1)
            slot = torch.arange(keep, dtype=torch.int32, device=placed.device).expand_as(columns)
            page_slot[new.rows] = placed.scatter_(2, columns, slot)[:, :, :-1]
        tables = {"page_slot": page_slot, "slot_page": slot_page, "slot_step": slot_step}
        self.__dict__.update(tables, slots=wanted, slot_counts=slot_counts, frames=frames)  # one update

    def _pieces(self, wanted: tuple[int, ...]) -> Iterator[tuple[Group, Group]]:
        """Runs of sequences with equal slot counts, both before and after: old group and new group."""
        old, new = self._first(self.slots), self._first(wanted)
        start = 0
        for row in range(1, len(wanted) + 1):
            slots = self.slots[start], wanted[start]
            if row == len(wanted) or (self.slots[row], wanted[row]) != slots:
                yield Group(start, row, old[start], slots[0]), Group(start, row, new[start], slots[1])
                start = row

    def _view(self, table: Tensor, group: Group) -> Tensor:
        """View of a group's slots in a table [F, ...]: [sequences, H, slots, ...]."""
        shape = group.stop - group.start, self.num_heads, group.num_slots
        return table[group.first : group.first + math.prod(shape)].view(*shape, *table.shape[1:])

    def bring_in(self, pages: Tensor, rows: Tensor, load: Load, step: int) -> Tensor:
        """Make pages resident and return their contents.

        Args:
            pages: [B, H, n], int64, distinct in each row, -1 for none; at most as many as the sequence has slots.
            rows: [B, H, n], int64, their rows in the cpu tier.
            load: maps rows to their contents [*rows.shape, page elements].
        Returns:
            [B, H, n, page elements]; undefined where `pages` is -1. Mutates tables and frames.
        """
        frames, missed = torch.zeros_like(pages), torch.zeros_like(pages, dtype=torch.bool)
        evicted = 0
        try:
            for group in self.groups:
                mine, page, touched = group.rows, self._view(self.slot_page, group), self._view(self.slot_step, group)
                slots, missed[mine], count = kernels.admit_pages(self.page_slot[mine], page, touched, pages[mine], step)
                frames[mine] = self._frame(slots.clamp(min=0), group)
                evicted += count
            self.frames[frames[missed]] = load(rows[missed])
        except BaseException:
            self.forget_all()  # the tables may list pages that were not loaded; the cpu tier has all pages
            raise
        num_loaded = int(missed.sum())
        self.loads += num_loaded
        self.hits += int((pages >= 0).sum()) - num_loaded
        self.evictions += evicted
        return self.frames[frames]

    def write(self, page: int, first_offset: int, keys: Tensor, values: Tensor) -> None:
        """Write tokens to the frames that hold `page`, as was done in the cpu tier.

        Args:
            first_offset: offset of the first token in the page.
            keys, values: [B, H, n, Dk] and [B, H, n, Dv] of n tokens of the page, as a load would return them.
        """
        page_size = self.frames.shape[1] // (keys.shape[-1] + values.shape[-1])
        frame_keys, frame_values = kernels.split_pages(self.frames, page_size, keys.shape[-1])
        stop = first_offset + keys.shape[2]
        for group in self.groups:
            mine = group.rows
            slots = self.page_slot[mine, :, page].long()
            b, h = (slots >= 0).nonzero(as_tuple=True)
            frames = self._frame(slots.unsqueeze(2), group).squeeze(2)[b, h]
            frame_keys[frames, first_offset:stop] = keys[mine][b, h].to(self.frames.dtype)
            frame_values[frames, first_offset:stop] = values[mine][b, h].to(self.frames.dtype)

    def forget(self, first: int, stop: int) -> None:
        """Drop pages [first, stop) from the tables. If memory runs out, drop all pages."""
        with self._all_or_none():
            dropped = (self.slot_page >= first) & (self.slot_page < stop)
            self.page_slot[:, :, first:stop].fill_(-1)
            self.slot_page.masked_fill_(dropped, -1)

    def forget_from(self, page: int) -> None:
        """Drop pages from `page` on from the tables. If memory runs out, drop all pages."""
        self.forget(page, NO_PAGE)

    def forget_all(self) -> None:
        """Drop all pages. Allocates nothing."""
        self.page_slot.fill_(-1)
        self.slot_page.fill_(-1)

    def select(self, rows: list[int]) -> None:
        """Sequence i becomes the old sequence rows[i]. Sequences that move have no resident pages afterwards.

        If the batch size changes, there are no slots until `resize`.
        """
        if len(rows) != len(self.slots):
            self.forget_sequences(len(rows))
            return
        with self._all_or_none():
            for moved in (i for i, row in enumerate(rows) if i != row):
                self.page_slot.select(0, moved).fill_(-1)
                self.held(moved).fill_(-1)

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Drop all pages if the body fails, so that the tables agree. An out-of-memory error is then suppressed.

        This is always safe: the cpu tier has all pages.
        """
        try:
            yield
        except BaseException as error:
            self.forget_all()
            if not out_of_memory(error):
                raise

    def check_integrity(self, num_pages: int, rows: Tensor, load: Load, partial: Tensor) -> None:
        """Raise CacheStateError if the tables disagree or a frame differs from its page in the cpu tier.

        Args:
            rows, load: as for `bring_in`, of all pages.
            partial: elements that hold tokens, bool, broadcastable to [B, N, page elements].
        """
        resident = 0
        num_sequences = min(len(self.slots), rows.shape[0])  # sequences beyond, after a failed batch change, are empty
        for row in range(num_sequences):
            h, slot = (self.held(row) >= 0).nonzero(as_tuple=True)
            page = self.held(row)[h, slot].long()
            resident += page.numel()
            require_integrity(bool((page < num_pages).all()), _DISAGREE)
            require_integrity(bool((self.page_slot[row, h, page] == slot).all()), _DISAGREE)
            frame = self.frames[self._first(self.slots)[row] + h * self.slots[row] + slot]
            origin = load(rows[row, h, page])
            differs = (frame != origin) & ~(frame.isnan() & origin.isnan())
            differs &= partial.expand(len(self.slots), -1, -1)[row, page]
            require_integrity(not bool(differs.any()), "a frame differs from its page in the cpu tier")
        for table in (self.page_slot, self.slot_page):
            require_integrity(int((table >= 0).sum()) == resident, _DISAGREE)

    def _first(self, slots: Sequence[int]) -> list[int]:
        """First frame of each sequence."""
        return list(accumulate((self.num_heads * each for each in slots), initial=0))[:-1]

    def _frame(self, slots: Tensor, group: Group) -> Tensor:
        """Frame index of slots [sequences, H, n] of a group."""
        streams = torch.arange(slots.shape[0] * self.num_heads, device=slots.device)
        return group.first + streams.view(-1, self.num_heads, 1) * group.num_slots + slots


def waves(frames: PageFrames | None, pages: Tensor) -> Iterator[slice]:
    """Split the columns of `pages` [B, H, n] into waves. In a wave no sequence has more pages than slots.

    Without columns yields one empty slice, so that attention over nothing gives zero. Without frames everything is one wave.
    """
    stop = pages.shape[2]
    width = stop if frames is None else frames.num_slots
    if frames is None or frames.slot_counts is None or stop <= width:
        yield from (slice(first, first + width) for first in range(0, max(1, stop), max(1, width)))
        return
    counted = torch.nn.functional.pad((pages >= 0).cumsum(2), (1, 0))
    slots, first = frames.slot_counts[:, :1, None], 0
    while first < stop:
        fits = (counted[:, :, first + 1 :] - counted[:, :, first : first + 1] <= slots).all(0).all(0)
        end = first + int(fits.sum())
        yield slice(first, end)
        first = end


_DISAGREE = "page_slot and slot_page disagree"


def _fit(table: Tensor, width: int) -> Tensor:
    """`table`, truncated or padded with -1 to `width` in its last dimension."""
    fitted = table.new_full((*table.shape[:2], width), -1)
    keep = min(width, table.shape[2])
    fitted[..., :keep] = table[..., :keep]
    return fitted
