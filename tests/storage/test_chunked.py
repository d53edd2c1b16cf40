"""ChunkedArray: rows never move while it grows; reads and writes across chunks; copies are independent."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from spin_hf.storage.chunked import ChunkedArray


def filled(num_rows: int, rows_per_chunk: int = 4, row_shape: tuple[int, ...] = (3,)) -> ChunkedArray:
    array = ChunkedArray(row_shape, rows_per_chunk, torch.float32, torch.device("cpu"))
    array.grow(num_rows)
    array.put(torch.arange(num_rows), content(num_rows, row_shape))
    return array


def content(num_rows: int, row_shape: tuple[int, ...] = (3,)) -> torch.Tensor:
    size = torch.Size(row_shape).numel()
    return torch.arange(num_rows * size, dtype=torch.float32).view(num_rows, *row_shape)


def test_growing_moves_nothing() -> None:
    array = filled(6)
    addresses = [chunk.data_ptr() for chunk in array.chunks]
    view = array.chunks[0]
    for num_rows in (6, 3, 7, 9, 40):
        array.grow(num_rows)
        assert array.num_rows >= num_rows
        assert [chunk.data_ptr() for chunk in array.chunks[: len(addresses)]] == addresses
    assert torch.equal(array.take(torch.arange(6)), content(6))
    array.put(torch.tensor([2]), torch.full((1, 3), -1.0))
    assert bool((view[2] == -1).all())  # who holds the old chunk sees what is written now


def test_growing_takes_whole_chunks() -> None:
    array = ChunkedArray((2, 5), 4, torch.bfloat16, torch.device("cpu"))
    assert (array.num_rows, array.row_bytes) == (0, 20)
    for num_rows, expected in [(0, 0), (1, 4), (4, 4), (5, 8), (17, 20)]:
        array.grow(num_rows)
        assert array.num_rows == expected
        assert all(chunk.shape == (4, 2, 5) and chunk.dtype == torch.bfloat16 for chunk in array.chunks)


@pytest.mark.parametrize("row_shape", [(), (3,), (2, 2)])
def test_take_and_put_across_chunks(row_shape: tuple[int, ...]) -> None:
    array = filled(11, row_shape=row_shape)
    rows = torch.tensor([[10, 0, 4], [3, 7, 8]])
    assert torch.equal(array.take(rows), content(11, row_shape)[rows])
    array.put(rows, -content(11, row_shape)[rows])
    expected = content(11, row_shape)
    expected[rows] *= -1
    assert torch.equal(array.take(torch.arange(11)), expected)


def test_put_converts() -> None:
    array = ChunkedArray((1,), 2, torch.bfloat16, torch.device("cpu"))
    array.grow(2)
    array.put(torch.tensor([1]), torch.tensor([[1.5]], dtype=torch.float64))
    assert array.take(torch.tensor([1])).item() == 1.5


def test_deepcopy_is_independent() -> None:
    array = filled(6)
    twin = deepcopy(array)
    array.put(torch.arange(6), torch.zeros(6, 3))
    assert torch.equal(twin.take(torch.arange(6)), content(6))
    twin.grow(9)
    assert array.num_rows == 8
    assert {chunk.data_ptr() for chunk in twin.chunks}.isdisjoint(chunk.data_ptr() for chunk in array.chunks)


def test_moving_to_the_same_device_copies_nothing() -> None:
    array = filled(6)
    addresses = [chunk.data_ptr() for chunk in array.chunks]
    array.move(torch.device("cpu"))
    assert [chunk.data_ptr() for chunk in array.chunks] == addresses
