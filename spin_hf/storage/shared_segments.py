"""Segments whose memory several caches can see: a cache and its forks.

    chunk            segment   0    1    2    3    4          seen by tables A and B (`members`)
    referenced by    A         x    x         x               `holders` of 0: A, B      1: A      2: B      3: A      4: none
                     B         x         x

A table writes only to segments that no other table holds. It copies the others first. A segment without holders goes to the
table that claims it first. So tables reuse memory that other tables no longer need.

A table that drops its last reference to a segment stays a holder until `publish`. Until then other tables may copy the segment
without need, which is safe. A table that is freed leaves all its segments. All updates are idempotent, so they may be
interrupted.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import require_integrity

_lock = threading.Lock()
"""Held while a free segment is claimed. Finalizers do not take it: they only remove."""


@dataclass(eq=False, slots=True)
class _Share:
    """One segment.

    Attributes:
        members: tables whose chunks contain the segment. Segments that are shared by the same call of `share` have one set.
        holders: tables that reference it.
    """

    members: set[object]
    holders: set[object]


class SharedSegments:
    """The segments of one page table that forks may see. Empty without forks. They are the lowest ids of the table."""

    def __init__(self) -> None:
        self._table = object()
        self._alone = frozenset({self._table})
        self._shares: dict[int, _Share] = {}
        weakref.finalize(self, _leave, self._table, self._shares).atexit = False
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
        return share is None or share.holders <= self._alone

    def unused(self, refcounts: Sequence[int]) -> int:
        """Number of shared segments that this table does not reference, of those in `refcounts`."""
        return sum(segment < len(refcounts) and not refcounts[segment] for segment in self._shares)

    def claim(self, refcounts: Sequence[int]) -> int | None:
        """Take a segment that no table references; None if there is none."""
        referenced = _referenced(refcounts)
        for segment, share in self._shares.items():
            if segment not in referenced and share.holders <= self._alone:
                with _lock:
                    if share.holders <= self._alone:
                        share.holders.add(self._table)
                        self.is_behind = True  # unless the caller's tables are swapped in
                        return segment
        return None

    def share(self, refcounts: Sequence[int], capacity: int) -> None:
        """Make all segments below `capacity` ready to be seen by forks."""
        shares, table, referenced = self._shares, self._table, _referenced(refcounts)
        members: set[object] = {table}
        for segment in range(capacity):
            share = shares.get(segment)
            if share is None:
                share = shares[segment] = _Share(members, set())
            if segment in referenced:
                share.holders.add(table)

    def fork(self, refcounts: Sequence[int]) -> SharedSegments:
        """The shared segments of a new table that sees the same chunks and references the same segments."""
        twin = SharedSegments()
        shares, table, referenced = twin._shares, twin._table, _referenced(refcounts)
        shares.update(self._shares)
        for segment, share in shares.items():
            share.members.add(table)
            if segment in referenced:
                share.holders.add(table)
        return twin

    def publish(self, refcounts: Sequence[int]) -> list[int]:
        """Stop holding segments that are not referenced. Returns the segments that only this table can see, for `forget`."""
        gone, referenced = [], _referenced(refcounts)
        for segment, share in self._shares.items():
            if segment not in referenced:
                share.holders.discard(self._table)
            if len(share.members) == 1:
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
        referenced = _referenced(refcounts)
        for segment, share in self._shares.items():
            # An interrupted `settle_forks` may have left a segment that only this table sees.
            is_held = self._table in share.holders or share.members == self._alone
            require_integrity(is_held or segment not in referenced, f"segment {segment} is referenced and not held")
            require_integrity(share.holders <= share.members, f"a table holds segment {segment} and cannot see it")
            require_integrity(self._table in share.members, f"segment {segment} is shared by others only")


def _referenced(refcounts: Sequence[int]) -> set[int]:
    """The segments that the table with these reference counts uses."""
    return {segment for segment, count in enumerate(refcounts) if count > 0}


def _leave(table: object, shares: dict[int, _Share]) -> None:
    for share in list(shares.values()):
        share.holders.discard(table)
        share.members.discard(table)
    shares.clear()
