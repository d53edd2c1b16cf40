"""Page table of a batch: lengths, and the segments of each sequence. Shared by all layers of a cache.

    directory   sequence 0  [ 3 | 0 | 5 ]       a segment is `SEGMENT_PAGES` pages of every KV head, in every layer
                sequence 1  [ 3 | 0 | 6 ]       segments 3 and 0 are shared: a common prefix (beams, copies)
    refcounts   segment     0:2  3:2  5:1  6:1      free: 1 2 4

    page p of KV head h of sequence b  ->  row (directory[b][p // S] * H + h) * S + p % S,     S = SEGMENT_PAGES

This is SPIN's two-level page table. Each sequence has a small directory of segments, taken from a pool that grows on demand.
Pages of a segment are consecutive rows, so pages need no pointers. All full-attention layers hold the same tokens, so they
share one directory; each layer has its own rows.

Tables are never changed in place. New tables are built and swapped in with one update (`_become`), so an interruption leaves
either the old tables or the new ones.

Shared segments are copied on write (`begin`). All sequences have the same number of tokens, padding included.
"""

from __future__ import annotations

from copy import copy, deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..errors import BatchSizeError, require_integrity
from ..kernels.descriptor_fields import MAX_QUERIES
from .change_log import Past
from .clustered_spans import ClusteredSpans
from .padding_mask import TokenMask
from .segment_pool import (
    ENTRY_BYTES,
    SEGMENT_PAGES,
    own_segment,
    release_segments,
    segment_indices,
    segments_of,
    take_segments,
)
from .segment_store import Room, SegmentStore
from .segment_tables import SegmentTables, Tables
from .shared_segments import SharedSegments

__all__ = ["ENTRY_BYTES", "SEGMENT_PAGES", "PageTable", "SegmentStore", "check_batch", "segments_of"]


