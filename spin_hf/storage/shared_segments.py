"""Segments whose memory several caches can see: a cache and its forks.

    chunk            segment   0    1    2    3    4          seen by tables A and B (`members`)
    referenced by    A         x    x         x               `holders` of 0: A, B      1: A      2: B      3: A      4: none
                     B         x         x

A table writes only to segments that it holds alone. It copies the others first. A segment that nobody holds goes to the table
that claims it first, so memory that one side has left serves the others.

A table that has stopped using a segment is a holder until `publish`. Others then copy more than they must, and never less. A
table that is freed leaves all its segments. All updates are idempotent, so they may be interrupted.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import require_integrity

_lock = threading.Lock()
"""Held while a free segment is claimed. Finalizers do not take it: they only remove."""


class _Share:
    """One segment.

    Attributes:
        members: tables whose chunks contain the segment.
        holders: tables that reference it.
    """

    __slots__ = ("holders", "members")

    def __init__(self, members: set[object], holders: set[object]) -> None:
        self.members, self.holders = members, holders


class SharedSegments:
    """The segments of one page table that forks may see. Empty without forks. They are the lowest ids of the table."""

    def __init__(self) -> None:
        self._table = object()
        self._shares: dict[int, _Share] = {}
        self._finalizer: Any = None
        self.is_behind = False
        """Whether segments may have been dropped since the last `publish`."""

    def __len__(self) -> int:
        return len(self._shares)

    def __contains__(self, segment: object) -> bool:
        return segment in self._shares

    def __iter__(self) -> Iterator[int]:
        return iter(self._shares)

    def owns(self, segment: int) -> bool:
        """Whether no other table holds a segment of this table."""
        share = self._shares.get(segment)
        return share is None or share.holders <= {self._table}

    def unused(self, refcounts: Sequence[int]) -> int:
        """Number of shared segments that this table does not reference, of those in `refcounts`."""
        return sum(segment < len(refcounts) and not refcounts[segment] for segment in self._shares)

    def claim(self, refcounts: Sequence[int]) -> int | None:
        """Take a segment that no table references; None if there is none."""
        for segment, share in self._shares.items():
            if (segment >= len(refcounts) or not refcounts[segment]) and share.holders <= {self._table}:
                with _lock:
                    if share.holders <= {self._table}:
                        share.holders.add(self._table)
                        self.is_behind = True  # unless the caller's tables are swapped in
                        return segment
        return None

    def share(self, refcounts: Sequence[int], capacity: int) -> None:
        """Make all segments below `capacity` ready to be seen by forks."""
        self._watch()
        members: set[object] = {self._table}
        for segment in range(capacity):
            holds = segment < len(refcounts) and refcounts[segment]
            share = self._shares.setdefault(segment, _Share(members, set()))
            if holds:
                share.holders.add(self._table)

    def fork(self, refcounts: Sequence[int]) -> SharedSegments:
        """The shared segments of a new table that sees the same chunks and references the same segments."""
        twin = SharedSegments()
        twin._shares = dict(self._shares)
        twin._watch()
        for segment, share in twin._shares.items():
            share.members.add(twin._table)
            if segment < len(refcounts) and refcounts[segment]:
                share.holders.add(twin._table)
        return twin

    def publish(self, refcounts: Sequence[int]) -> list[int]:
        """Stop holding segments that are not referenced. Returns the segments that only this table can see, for `forget`."""
        alone, gone = {self._table}, []
        for segment, share in self._shares.items():
            if segment >= len(refcounts) or not refcounts[segment]:
                share.holders.discard(self._table)
            if share.members == alone:
                gone.append(segment)
        self.is_behind = False
        return gone

    def forget(self, segments: list[int]) -> None:
        """Treat these segments as any other of the table from now on."""
        for segment in reversed(segments):  # so that the others stay the lowest ids if this is interrupted
            self._shares.pop(segment, None)

    def leave(self) -> None:
        """Stop sharing: the table no longer sees the chunks, or has copied them."""
        _leave(self._table, self._shares)

    def check_integrity(self, refcounts: Sequence[int]) -> None:
        """Raise CacheStateError if a referenced segment is not held, or holders are not members."""
        for segment, share in self._shares.items():
            holds = segment < len(refcounts) and refcounts[segment] > 0
            # An interrupted `publish` may have left a segment that only this table sees.
            require_integrity(
                not holds or self._table in share.holders or share.members == {self._table},
                f"segment {segment} is referenced and not held",
            )
            require_integrity(share.holders <= share.members, f"a table holds segment {segment} and cannot see it")
            require_integrity(self._table in share.members, f"segment {segment} is shared by others only")

    def _watch(self) -> None:
        if self._finalizer is None:
            self._finalizer = weakref.finalize(self, _leave, self._table, self._shares)
            self._finalizer.atexit = False


def _leave(table: object, shares: dict[int, _Share]) -> None:
    for share in list(shares.values()):
        share.holders.discard(table)
        share.members.discard(table)
    shares.clear()
