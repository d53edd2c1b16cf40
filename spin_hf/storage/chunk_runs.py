"""Runs of chunks that are adjacent in memory, so that their rows are one view.

chunks   [ 0 1 2 3 ] [ 4 5 6 7 ]   [ 8 9 10 11 ]        the first two are one allocation
runs     [ 0 1 2 3     4 5 6 7 ]   [ 8 9 10 11 ]
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor


def runs_of(chunks: list[Tensor], joins: bool) -> list[tuple[int, Tensor]]:
    """The runs of chunks.

    Args:
        chunks: [rows, *row_shape] each, contiguous, of one shape and dtype.
        joins: whether adjacent chunks are one run; else each chunk is a run of its own.
    Returns:
        The first row of each run, and a view of its rows [n, *row_shape].
    """
    starts = [i for i in range(len(chunks)) if not (i and joins and _adjoin(chunks[i - 1], chunks[i]))]
    runs = []
    for start, stop in pairwise([*starts, len(chunks)]):
        first = chunks[start]
        shape = (stop - start) * len(first), *first.shape[1:]
        runs.append((start * len(first), first.as_strided(shape, first.stride())))
    return runs


def _adjoin(chunk: Tensor, other: Tensor) -> bool:
    """Whether `other` lies directly behind `chunk` in the same allocation."""
    adjacent = other.data_ptr() == chunk.data_ptr() + chunk.nbytes
    return adjacent and other.untyped_storage().data_ptr() == chunk.untyped_storage().data_ptr()