class PageTable(SegmentTables):
    """Lengths, directory, reference counts, padding and clustered pages of a batch.

    Args:
        page_size: tokens per page.
        keeps_positions: whether to store positions: 8 bytes a token if there is padding.
    """

    def __init__(self, page_size: int, keeps_positions: bool = False) -> None:
        super().__init__()
        self.page_size = page_size
        self.mask = TokenMask(keeps_positions)
        self.spans = ClusteredSpans()
        self.start = 0
        """Tokens held before the current step."""
        self.length = 0
        """Tokens held, including the current step."""
        self.expected_tokens = 0
        """Tokens that a prompt in progress will have added at its end. Room for them is reserved with its first chunk."""
        self.step = 0
        """LRU clock of the page frames. A step advances it by its queries, at most MAX_QUERIES."""
        self.past = Past()
        self.past_version = 0
        """Counts changes to the past, i.e. all changes except appended tokens."""
        self.memory_version = 0
        """Counts events that may move or resize memory: allocations and changes to the past."""
        self.layout_version = 0
        """Counts conversions of a store's layout. Kernels compiled for the old layout cannot read the new one."""
        self._room: Room | None = None
        """The room that was reserved last; None if that must be repeated."""
        self._rows: dict[tuple[int, torch.device], Tensor] = {}
        self._counted: tuple[int, int, list[int]] | None = None
        """Cache of `pages_held`: past version, tokens, and pages with real tokens of each sequence."""

    @property
    def num_pages(self) -> int:
        """Pages of one KV head of one sequence, including a partly filled last page."""
        return -(-self.length // self.page_size)

    @property
    def room(self) -> tuple[int, int, int]:
        """Batch size, segments in the pool, and page capacity per sequence, expected tokens included."""
        return self._room_for(self.directory, self.refcounts, self.free)[:3]

    @property
    def metadata(self) -> dict[str, int]:
        """Bytes of the tables that all layers share, by name."""
        return {
            "directory": ENTRY_BYTES * sum(len(row) for row in self.directory),
            "reference counts": ENTRY_BYTES * len(self.refcounts),
            **self.mask.metadata,
            "spans": self.spans.clustered.nbytes,
        }

    def positions(self, first: int, stop: int, device: torch.device) -> Tensor:
        """Positions of tokens [first, stop), [B, stop - first], int64; undefined for padding. Needs `keeps_positions`."""
        held = self.mask.positions
        if held is None:
            return torch.arange(first, stop, device=device).expand(self.batch_size, -1)
        return held[:, first:stop].to(device)

    def pages_held(self) -> list[int] | None:
        """Pages of each sequence that hold real tokens; None without padding. Synchronizes once per `past_version`."""
        valid = self.mask.valid
        if valid is None or not self.length:
            return None
        if self._counted is None or self._counted[0] != self.past_version:
            filled = torch.nn.functional.pad(valid, (0, -valid.shape[1] % self.page_size))
            pages = filled.unflatten(1, (-1, self.page_size)).any(2)
            self._counted = self.past_version, valid.shape[1], pages.sum(1).tolist()
        more = self.num_pages - -(-self._counted[1] // self.page_size)
        return [number + max(0, more) for number in self._counted[2]]

    def _room_for(self, directory: list[list[int]], refcounts: list[int], free: list[int]) -> Room:
        return self.room_for(directory, refcounts, free, segments_of(-(-self.expected_tokens // self.page_size)))

    def attach(self, store: SegmentStore) -> None:
        """Register `store` for all later changes and reserve room for what is held."""
        room = self._room_for(self.directory, self.refcounts, self.free)
        store.check(*room[:2], max(self.num_pages, -(-self.expected_tokens // self.page_size)))
        store.reserve(*room)
        self.stores.append(store)
        self.memory_version += 1

    def begin(self, batch_size: int, num_tokens: int, new_valid: Tensor | None) -> None:
        """Start a step that appends `num_tokens` to every sequence. Allocates segments and unshares those it will write.

        Args:
            new_valid: [batch_size, num_tokens], bool, False for padding; None for all valid.
        Raises:
            BatchSizeError: the cache holds another number of sequences.
            CapacityError, BudgetError: from the stores. Nothing has changed.
        """
        if self.length and batch_size != self.batch_size:
            held = self.batch_size
            raise BatchSizeError(f"expected {held} sequences, got {batch_size}; begin with as many as are held")
        length = self.length + num_tokens
        mask = self.mask.appended(batch_size, self.length, new_valid, num_tokens)
        pages = self.length // self.page_size, -(-length // self.page_size)
        owns = self.owns(*pages)
        if not owns or self.shared.is_behind:
            self.settle_forks()
        before = self.directory, self.refcounts, self.free
        tables = {} if owns else self._take(batch_size, *pages)
        step = self.step + min(max(1, self.length - self.start), MAX_QUERIES)
        self.__dict__.update(tables, mask=mask, _before=before, step=step, start=self.length, length=length)

    def owns(self, first: int, stop: int) -> bool:
        """Whether every sequence already owns the segments of pages [first, stop), unshared and reserved. Usual in decoding."""
        room = self._room
        if room is None or room.batch_size != len(self.directory):
            return False
        if room.num_pages * self.page_size < self.expected_tokens:
            return False
        indices = segment_indices(first, stop)
        own, refcounts = self.shared.owns, self.refcounts
        return all(i < len(row) and refcounts[row[i]] == 1 and own(row[i]) for row in self.directory for i in indices)

    def _take(self, batch_size: int, first: int, stop: int) -> dict[str, Any]:
        """Tables in which every sequence owns the segments of pages [first, stop). Adds segments and copies shared ones."""
        directory = [list(row) for row in self.directory] if self.length else [[] for _ in range(batch_size)]
        reuse = self.length or self.stores  # without stores, segments of a rejected batch have no rows
        refcounts, free = (list(self.refcounts), list(self.free)) if reuse else ([], [])
        copies = take_segments(directory, refcounts, free, self.shared, first, stop)
        self._prepare(copies, self._room_for(directory, refcounts, free))
        if (directory, refcounts) == (self.directory, self.refcounts):
            return {}
        return {"directory": directory, "refcounts": refcounts, "free": free, "_rows": {}}

    def check_room(self, length: int, num_tokens: int) -> None:
        """Raise BudgetError or CapacityError if `num_tokens` beyond `length` would exceed a cap.

        Checks nothing for an empty cache, see `admission.check_first_batch`.
        """
        if not length:
            return
        num_pages = -(-(length + num_tokens) // self.page_size)
        more = self.batch_size * max(0, segments_of(num_pages) - segments_of(-(-length // self.page_size)))
        num_segments = self.num_segments + max(0, more - len(self.free))
        for store in self.stores:
            store.check(self.batch_size, num_segments, num_pages)

    def first_room(self, batch_size: int, num_tokens: int) -> tuple[int, int, int]:
        """Batch size, segments and pages per sequence after the first `num_tokens` of a batch."""
        num_pages = -(-num_tokens // self.page_size)
        held = self.num_segments if self.stores else 0
        return batch_size, max(held, batch_size * segments_of(num_pages)), num_pages

    def page_rows(self, num_heads: int, device: torch.device) -> Tensor:
        """Row ids of all pages: [B, num_heads, pages of all segments], int64. Pages beyond `num_pages` are unused."""
        rows = self._rows.get((num_heads, device))
        if rows is None:
            segments = torch.tensor(self.directory, dtype=torch.int64).to(device, non_blocking=True)
            heads, pages = (torch.arange(number, device=device) for number in (num_heads, SEGMENT_PAGES))
            first = segments.view(self.batch_size, 1, -1, 1) * num_heads + heads.view(1, -1, 1, 1)
            rows = self._rows[num_heads, device] = (first * SEGMENT_PAGES + pages).flatten(2)
        return rows

    def unshare(self, sequences: list[int], pages: range) -> None:
        """Copy segments of `pages` that `sequences` share with other sequences.

        Members of `sequences` that share a segment with one another share its copy.

        Raises:
            BudgetError, CapacityError: no room for the copies. Nothing has changed.
        """
        directory, refcounts, free = [list(row) for row in self.directory], list(self.refcounts), list(self.free)
        copies = []
        for index in segment_indices(pages.start, pages.stop):
            for source in dict.fromkeys(directory[row][index] for row in sequences):
                holders = [directory[row] for row in sequences if directory[row][index] == source]
                copies += own_segment(holders, index, refcounts, free, self.shared)
        if copies:
            self._prepare(copies, self._room_for(directory, refcounts, free))
            self._become(directory=directory, refcounts=refcounts, free=free)

    def own(self, pages: range) -> None:
        """Copy segments of `pages` that forks use too, for all sequences. Raises as `unshare`."""
        if not self.shared or not any(store.shares_rows for store in self.stores):
            return
        indices = segment_indices(pages.start, pages.stop)
        if not all(self.shared.owns(row[index]) for row in self.directory for index in indices):
            self.unshare(list(range(self.batch_size)), pages)

    def truncate(self, length: int, spans: ClusteredSpans | None = None) -> None:
        """Drop tokens from `length` on and release unused segments. `spans` replaces the spans, if given."""
        self._truncate(length, None, spans)

    def roll_back(self, length: int) -> None:
        """Drop tokens from `length` on and free their memory. Undoing the current step also undoes its copies."""
        if self.length != length:
            self._truncate(length, self._before if self.start == length else None, None)
        self.forget_last_free()
        self._shrink()

    def _truncate(self, length: int, tables: Tables | None, spans: ClusteredSpans | None) -> None:
        for store in self.stores:
            store.truncate(length)
        directory, refcounts, free = tables or (self.directory, list(self.refcounts), list(self.free))
        keep = segments_of(-(-length // self.page_size))
        if tables is None:
            for row in directory:
                release_segments(row[keep:], refcounts, free, self.shared)
            directory = [row[:keep] for row in directory] if length else []
        more = {"mask": self.mask.truncate(length), "spans": spans or self.spans, "start": length, "length": length}
        self._become(directory=directory, refcounts=refcounts, free=free, **more, prefix=length)

    def select(self, rows: list[int]) -> None:
        """Sequence i becomes the old sequence rows[i]. Segments are shared, not copied."""
        bad = [row for row in rows if not 0 <= row < self.batch_size]
        if bad:
            held = self.batch_size
            raise BatchSizeError(f"indices {bad} are outside the {held} sequences held; pass 0 to {held - 1}")
        for store in self.stores:
            store.check(len(rows), self.num_segments, self.num_pages)
        chosen = torch.tensor(rows, dtype=torch.int64)
        mask, spans = self.mask.selected(chosen), self.spans.selected(chosen)
        for store in self.stores:
            store.select(rows)
        directory, refcounts, free = [list(self.directory[row]) for row in rows], list(self.refcounts), list(self.free)
        for segment in chain.from_iterable(directory):
            refcounts[segment] += 1
        release_segments(list(chain.from_iterable(self.directory)), refcounts, free, self.shared)
        self._become(directory=directory, refcounts=refcounts, free=free, mask=mask, spans=spans, prefix=0)

    def clear(self) -> None:
        """Drop all sequences. The memory of their rows stays allocated."""
        number, mask = len(self.refcounts), TokenMask(self.mask.keeps_positions)
        free = [segment for segment in reversed(range(number)) if segment not in self.shared]
        tables: dict[str, Any] = {"directory": [], "refcounts": [0] * number, "free": free}
        self._become(**tables, mask=mask, spans=ClusteredSpans(), start=0, length=0, prefix=0)
        for store in self.stores:
            store.clear()
        self.settle_forks()

    def replace_padding(self, valid: Tensor | None, length: int) -> None:
        """Set the validity of the first `length` tokens to `valid` [B, >= length] (None: all valid)."""
        self.__dict__.update(mask=self.mask.replaced(valid, length), past_version=self.past_version + 1)

    def tables(self) -> dict[str, Any]:
        """Snapshot for `restore`: segments, padding, spans and lengths."""
        names = ("directory", "refcounts", "free", "mask", "spans", "start", "length")
        return {name: getattr(self, name) for name in names}

    def restore(self, tables: dict[str, Any]) -> None:
        """Restore a snapshot of `tables`. Idempotent."""
        for store in self.stores:
            store.forget_resident(len(tables["directory"]))
        self._become(**tables, prefix=0)

    def check_integrity(self) -> None:
        """Raise CacheStateError if directory, reference counts, free list and padding disagree."""
        self.check_segments(segments_of(self.num_pages))
        expected, clustered = (self.batch_size, self.length), self.spans.num_pages
        for name, table in (("padding mask", self.mask.valid), ("positions", self.mask.positions)):
            require_integrity(table is None or tuple(table.shape) == expected, f"{name} is not {expected}")
        require_integrity(clustered * self.page_size <= self.length, f"spans reach to page {clustered}")

    def set_spans(self, spans: ClusteredSpans) -> None:
        """Replace the spans. Segments and their memory stay as they are."""
        self.__dict__.update(spans=spans, past_version=self.past_version + 1, _before=None)

    def _become(self, prefix: int | None = None, **tables: Any) -> None:
        """Replace tables in one update. The first `prefix` tokens (None: all) stay unchanged."""
        if prefix is not None:
            self.past.change(prefix)
        known: dict[str, Any] = {"_rows": {}, "_counted": None, "_room": None, "_before": None}
        versions = {"past_version": self.past_version + 1, "memory_version": self.memory_version + 1}
        self.__dict__.update(known | versions, **tables)

    def _prepare(self, copies: list[tuple[int, int]], room: Room) -> None:
        """Reserve room and copy (source, copy) segments. On an error the added room is freed."""
        try:
            self._make_room(room)
            for store in self.stores if copies else ():
                store.copy_segments(copies)
        except BaseException:
            self._shrink()
            raise

    def _shrink(self) -> None:
        """Free the room that no segment needs. A step that was interrupted behind its reservation leaves such room."""
        self._room = None
        for store in self.stores:
            store.shrink(len(self.refcounts))

    def _make_room(self, room: Room) -> None:
        """Reserve room in all stores. No work if unchanged since the last step."""
        if room == self._room:
            return
        self.memory_version, self._room = self.memory_version + 1, None
        for store in self.stores:
            store.check(*room[:3])
        changed = [store.reserve(*room) for store in self.stores]
        self.memory_version -= not any(changed)
        self._room = room

    def fit(self) -> None:
        """Reserve again after the stores' budgets changed."""
        if self.directory:
            self._room = None
            self._make_room(self._room_for(self.directory, self.refcounts, self.free))

    def release(self) -> None:
        """Free the memory of all stores. The batch must be empty."""
        self._become()
        self.stop_sharing(refcounts=[], free=[])
        for store in self.stores:
            store.release()

    def forget_stores(self) -> None:
        """Drop all stores. The batch must be empty."""
        self.stores.clear()
        self.stop_sharing(refcounts=[], free=[])

    # ---------------------------------------------------------------------------------------------------------- forks

    def fork(self, memo: dict[int, Any]) -> PageTable:
        """A table of the same sequences that shares their segments until one side writes. Neither holds a current step.

        Args:
            memo: for `deepcopy` of what uses this table. Gets the new table and all that stores share with their forks.
        Returns:
            the new table, without stores. The caller attaches copies of the stores, made with `memo`.
        """
        self.settle_forks()
        self.shared.share(self.refcounts, max((store.capacity for store in self.stores), default=0))
        self.free = []  # forks may claim these segments too
        twin = memo[id(self)] = copy(self)
        twin.__dict__.update(stores=[], free=[], _rows=dict(self._rows), _room=None)
        twin.past, twin.spans, twin.shared = deepcopy(self.past), self.spans.copy(), self.shared.fork(self.refcounts)
        for store in self.stores:
            store.fork_rows(memo)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> PageTable:
        """A table that shares nothing with forks of this one."""
        twin = memo[id(self)] = object.__new__(PageTable)
        twin.__dict__.update(deepcopy({name: held for name, held in self.__dict__.items() if name != "shared"}, memo))
        twin.shared = SharedSegments()
        if self.shared:
            twin.free = [segment for segment, count in enumerate(twin.refcounts) if not count][::-1]
        return twin


def check_batch(held: int, batch_size: int) -> None:
    """Raise BatchSizeError if a batch has another size than the one held."""
    if held != batch_size:
        raise BatchSizeError(
            f"the cache holds {held} sequences, got a batch of {batch_size}; call cache.reset(), "
            "batch_select_indices(...) or batch_repeat_interleave(...), or use a new SpinCache"
        )
