"""The sequences of a batch: how long they are and which segments hold them. Shared by all layers of a cache.

    directory   sequence 0  [ 3 | 0 | 5 ]       a segment is `SEGMENT_PAGES` pages of every KV head, in every layer
                sequence 1  [ 3 | 0 | 6 ]       segments 3 and 0 are shared: a common past (beams, copies)
    refcounts   segment     0:2  3:2  5:1  6:1      free: 1 2 4

    page p of KV head h of sequence b  ->  row (directory[b][p // S] * H + h) * S + p % S,     S = SEGMENT_PAGES

This is the two-level page table of SPIN: a small directory per sequence, segments taken from a shared pool as it
grows. Pages of a segment are consecutive rows, so a page needs no pointer of its own. All full-attention layers of a
model grow in step and hold the same tokens, so they share one directory; each layer keeps its own rows.

Tables are never changed in place: others are made beside them and take their place at once (`_become`), so that an interruption
finds all of a change or nothing.

Shared segments are copied when one of their owners writes (`begin`). PageTable all have the same number of tokens,
padding included, as transformers' batches do.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import BatchSizeError, CacheStateError
from ..kernels.descriptor_fields import MAX_QUERIES
from .change_log import Past
from .clustered_spans import ClusteredSpans
from .padding_mask import TokenMask
from .segment_pool import ENTRY_BYTES, SEGMENT_PAGES, own_segment, release_segments, segments_of, take_segments

__all__ = ["ENTRY_BYTES", "SEGMENT_PAGES", "PageTable", "SegmentStore", "check_batch", "segments_of"]


_Tables = tuple[list[list[int]], list[int], list[int]]
"""Directory, reference counts, free segments."""


class SegmentStore(Protocol):
    """What a layer's storage does when sequences change."""

    length: int

    def check(self, batch_size: int, num_segments: int, num_pages: int) -> None:
        """Raise BudgetError or CapacityError where that would exceed a cap; changes nothing."""

    def reserve(self, batch_size: int, num_segments: int, num_pages: int) -> None:
        """Make room for what `check` allowed."""

    def shrink(self, num_segments: int) -> None:
        """Give back room for more segments than these, without asking for memory."""

    def copy_segments(self, pairs: list[tuple[int, int]]) -> None:
        """Copy rows of each (source, destination) segment."""

    def truncate(self, length: int) -> None:
        """Forget tokens from `length` on."""

    def select(self, rows: list[int]) -> None:
        """Sequence i becomes what sequence rows[i] was."""

    def forget_resident(self, batch_size: int) -> None:
        """Be as right for any past of a batch: whatever was loaded is loaded again."""

    def clear(self) -> None:
        """Forget all."""

    def release(self) -> None:
        """Give back all memory; nothing is held."""


