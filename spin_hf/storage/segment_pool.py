"""Segment pool: allocate, copy on write and release segments. Lists are changed in place.

    directory   sequence 0  [ 3 | 0 | 5 ]       refcounts   segment     0:2  3:2  5:1  6:1       free: 1 2 4
                sequence 1  [ 3 | 0 | 6 ]

`page_table.py` explains these tables. It passes copies of its lists and commits them once all memory is allocated. Reference
counts are those of one page table. Its free list contains no segments that forks may see (`shared_segments.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from .shared_segments import SharedSegments

SEGMENT_PAGES = 32
"""Pages of a segment, per KV head."""
ENTRY_BYTES = 8
"""Bytes of an entry of the directory and of the reference counts."""


def segments_of(num_pages: int) -> int:
    """Segments that `num_pages` pages of a sequence need."""
    return -(-num_pages // SEGMENT_PAGES)


def segment_indices(first_page: int, stop_page: int) -> range:
    """Indices into a row of the directory: the segments that contain pages [first_page, stop_page)."""
    return range(first_page // SEGMENT_PAGES, segments_of(stop_page))


def consecutive(segments: list[int]) -> Iterator[tuple[int, int]]:
    """Runs [first, stop) of consecutive numbers in a list of segments."""
    first = 0
    for last, segment in enumerate(segments, 1):
        if last == len(segments) or segments[last] != segment + 1:
            yield segments[first], segment + 1
            first = last


def take_segments(
    directory: list[list[int]],
    refcounts: list[int],
    free: list[int],
    shared: SharedSegments,
    first_page: int,
    num_pages: int,
) -> list[tuple[int, int]]:
    """Extend every sequence to `num_pages` and unshare the segment of `first_page`. Returns (source, copy) pairs."""
    copies: list[tuple[int, int]] = []
    for row in directory:
        if first_page // SEGMENT_PAGES < len(row):
            copies += own_segment([row], first_page // SEGMENT_PAGES, refcounts, free, shared)
        while len(row) * SEGMENT_PAGES < num_pages:
            row.append(_new_segment(refcounts, free, shared))
    return copies


def own_segment(
    holders: list[list[int]], index: int, refcounts: list[int], free: list[int], shared: SharedSegments
) -> list[tuple[int, int]]:
    """Replace a segment shared outside `holders`, or with a fork, by a new one in all of `holders`.

    Returns:
        the (source, copy) pair, if any.
    """
    source = holders[0][index]
    if refcounts[source] == len(holders) and shared.owns(source):
        return []
    copy = _new_segment(refcounts, free, shared)
    refcounts[source] -= len(holders)
    shared.is_behind |= source in shared
    refcounts[copy] = len(holders)
    for row in holders:
        row[index] = copy
    return [(source, copy)]


def release_segments(segments: list[int], refcounts: list[int], free: list[int], shared: SharedSegments) -> None:
    """Drop one reference to each segment. Unreferenced segments become free, except those that forks may see."""
    for segment in segments:
        refcounts[segment] -= 1
        if segment in shared:
            shared.is_behind = True
        elif not refcounts[segment]:
            free.append(segment)


def _new_segment(refcounts: list[int], free: list[int], shared: SharedSegments) -> int:
    """A segment with one reference: a free one, else one that no fork uses any more, else one behind all rows."""
    segment = free.pop() if free else shared.claim(refcounts)
    if segment is None:
        segment = max(len(refcounts), len(shared))  # behind the chunks that forks see
    refcounts += [0] * (segment + 1 - len(refcounts))
    refcounts[segment] = 1
    return segment


def pages_of(tokens: int, page_size: int) -> int:
    """Most pages that `tokens` consecutive tokens can span."""
    return math.ceil(tokens / page_size) + 1 if tokens else 0
