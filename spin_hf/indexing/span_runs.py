"""Runs of pages that are clustered together, and the spans that they lie in. Numbers only, no pages are touched.

may move  . x x x x . . x x x x x x x x .     pages of a sequence
units       |       |       |       |         a method with units of 4 pages moves whole units only
runs                    |_________|           clustered once for all sequences that share these pages
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..storage.segment_pool import SEGMENT_PAGES, segment_indices

Pages = list[tuple[int, int]]
"""[first, stop) ranges of pages."""


class Run(NamedTuple):
    """Pages [first, stop), clustered once for all `sequences`, which share them."""

    sequences: list[int]
    first: int
    stop: int


def waits_a_step(start: int, length: int, page_size: int) -> bool:
    """Whether a step of one token leaves it to the next one to cluster generated tokens: it begins a segment of pages.

    Both take time. The step behind a prompt does not wait, as it would summarise the prompt twice. Depends on lengths alone,
    so all ranks and forks do the same.

    Args:
        start, length: tokens held before and behind the last step.
    """
    return length - start == 1 and length % (SEGMENT_PAGES * page_size) == 0


def in_whole_units(may_move: Tensor, unit_pages: int) -> Tensor:
    """`may_move` [B, N], bool, without units of which a page must not move."""
    if unit_pages == 1:
        return may_move
    left = may_move.shape[1] % unit_pages
    units = may_move[:, : may_move.shape[1] - left].unflatten(1, (-1, unit_pages)).all(2)
    return torch.nn.functional.pad(units.repeat_interleave(unit_pages, 1), (0, left))


def cut(may_move: list[bool], most: int, unit_pages: int = 1) -> list[int]:
    """Cut pages into equal spans of at most `most` pages. Returns the page behind each span.

    The first span also covers the leading pages that must not move. A remainder of fewer units than spans is left for later.
    """
    lead = may_move.index(True) if True in may_move else 0
    units = (len(may_move) - lead) // unit_pages
    count = -(-units // max(1, most // unit_pages))
    each = units // count * unit_pages
    return [lead + each * (number + 1) for number in range(count)]


def movable_runs(may_move: list[bool]) -> Pages:
    """[first, stop) of each run of two or more pages that may move."""
    runs, start = [], 0
    for page, moves in enumerate([*may_move, False]):
        if not moves:
            if page - start > 1:
                runs.append((start, page))
            start = page + 1
    return runs


def runs_of(directory: list[list[int]], clustered: Tensor, first: int, stop: int) -> list[Run]:
    """Runs of a span [first, stop), each once for all sequences that share it. `clustered` [B, >= stop]: pages that move."""
    pages = [movable_runs(row) for row in clustered[:, first:stop].tolist()]
    groups = group_equal(directory, segment_indices(first, stop), [tuple(held) for held in pages])
    return [Run(rows, first + start, first + end) for rows in groups for start, end in pages[rows[0]]]


def group_equal(directory: list[list[int]], segments: range, labels: Sequence[Hashable]) -> list[list[int]]:
    """Group the sequences that share `segments` and have equal labels."""
    groups: dict[Hashable, list[int]] = {}
    for row, held in enumerate(directory):
        groups.setdefault((tuple(held[index] for index in segments), labels[row]), []).append(row)
    return list(groups.values())


def by_length(runs: list[Run], most_pages: int) -> Iterator[list[Run]]:
    """Batches of runs of equal length, of at most `most_pages` pages or a single run."""
    lengths: dict[int, list[Run]] = {}
    for run in runs:
        lengths.setdefault(run.stop - run.first, []).append(run)
    for length, alike in lengths.items():
        at_once = max(1, most_pages // length)
        yield from (alike[start : start + at_once] for start in range(0, len(alike), at_once))
