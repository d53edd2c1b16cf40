"""The GPU tier of one layer: page frames, and which page is in which.

    page_slot  [B, H, N]   page -> slot, -1 where it is not resident        a resident page is in both tables,
    slot_page  [B, H, C]   slot -> page, -1 where it is free                 page_slot[slot_page[s]] == s
    slot_step  [B, H, C]   the step that last touched the slot
    frames     [B * H * C, page elements]   contents; the cpu tier holds the same

Every (sequence, KV head) has C slots of its own, so the work of a step needs nothing from outside them. Pages of the
present step are mandatory; what else is resident are buffer pages. Eviction is SPIN's bucketed LRU, see
`kernels.admit_pages`. The cpu tier is always complete (writes go to both), so eviction never copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import kernels
from ..errors import CacheStateError
from .allocation import kept, out_of_memory
from .chunked import ChunkedArray

NO_PAGE = (1 << 31) - 1
"""Beyond every page."""


class PageFrames:
    """Page frames of `num_heads` KV heads.

    Args:
        page_elements: elements of one page, keys and values.
    """

    def __init__(self, num_heads: int, page_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_heads = num_heads
        self.page_elements = page_elements
        self.frames = torch.empty((0, page_elements), dtype=dtype, device=device)
        self.page_slot = torch.empty((0, num_heads, 0), dtype=torch.int32, device=device)
        self.slot_page = torch.empty((0, num_heads, 0), dtype=torch.int32, device=device)
        self.slot_step = torch.empty((0, num_heads, 0), dtype=torch.int64, device=device)
        self.hits = self.loads = self.evictions = 0

    @property
    def num_slots(self) -> int:
        """Slots of each (sequence, KV head)."""
        return self.slot_page.shape[2]

    @property
    def metadata(self) -> dict[str, int]:
        """Bytes of the tables, by name."""
        tables = {"page_slot": self.page_slot, "slot_page": self.slot_page, "slot_step": self.slot_step}
        return {name: table.nbytes for name, table in tables.items()}

    def resize(self, batch_size: int, num_slots: int, num_pages: int) -> None:
        """Have `num_slots` slots and a table of at least `num_pages` pages.

        The first slots keep their pages, unless the number of sequences changes: then all are forgotten.

        Raises:
            CapacityError: there is no memory for them. Nothing has changed, or all pages are forgotten.
        """
        if self.slot_page.shape[0] != batch_size:
            self._forget_sequences(batch_size)
        tables, frames = (self.page_slot, self.slot_page, self.slot_step), self.frames
        if self.num_slots != num_slots:
            keep = min(num_slots, self.num_slots)
            held = frames.view(batch_size * self.num_heads, self.num_slots, self.page_elements)
            with kept("page frames", held.shape[0] * num_slots * self.page_elements * frames.element_size()):
                page_slot = self.page_slot.masked_fill(self.page_slot >= keep, -1)
                tables = (page_slot, _fit(self.slot_page, num_slots, -1), _fit(self.slot_step, num_slots, 0))
                resized = held.new_empty((held.shape[0], num_slots, self.page_elements))
            resized[:, :keep] = held[:, :keep]
            frames = resized.flatten(0, 1)
        if tables[0].shape[2] < num_pages:
            width = max(num_pages, 2 * tables[0].shape[2])
            with kept("the table of resident pages", 4 * batch_size * self.num_heads * width):
                tables = (_fit(tables[0], width, -1), *tables[1:])
        (self.page_slot, self.slot_page, self.slot_step), self.frames = tables, frames

    def _forget_sequences(self, batch_size: int) -> None:
        """Begin anew, without slots and without a page."""
        shape = (batch_size, self.num_heads, 0)
        tables = [table.new_empty(shape) for table in (self.page_slot, self.slot_page, self.slot_step)]
        frames = self.frames.new_empty((0, self.page_elements))
        (self.page_slot, self.slot_page, self.slot_step), self.frames = tables, frames

    def bring_in(self, pages: Tensor, rows: Tensor, home: ChunkedArray, step: int) -> Tensor:
        """Make pages resident and return their contents.

        Args:
            pages: [B, H, n], int64, distinct in each row, -1 for none; n <= num_slots.
            rows: [B, H, n], int64, their rows in `home`.
        Returns:
            [B, H, n, page elements]; undefined where `pages` is -1. Mutates tables and frames.
        """
        try:
            slots, missed, evicted = kernels.admit_pages(self.page_slot, self.slot_page, self.slot_step, pages, step)
            frames = self._frame(slots.clamp(min=0))
            self.frames[frames[missed]] = home.take(rows[missed])
        except BaseException:
            self.forget_all()  # tables may promise pages that were not loaded; the cpu tier has them all
            raise
        num_loaded = int(missed.sum())
        self.loads += num_loaded
        self.hits += int((pages >= 0).sum()) - num_loaded
        self.evictions += evicted
        return self.frames[frames]

    def write(self, page: int, first_offset: int, keys: Tensor, values: Tensor) -> None:
        """Repeat a write to the home tier in the frames that hold `page`.

        Args:
            first_offset: place of the first token in the page.
            keys, values: [B, H, n, Dk] and [B, H, n, Dv], n tokens inside the page.
        """
        slots = self.page_slot[:, :, page].long()
        b, h = (slots >= 0).nonzero(as_tuple=True)
        page_size = self.frames.shape[1] // (keys.shape[-1] + values.shape[-1])
        key_part, value_part = kernels.split_pages(self.frames, page_size, keys.shape[-1])
        frames, stop = self._frame(slots.unsqueeze(2)).squeeze(2)[b, h], first_offset + keys.shape[2]
        key_part[frames, first_offset:stop] = keys[b, h].to(self.frames.dtype)
        value_part[frames, first_offset:stop] = values[b, h].to(self.frames.dtype)

    def forget(self, first: int, stop: int) -> None:
        """Drop pages [first, stop) from the tables; all, where there is no memory to say which."""
        with self._all_or_none():
            dropped = (self.slot_page >= first) & (self.slot_page < stop)
            self.page_slot[:, :, first:stop] = -1
            self.slot_page.masked_fill_(dropped, -1)

    def forget_from(self, page: int) -> None:
        """Drop pages `page` and later from the tables; all, where there is no memory to say which."""
        self.forget(page, NO_PAGE)

    def forget_all(self) -> None:
        """Drop all pages. Asks for no memory."""
        self.page_slot.fill_(-1)
        self.slot_page.fill_(-1)

    def select(self, rows: list[int]) -> None:
        """Sequence i becomes what sequence rows[i] was; sequences that change place start with nothing resident."""
        if len(rows) != self.slot_page.shape[0]:
            self.resize(len(rows), self.num_slots, self.page_slot.shape[2])
            return
        moved = [i for i, row in enumerate(rows) if i != row]
        with self._all_or_none():
            index = torch.tensor(moved, dtype=torch.int64).to(self.slot_page.device)
            self.page_slot.index_fill_(0, index, -1)
            self.slot_page.index_fill_(0, index, -1)

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Let tables agree whatever happens inside: no page resident is always right, as the cpu tier has them all."""
        try:
            yield
        except BaseException as error:
            self.forget_all()
            if not out_of_memory(error):
                raise

    def check_integrity(self, num_pages: int, rows: Tensor, home: ChunkedArray, partial: Tensor) -> None:
        """Raise CacheStateError where tables disagree or a frame differs from its home page.

        Args:
            partial: [B, 1, N, page elements] broadcastable, bool: elements that hold tokens.
        """
        b, h, slot = (self.slot_page >= 0).nonzero(as_tuple=True)
        page = self.slot_page[b, h, slot].long()
        good = page < num_pages
        if bool(good.all()):
            good = self.page_slot[b, h, page] == slot
        if not bool(good.all()) or int((self.page_slot >= 0).sum()) != page.numel():
            raise CacheStateError("integrity: page_slot and slot_page disagree; please report this as a bug")
        frame, origin = self.frames[(b * self.num_heads + h) * self.num_slots + slot], home.take(rows[b, h, page])
        differs = (frame != origin) & ~(frame.isnan() & origin.isnan())
        if bool((differs & partial.expand(self.slot_page.shape[0], -1, -1)[b, page]).any()):
            raise CacheStateError(
                "integrity: a frame differs from its page in the cpu tier; please report this as a bug"
            )

    def _frame(self, slots: Tensor) -> Tensor:
        """Rows of `frames` for slots [B, H, n]."""
        batch_size, num_heads, num_slots = self.slot_page.shape
        first = torch.arange(batch_size * num_heads, device=slots.device).view(batch_size, num_heads, 1) * num_slots
        return first + slots


def _fit(table: Tensor, width: int, fill: int) -> Tensor:
    """`table` cut or extended with `fill` to `width` in its last dimension."""
    fitted = table.new_full((*table.shape[:2], width), fill)
    keep = min(width, table.shape[2])
    fitted[..., :keep] = table[..., :keep]
    return fitted
