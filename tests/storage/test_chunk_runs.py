"""Chunks that are adjacent in one allocation are read as one view; copies of blocks of rows."""

from __future__ import annotations

import torch

from spin_hf.storage.chunk_runs import runs_of
from spin_hf.storage.chunked_array import ChunkedArray
from tests.support.chunked_arrays import content, filled


def test_adjacent_chunks_are_one_run() -> None:
    slab, other = torch.arange(24).view(3, 4, 2), torch.arange(100, 108).view(4, 2)
    chunks = [slab[0], slab[1], other, slab[2]]
    runs = runs_of(chunks, joins=True)
    assert [(first, len(rows)) for first, rows in runs] == [(0, 8), (8, 4), (12, 4)]
    assert torch.equal(torch.cat([rows for _, rows in runs]), torch.cat(chunks))
    runs[0][1].fill_(-1)
    assert bool((slab[:2] == -1).all())
    assert not bool((slab[2] == -1).any())
    assert [(first, len(rows)) for first, rows in runs_of(chunks, joins=False)] == [(0, 4), (4, 4), (8, 4), (12, 4)]
    assert runs_of([], joins=True) == []


def test_different_allocations_that_touch_are_not_joined() -> None:
    memory = bytearray(64)
    halves = [torch.frombuffer(memory, dtype=torch.uint8, offset=32 * i, count=32).view(4, 8) for i in range(2)]
    assert halves[1].data_ptr() == halves[0].data_ptr() + 32
    assert [first for first, _ in runs_of(halves, joins=True)] == [0, 4]


def test_views_follow_the_chunks() -> None:
    """Of an array that grows, shrinks, is forked, moves and is released."""
    array = ChunkedArray((2,), 4, torch.float32, torch.device("cpu"))
    slab = torch.arange(24.0).view(3, 4, 2)
    array.chunks, array.used_rows = list(slab), 12
    assert [len(rows) for rows in array.views(1, 11)] == [10]
    assert torch.equal(next(array.views(1, 11)), slab.flatten(0, 1)[1:11])
    array.grow(16)
    assert [len(rows) for rows in array.views(1, 16)] == [11, 4]
    fork = array.fork()
    array.shrink(8)
    assert [len(rows) for rows in array.views(0, 8)] == [8]
    assert [len(rows) for rows in fork.views(0, 16)] == [12, 4]
    array.unshare()
    assert torch.equal(torch.cat(list(array.views(0, 8))), slab[:2].flatten(0, 1))
    assert next(array.views(0, 1)).data_ptr() != slab.data_ptr()
    array.release()
    assert list(array.views(0, 0)) == []


def test_blocks_are_copied() -> None:
    array = filled(6)
    size = array.rows_per_chunk // 2
    array.grow(5 * size)
    array.copy_blocks([(0, 3), (1, 4)], size)
    rows = torch.arange(2 * size)
    assert torch.equal(array.take(rows + 3 * size), content(2 * size))
    assert torch.equal(array.take(rows), content(2 * size))
