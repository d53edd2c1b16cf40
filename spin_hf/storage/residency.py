"""The GPU tier of one layer: page frames, and which page is in which.

    page_slot  [B, H, N]   page -> slot, -1 where it is not resident        a resident page is in both tables,
    slot_page  [B, H, C]   slot -> page, -1 where it is free                 page_slot[slot_page[s]] == s
    slot_step  [B, H, C]   the step that last touched the slot
    frames     [B * H * C, page elements]   contents, of the model's dtype: what a load of the page from the cpu tier gives

Every (sequence, KV head) has C slots of its own, so the work of a step needs nothing from outside them. Pages of the
present step are mandatory; what else is resident are buffer pages. Eviction is SPIN's bucketed LRU, see
`kernels.admit_pages`. The cpu tier is always complete (writes go to both), so eviction never copies.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import kernels
from ..errors import CacheStateError


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
        """
        if self.slot_page.shape[0] != batch_size:
            shape = (batch_size, self.num_heads, 0)
            self.slot_page, self.slot_step = self.slot_page.new_empty(shape), self.slot_step.new_empty(shape)
            self.page_slot = self.page_slot.new_empty(shape)
            self.frames = self.frames[:0]
        if self.num_slots != num_slots:
            keep = min(num_slots, self.num_slots)
            frames = self.frames.view(batch_size * self.num_heads, self.num_slots, self.page_elements)
            self.page_slot.masked_fill_(self.page_slot >= keep, -1)
            self.slot_page, self.slot_step = _fit(self.slot_page, num_slots, -1), _fit(self.slot_step, num_slots, 0)
            resized = frames.new_empty((frames.shape[0], num_slots, self.page_elements))
            resized[:, :keep] = frames[:, :keep]
            self.frames = resized.flatten(0, 1)
        if self.page_slot.shape[2] < num_pages:
            self.page_slot = _fit(self.page_slot, max(num_pages, 2 * self.page_slot.shape[2]), -1)

    def bring_in(self, pages: Tensor, rows: Tensor, load: Callable[[Tensor], Tensor], step: int) -> Tensor:
        """Make pages resident and return their contents.

        Args:
            pages: [B, H, n], int64, distinct in each row, -1 for none; n <= num_slots.
            rows: [B, H, n], int64, their rows in the cpu tier.
            load: gives the contents [*rows.shape, page elements] of rows there.
        Returns:
            [B, H, n, page elements]; undefined where `pages` is -1. Mutates tables and frames.
        """
        try:
            slots, missed, evicted = kernels.admit_pages(self.page_slot, self.slot_page, self.slot_step, pages, step)
            frames = self._frame(slots.clamp(min=0))
            self.frames[frames[missed]] = load(rows[missed])
        except BaseException:
            self.forget_all()  # tables may promise pages that were not loaded; the cpu tier has them all
            raise
        num_loaded = int(missed.sum())
        self.loads += num_loaded
        self.hits += int((pages >= 0).sum()) - num_loaded
        self.evictions += evicted
        return self.frames[frames]

    def write(self, page: int, first_offset: int, keys: Tensor, values: Tensor) -> None:
        """Repeat a write to the cpu tier in the frames that hold `page`.

        Args:
            first_offset: place of the first token in the page.
            keys, values: [B, H, n, Dk] and [B, H, n, Dv], n tokens inside the page, as a load will give them.
        """
        slots = self.page_slot[:, :, page].long()
        b, h = (slots >= 0).nonzero(as_tuple=True)
        page_size = self.frames.shape[1] // (keys.shape[-1] + values.shape[-1])
        key_part, value_part = kernels.split_pages(self.frames, page_size, keys.shape[-1])
        frames, stop = self._frame(slots.unsqueeze(2)).squeeze(2)[b, h], first_offset + keys.shape[2]
        key_part[frames, first_offset:stop] = keys[b, h].to(self.frames.dtype)
        value_part[frames, first_offset:stop] = values[b, h].to(self.frames.dtype)

    def forget(self, first: int, stop: int) -> None:
        """Drop pages [first, stop) from the tables."""
        self.page_slot[:, :, first:stop] = -1
        self.slot_page.masked_fill_((self.slot_page >= first) & (self.slot_page < stop), -1)

    def forget_from(self, page: int) -> None:
        """Drop pages `page` and later from the tables."""
        self.page_slot[:, :, page:] = -1
        self.slot_page.masked_fill_(self.slot_page >= page, -1)

    def forget_all(self) -> None:
        """Drop all pages."""
        self.page_slot.fill_(-1)
        self.slot_page.fill_(-1)

    def select(self, rows: list[int]) -> None:
        """Sequence i becomes what sequence rows[i] was; sequences that change place start with nothing resident."""
        if len(rows) != self.slot_page.shape[0]:
            self.resize(len(rows), self.num_slots, self.page_slot.shape[2])
            return
        moved = [i for i, row in enumerate(rows) if i != row]
        self.page_slot[moved] = -1
        self.slot_page[moved] = -1

    def check_integrity(
        self, num_pages: int, rows: Tensor, load: Callable[[Tensor], Tensor], partial: Tensor
    ) -> None:  # fmt: skip
        """Raise CacheStateError where tables disagree or a frame differs from its page in the cpu tier.

        Args:
            rows, load: as for `bring_in`, of all pages.
            partial: [B, 1, N, page elements] broadcastable, bool: elements that hold tokens.
        """
        b, h, slot = (self.slot_page >= 0).nonzero(as_tuple=True)
        page = self.slot_page[b, h, slot].long()
        good = page < num_pages
        if bool(good.all()):
            good = self.page_slot[b, h, page] == slot
        if not bool(good.all()) or int((self.page_slot >= 0).sum()) != page.numel():
            raise CacheStateError("integrity: page_slot and slot_page disagree; please report this as a bug")
        frame, origin = self.frames[(b * self.num_heads + h) * self.num_slots + slot], load(rows[b, h, page])
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