class PageTable:
    """Lengths, directory, reference counts, padding and clustered pages of a batch.

    Args:
        page_size: tokens per page.
        keeps_positions: whether `positions` is asked for; it costs 8 bytes a token where there is padding.
    """

    def __init__(self, page_size: int, keeps_positions: bool = False) -> None:
        self.page_size = page_size
        self.directory: list[list[int]] = []
        self.refcounts: list[int] = []
        self.free: list[int] = []
        self.mask = TokenMask(keeps_positions)
        self.spans = ClusteredSpans()
        self.stores: list[SegmentStore] = []
        self.start = 0
        """Tokens held before the present step."""
        self.length = 0
        """Tokens held, the present step's included."""
        self.step = 0
        """The clock of the residency: counts queries, of prefills one."""
        self.past = Past()
        self.past_version = 0
        """Changes to the past: anything but tokens that follow."""
        self.memory_version = 0
        """Counts what may have moved or resized memory: new room, and changes to the past."""
        self._before: _Tables | None = None
        """Directory, reference counts and free segments before the present step, while it is the last change."""
        self.layout_version = 0
        """Counts stores whose pages took another form: kernels that were launched for the old one do not read the new one."""
        self._room: tuple[int, ...] | None = None
        """What room was last made for."""
        self._rows: dict[tuple[int, torch.device], Tensor] = {}
        self._counted: tuple[int, int, list[int]] | None = None
        """Events, tokens and pages with real tokens, when these were last counted."""

    @property
    def batch_size(self) -> int:
        """PageTable held."""
        return len(self.directory)

    @property
    def num_pages(self) -> int:
        """Pages of one KV head of one sequence, the last perhaps partly filled."""
        return -(-self.length // self.page_size)

    @property
    def segments_in_use(self) -> int:
        """Segments that some sequence refers to."""
        return len(self.refcounts) - len(self.free)

    @property
    def room(self) -> tuple[int, int, int]:
        """Batch size, segments in the pool, and pages per sequence that the segments have room for."""
        return self.batch_size, len(self.refcounts), len(self.directory[0]) * SEGMENT_PAGES if self.directory else 0

    @property
    def metadata(self) -> dict[str, int]:
        """Bytes of what all layers share, by name; of entries in lists, 8 each."""
        return {
            "directory": ENTRY_BYTES * sum(len(row) for row in self.directory),
            "reference counts": ENTRY_BYTES * len(self.refcounts),
            **self.mask.metadata,
            "spans": self.spans.grouped.nbytes,
        }

    def positions(self, first: int, stop: int, device: torch.device) -> Tensor:
        """Where tokens [first, stop) stood when they came, [B, stop - first], int64: real tokens before each; padding has any.

        Of sequences made with `keeps_positions`.
        """
        held = self.mask.positions
        if held is None:
            return torch.arange(first, stop, device=device).expand(self.batch_size, -1)
        return held[:, first:stop].to(device)

    def pages_held(self) -> list[int] | None:
        """Pages of each sequence that hold real tokens; None where nothing is padding. Reads the device, once for each past."""
        valid = self.mask.valid
        if valid is None or not self.length:
            return None
        if self._counted is None or self._counted[0] != self.past_version:
            filled = torch.nn.functional.pad(valid, (0, -valid.shape[1] % self.page_size)).unflatten(
                1, (-1, self.page_size)
            )
            self._counted = self.past_version, valid.shape[1], filled.any(2).sum(1).tolist()
        more = self.num_pages - -(-self._counted[1] // self.page_size)
        return [number + max(0, more) for number in self._counted[2]]

    def attach(self, store: SegmentStore) -> None:
        """Let `store` follow every change; it gets room for what is already held."""
        store.check(self.batch_size, len(self.refcounts), self.num_pages)
        store.reserve(*self.room)
        self.stores.append(store)
        self.memory_version += 1

    def begin(self, batch_size: int, num_tokens: int, new_valid: Tensor | None) -> None:
        """Start a step that appends `num_tokens` to every sequence: take segments, unshare those that will be written.

        Args:
            new_valid: [batch_size, num_tokens], bool, False for padding; None for all valid.
        Raises:
            BatchSizeError: the cache holds another number of sequences.
            CapacityError, BudgetError: from the stores; nothing has changed.
        """
        if self.length and batch_size != self.batch_size:
            raise BatchSizeError(
                f"expected {self.batch_size} sequences, got {batch_size}; begin with as many as are held"
            )
        length = self.length + num_tokens
        mask = self.mask.appended(batch_size, self.length, new_valid, num_tokens)
        before = self.directory, self.refcounts, self.free
        tables: dict[str, Any] = {}
        if not self._owns(self.length // self.page_size, -(-length // self.page_size)):
            tables = self._take(batch_size, self.length // self.page_size, -(-length // self.page_size))
        step = self.step + min(max(1, self.length - self.start), MAX_QUERIES)
        self.__dict__.update(tables, mask=mask, _before=before, step=step, start=self.length, length=length)

    def _owns(self, first: int, stop: int) -> bool:
        """Whether every sequence has the segments of pages [first, stop) to itself, with room made: most steps take none."""
        if self._room is None or self._room[0] != len(self.directory):
            return False
        indices = range(first // SEGMENT_PAGES, segments_of(stop))
        return all(index < len(row) and self.refcounts[row[index]] == 1 for row in self.directory for index in indices)

    def _take(self, batch_size: int, first: int, stop: int) -> dict[str, Any]:
        """Tables in which every sequence owns the segments of pages [first, stop): new ones, and copies of shared ones."""
        directory = [list(row) for row in self.directory] if self.length else [[] for _ in range(batch_size)]
        keeps = self.length or self.stores  # else no store has rows of the segments that a refused batch took
        refcounts, free = (list(self.refcounts), list(self.free)) if keeps else ([], [])
        copies = take_segments(directory, refcounts, free, first, stop)
        num_pages = len(directory[0]) * SEGMENT_PAGES  # of whole segments, so that layouts change seldom
        self._prepare(copies, batch_size, len(refcounts), num_pages)
        if (directory, refcounts) == (self.directory, self.refcounts):
            return {}
        return {"directory": directory, "refcounts": refcounts, "free": free, "_rows": {}}

    def check_room(self, length: int, num_tokens: int) -> None:
        """Raise BudgetError or CapacityError where `num_tokens` more than `length` would exceed a cap.

        An empty cache does not know its batch yet; see `admission.admit`.
        """
        if not length:
            return
        num_pages = -(-(length + num_tokens) // self.page_size)
        more = self.batch_size * max(0, segments_of(num_pages) - segments_of(-(-length // self.page_size)))
        num_segments = len(self.refcounts) + max(0, more - len(self.free))
        for store in self.stores:
            store.check(self.batch_size, num_segments, num_pages)

    def first_room(self, batch_size: int, num_tokens: int) -> tuple[int, int, int]:
        """Batch size, segments and pages per sequence once the first `num_tokens` of a batch have come."""
        num_pages = -(-num_tokens // self.page_size)
        held = len(self.refcounts) if self.stores else 0
        return batch_size, max(held, batch_size * segments_of(num_pages)), num_pages

    def page_rows(self, num_heads: int, device: torch.device) -> Tensor:
        """Row ids [B, num_heads, pages of all segments] of every page, int64; pages beyond `num_pages` are unused."""
        rows = self._rows.get((num_heads, device))
        if rows is None:
            segments = torch.tensor(self.directory, dtype=torch.int64).view(self.batch_size, 1, -1, 1)
            heads = torch.arange(num_heads).view(1, -1, 1, 1)
            rows = ((segments * num_heads + heads) * SEGMENT_PAGES + torch.arange(SEGMENT_PAGES)).flatten(2).to(device)
            self._rows[num_heads, device] = rows
        return rows

    def unshare(self, sequences: list[int], pages: range) -> None:
        """Give sequences their own copy of the segments of `pages`, where others share them.

        Those of `sequences` that hold the same segment go on sharing one.

        Raises:
            BudgetError, CapacityError: there is no room for copies; nothing has changed.
        """
        directory, refcounts, free = [list(row) for row in self.directory], list(self.refcounts), list(self.free)
        copies = []
        for index in range(pages.start // SEGMENT_PAGES, segments_of(pages.stop)):
            for source in dict.fromkeys(directory[row][index] for row in sequences):
                holders = [directory[row] for row in sequences if directory[row][index] == source]
                copies += own_segment(holders, index, refcounts, free)
        self._prepare(copies, self.batch_size, len(refcounts), self.num_pages)
        self._become(directory=directory, refcounts=refcounts, free=free)

    def truncate(self, length: int, spans: ClusteredSpans | None = None) -> None:
        """Forget the tokens from `length` on, and segments that none needs then; `spans` are left, all unless given."""
        self._truncate(length, None, spans)

    def roll_back(self, length: int) -> None:
        """Take back what came behind `length` tokens; of the present step also what it unshared, and the room it took."""
        if self.length != length:
            self._truncate(length, self._before if self.start == length else None, None)
        self._shrink()

    def _truncate(self, length: int, tables: _Tables | None, spans: ClusteredSpans | None) -> None:
        for store in self.stores:
            store.truncate(length)
        directory, refcounts, free = tables or (self.directory, list(self.refcounts), list(self.free))
        keep = segments_of(-(-length // self.page_size))
        if tables is None:
            for row in directory:
                release_segments(row[keep:], refcounts, free)
            directory = [row[:keep] for row in directory]
        more = {"mask": self.mask.truncate(length), "spans": spans or self.spans}
        self._become(
            directory=directory, refcounts=refcounts, free=free, **more, start=length, length=length, kept=length
        )

    def select(self, rows: list[int]) -> None:
        """Sequence i becomes what sequence rows[i] was: segments are shared, nothing is copied."""
        bad = [row for row in rows if not 0 <= row < self.batch_size]
        if bad:
            held = self.batch_size
            raise BatchSizeError(f"indices {bad} are outside the {held} sequences held; pass 0 to {held - 1}")
        for store in self.stores:
            store.check(len(rows), len(self.refcounts), self.num_pages)
        chosen = torch.tensor(rows, dtype=torch.int64)
        mask, spans = self.mask.selected(chosen), self.spans.selected(chosen)
        for store in self.stores:
            store.select(rows)
        directory, refcounts, free = [list(self.directory[row]) for row in rows], list(self.refcounts), list(self.free)
        for segment in chain.from_iterable(directory):
            refcounts[segment] += 1
        release_segments(list(chain.from_iterable(self.directory)), refcounts, free)
        self._become(directory=directory, refcounts=refcounts, free=free, mask=mask, spans=spans, kept=0)

    def clear(self) -> None:
        """Forget all sequences; the memory of their rows is kept for the next ones."""
        number, mask = len(self.refcounts), TokenMask(self.mask.keeps_positions)
        tables: dict[str, Any] = {"directory": [], "refcounts": [0] * number, "free": list(range(number))[::-1]}
        self._become(**tables, mask=mask, spans=ClusteredSpans(), start=0, length=0, kept=0)
        for store in self.stores:
            store.clear()

    def replace_padding(self, valid: Tensor | None, length: int) -> None:
        """Take `valid` [B, >= length] (None: all valid) as the validity of the first `length` tokens."""
        self.__dict__.update(mask=self.mask.replaced(valid, length), past_version=self.past_version + 1)

    def tables(self) -> dict[str, Any]:
        """What `restore` goes back to: whose segments are whose, padding, spans and lengths."""
        names = ("directory", "refcounts", "free", "mask", "spans", "start", "length")
        return {name: getattr(self, name) for name in names}

    def restore(self, tables: dict[str, Any]) -> None:
        """Go back to what `tables` gave. May be repeated."""
        for store in self.stores:
            store.forget_resident(len(tables["directory"]))
        self._become(**tables, kept=0)

    def check_integrity(self) -> None:
        """Raise CacheStateError where directory, reference counts, free list and padding disagree."""
        counts, needed = [0] * len(self.refcounts), segments_of(self.num_pages)
        for row in self.directory:
            _check(len(row) == needed, f"a sequence of {self.length} tokens has {len(row)} segments, expected {needed}")
            for segment in row:
                counts[segment] += 1
        _check(counts == self.refcounts, f"reference counts are {self.refcounts}, the directory gives {counts}")
        free, unused = sorted(self.free), [segment for segment, count in enumerate(counts) if not count]
        _check(free == unused, f"free segments are {free}, unused are {unused}")
        expected, clustered = (self.batch_size, self.length), self.spans.num_pages
        for name, table in (("padding mask", self.mask.valid), ("positions", self.mask.positions)):
            _check(table is None or tuple(table.shape) == expected, f"{name} is not {expected}")
        _check(clustered * self.page_size <= self.length, f"spans reach to page {clustered}")

    def set_spans(self, spans: ClusteredSpans) -> None:
        """Let `spans` say which pages are clustered."""
        self._become(spans=spans)

    def _become(self, kept: int | None = None, **tables: Any) -> None:
        """Let other tables take the place of those there are, all at once; `kept` tokens (None: all) are what they were."""
        if kept is not None:
            self.past.change(kept)
        known: dict[str, Any] = {"_rows": {}, "_counted": None, "_room": None, "_before": None}
        self.__dict__.update(
            known, past_version=self.past_version + 1, memory_version=self.memory_version + 1, **tables
        )

    def _prepare(self, copies: list[tuple[int, int]], *room: int) -> None:
        """Make room, and copies of (source, copy) segments; a failure leaves no more room than there was."""
        try:
            self._make_room(*room)
            for store in self.stores:
                store.copy_segments(copies)
        except BaseException:
            self._room = None
            self._shrink()
            raise

    def _shrink(self) -> None:
        for store in self.stores:
            store.shrink(len(self.refcounts))

    def _make_room(self, *room: int) -> None:
        """Let the stores take a batch size, segments and pages; most steps need what the step before needed."""
        if room == self._room:
            return
        self.memory_version, self._room = self.memory_version + 1, None
        for store in self.stores:
            store.check(*room)
        for store in self.stores:
            store.reserve(*room)
        self._room = room

    def fit(self) -> None:
        """Let the stores take what their budgets, which have changed, allow now."""
        if self.directory:
            self._room = None
            self._make_room(*self.room)

    def release(self) -> None:
        """Give back the memory that an empty batch's stores have kept."""
        self._become(refcounts=[], free=[])
        for store in self.stores:
            store.release()


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise CacheStateError(f"integrity: {message}; please report this as a bug")


def check_batch(held: int, batch_size: int) -> None:
    """Raise BatchSizeError where a batch is not the one that the cache holds."""
    if held != batch_size:
        raise BatchSizeError(
            f"the cache holds {held} sequences, got a batch of {batch_size}; call cache.reset(), "
            "batch_select_indices(...) or batch_repeat_interleave(...), or use a new SpinCache"
        )
