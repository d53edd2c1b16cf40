"""Chunks as views of slabs: numbers, rows and addresses; and copies of blocks of rows."""

from __future__ import annotations

import pytest
import torch

from spin_hf.storage.chunk_list import ChunkList, addresses_of
from spin_hf.storage.chunked_array import ChunkedArray
from tests.support.chunked_arrays import content, filled

SLABS = [torch.arange(24).view(3, 4, 2), torch.arange(100, 108).view(1, 4, 2), torch.arange(200, 216).view(2, 4, 2)]


def test_chunks_are_views_of_slabs() -> None:
    chunks = ChunkList(SLABS)
    expected = [chunk for slab in SLABS for chunk in slab]
    assert len(chunks) == len(expected) == 6
    for number, chunk in enumerate(expected):
        assert torch.equal(chunks[number], chunk)
        assert chunks[number].data_ptr() == chunk.data_ptr() == int(chunks.addresses()[number])
        assert torch.equal(chunks[number - 6], chunk)
    assert all(torch.equal(one, other) for one, other in zip(chunks, expected, strict=True))
    for outside in (6, -7):
        with pytest.raises(IndexError):
            chunks[outside]


@pytest.mark.parametrize(
    ("first", "stop", "lengths"), [(0, 24, [12, 4, 8]), (5, 7, [2]), (11, 17, [1, 4, 1]), (3, 3, [])]
)
def test_rows_are_a_view_of_each_slab(first: int, stop: int, lengths: list[int]) -> None:
    rows = list(ChunkList(SLABS).rows(first, stop))
    assert [len(each) for each in rows] == lengths
    whole = torch.cat([slab.flatten(0, 1) for slab in SLABS])
    assert torch.equal(torch.cat([*rows, whole[:0]]), whole[first:stop])


@pytest.mark.parametrize("count", range(7))
def test_fewer_and_more_chunks(count: int) -> None:
    chunks = ChunkList(SLABS)
    fewer = chunks.first(count)
    assert len(fewer) == count
    assert fewer.addresses().tolist() == chunks.addresses().tolist()[:count]
    again = fewer.extended([SLABS[0][:2]])
    assert len(again) == count + 2
    assert len(fewer) == count
    assert again.addresses().tolist() == [*chunks.addresses().tolist()[:count], *chunks.addresses().tolist()[:2]]


def test_no_chunks() -> None:
    chunks = ChunkList()
    assert len(chunks) == 0
    assert list(chunks) == list(chunks.rows(0, 0)) == chunks.addresses().tolist() == []


def test_slabs_end_with_their_last_chunk() -> None:
    """Of an array that is cut, forked, and copied."""
    array = ChunkedArray((2,), 4, torch.float32, torch.device("cpu"))
    array.chunks, array.used_rows = ChunkList([torch.arange(24.0).view(3, 4, 2)]), 12
    twin, fork = array.__deepcopy__({}), array.fork()
    assert torch.equal(torch.cat(list(twin.views(0, 12))), torch.arange(24.0).view(12, 2))
    array.grow(16)
    assert [len(rows) for rows in array.views(1, 16)] == [11, 4]
    assert len(fork.chunks) == 3
    array.shrink(8)
    assert [len(rows) for rows in array.views(0, 8)] == [8]
    array.unshare()
    assert torch.equal(torch.cat(list(array.views(0, 8))), torch.arange(16.0).view(8, 2))
    assert array.chunks[0].data_ptr() != fork.chunks[0].data_ptr()


def test_blocks_are_copied() -> None:
    array = filled(6)
    size = array.rows_per_chunk // 2
    array.grow(5 * size)
    array.copy_blocks([(0, 3), (1, 4)], size)
    rows = torch.arange(2 * size)
    assert torch.equal(array.take(rows + 3 * size), content(2 * size))
    assert torch.equal(array.take(rows), content(2 * size))


@pytest.mark.parametrize("slabs", [[1, 1], [1], [2], [0, 0], [0, 1], [1, 2]])
@pytest.mark.parametrize("same", [False, True])
def test_addresses_of_several_lists(slabs: list[int], same: bool) -> None:
    """Lists of one slab and as many chunks take another way."""
    held = [torch.zeros(2, 4, 2, dtype=torch.int8), torch.zeros(2 if same else 3, 4, 5)]
    lists = [ChunkList([each] * count) for each, count in zip(held, slabs, strict=False)]
    most = max(map(len, lists))
    expected = [[*each.addresses().tolist(), *[0] * (most - len(each))] for each in lists]
    made = addresses_of(lists)
    assert made.dtype == torch.int64
    assert made.tolist() == expected
