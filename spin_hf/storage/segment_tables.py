"""Directory, reference counts and free list of a page table, and the segments that it shares with forks.

    referenced    by a sequence of this table: its reference count is positive
    free          in the free list: only this table can see its rows
    neither       in `shared`, without a reference in this table: forks use it, or may claim it

Every segment of a pool is in one of these states. Its rows follow from its number.
"""

from __future__ import annotations

from typing import Any

from ..errors import require_integrity
from .segment_pool import SEGMENT_PAGES
from .segment_store import Room, SegmentStore
from .shared_segments import SharedSegments

Tables = tuple[list[list[int]], list[int], list[int]]
"""Directory, reference counts, free segments."""


class SegmentTables:
    """The segments of a page table. `page_table.py` draws them."""

    def __init__(self) -> None:
        self.directory: list[list[int]] = []
        self.refcounts: list[int] = []
        self.free: list[int] = []
        self.shared = SharedSegments()
        """Segments that forks may see."""
        self.stores: list[SegmentStore] = []
        self._before: Tables | None = None
        """Directory, reference counts and free segments before the current step; None after any other change."""

    @property
    def batch_size(self) -> int:
        """Number of sequences held."""
        return len(self.directory)

    @property
    def num_segments(self) -> int:
        """Segments in the pool, without those that only forks use."""
        return self.available(self.refcounts)

    @property
    def segments_in_use(self) -> int:
        """Segments referenced by at least one sequence."""
        return sum(count > 0 for count in self.refcounts)

    def available(self, refcounts: list[int]) -> int:
        """Segments in a pool with these reference counts, without those that only forks use."""
        return len(refcounts) - self.shared.unused(refcounts)

    def room_for(
        self, directory: list[list[int]], refcounts: list[int], free: list[int], expected: int
    ) -> Room:  # fmt: skip
        """The room that these tables need. Pages are whole segments, so that tables of pages seldom change size.

        Args:
            expected: segments that each sequence will have, if that is more than it has.
        """
        each = len(directory[0]) if directory else 0
        more = max(0, len(directory) * (expected - each) - len(free))
        num_pages = max(each, expected) * SEGMENT_PAGES if directory else 0
        return Room(len(directory), self.available(refcounts) + more, num_pages, len(refcounts), len(refcounts) + more)

    def forget_last_free(self) -> None:
        """Forget the free segments behind all others, so that their rows can be freed."""
        number = len(self.refcounts)
        while number and not self.refcounts[number - 1] and number - 1 not in self.shared:
            number -= 1
        if number < len(self.refcounts):
            free = [segment for segment in self.free if segment < number]
            self.__dict__.update(refcounts=self.refcounts[:number], free=free)

    def settle_forks(self) -> None:
        """Stop holding segments that this table no longer references, and free those that no fork can see any more.

        Idempotent. Must not be called while an earlier state of the tables may be restored: forks may overwrite its segments.
        """
        if not self.shared:
            return
        self._before = None
        gone = self.shared.publish(self.refcounts)
        if not any(store.shares_rows for store in self.stores):
            gone = list(self.shared)
        if not gone:
            return
        left = set(self.shared).difference(gone)
        free = [segment for segment, count in enumerate(self.refcounts) if not count and segment not in left]
        if left:
            self.free = free[::-1]
            self.shared.forget(gone)
        else:
            self.stop_sharing(free=free[::-1])

    def stop_sharing(self, **tables: Any) -> None:
        """Replace tables, and stop sharing segments. For a cache that has rows of its own, or none."""
        before = self.shared
        self.__dict__.update(tables, shared=SharedSegments())
        before.leave()

    def check_segments(self, each: int) -> None:
        """Raise CacheStateError if directory, reference counts and free list disagree.

        Args:
            each: segments that every sequence must have.
        """
        counts = [0] * len(self.refcounts)
        for row in self.directory:
            require_integrity(len(row) == each, f"a sequence has {len(row)} segments, expected {each}")
            for segment in row:
                counts[segment] += 1
        require_integrity(
            counts == self.refcounts, f"reference counts are {self.refcounts}, the directory gives {counts}"
        )
        unused = [segment for segment, count in enumerate(counts) if not count]
        known = sorted({*self.free, *(segment for segment in unused if segment in self.shared)})
        require_integrity(
            known == unused and len(self.free) == len(set(self.free)),
            f"free segments are {sorted(self.free)}, unused are {unused}",
        )
        self.shared.check_integrity(self.refcounts)
