"""ChunkedArray: rows never move while it grows; reads and writes across chunks; copies are independent.

With a CUDA compute device its CPU chunks are registered. A fake registrar replaces the driver there.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from spin_hf.errors import CapacityError
from spin_hf.storage.chunked_array import MAX_CHUNKS, ChunkedArray, make_tables
from spin_hf.storage.page_layout import Conversion
from tests.support.chunked_arrays import CPU, CUDA, Reserve, content, filled, registered
from tests.support.fake_registrar import FakeRegistrar


def test_growing_moves_nothing() -> None:
    array = filled(6)
    addresses = [chunk.data_ptr() for chunk in array.chunks]
    view = array.chunks[0]
    for num_rows in (6, 3, 7, 9, 40):
        array.grow(num_rows)
        assert array.num_rows >= num_rows
        assert [chunk.data_ptr() for chunk in array.chunks][: len(addresses)] == addresses
    assert torch.equal(array.take(torch.arange(6)), content(6))
    array.put(torch.tensor([2]), torch.full((1, 3), -1.0))
    assert bool((view[2] == -1).all())  # who holds the old chunk sees what is written now


def test_growing_takes_whole_chunks() -> None:
    array = ChunkedArray((2, 5), 4, torch.bfloat16, torch.device("cpu"))
    assert (array.num_rows, array.row_bytes) == (0, 20)
    for num_rows, expected in [(0, 0), (1, 4), (4, 4), (5, 8), (17, 20)]:
        before = array.num_rows
        assert array.grow(num_rows) == (expected > before)
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


def test_growing_by_nothing_is_nothing() -> None:
    array = filled(6)
    array.grow(-1)
    array.grow(0)
    assert (array.num_rows, array.used_rows) == (8, 6)


# ------------------------------------------------------------------------------------------------ the address table


def addresses(array: ChunkedArray) -> list[int]:
    return [chunk.data_ptr() for chunk in array.chunks] + [0] * (MAX_CHUNKS - len(array.chunks))


@pytest.mark.parametrize("first_rows", [0, 1, 9])
def test_address_table_follows_growth_in_place(first_rows: int) -> None:
    array = ChunkedArray((3,), 4, torch.float32, CPU)
    array.grow(first_rows)
    table = array.address_table
    assert (table.dtype, table.device, table.shape) == (torch.int64, CPU, (MAX_CHUNKS,))
    place = table.data_ptr()
    for num_rows in (first_rows, 10, 11, 30, 200):
        array.grow(num_rows)
        assert array.address_table is table
        assert table.data_ptr() == place
        assert table.tolist() == addresses(array)


def test_address_table_follows_a_move_in_place() -> None:
    array = filled(10)
    table, before = array.address_table, addresses(array)
    array.device = torch.device("meta")  # so that the chunks count as being elsewhere
    array.move(CPU)
    assert array.device == CPU
    assert array.address_table is table
    assert table.tolist() == addresses(array)
    assert not set(before[:3]) & set(table[:3].tolist())
    assert torch.equal(array.take(torch.arange(10)), content(10))


def test_deepcopy_has_a_table_of_its_own() -> None:
    array = filled(6)
    table = array.address_table
    twin = deepcopy(array)
    assert twin.address_table is not table
    assert twin.address_table.tolist() == addresses(twin)
    twin.grow(30)
    assert table.tolist() == addresses(array)


def test_address_tables_of_several_arrays() -> None:
    """Those that an array has already stay as they are; the others follow growth in place."""
    arrays = [ChunkedArray((3,), 4, torch.float32, CPU) for _ in range(4)]
    for array, rows in zip(arrays, (9, 0, 30, 5), strict=True):
        array.grow(rows)
    held = arrays[3].address_table
    make_tables(arrays)
    tables = [array.address_table for array in arrays]
    assert tables[3] is held
    for array in arrays:
        array.grow(41)
    for array, table in zip(arrays, tables, strict=True):
        assert array.address_table is table
        assert table.tolist() == addresses(array)
    make_tables(arrays)
    assert all(array.address_table is table for array, table in zip(arrays, tables, strict=True))


def test_more_chunks_than_the_table_has() -> None:
    array = filled(6)
    table, before = array.address_table, addresses(array)
    with pytest.raises(CapacityError, match="shorten the context"):
        array.grow(4 * MAX_CHUNKS + 1)
    assert (array.num_rows, array.used_rows, addresses(array)) == (8, 6, before)
    assert table.tolist() == before
    array.grow(4 * MAX_CHUNKS)
    assert len(array.chunks) == MAX_CHUNKS
    assert 0 not in table.tolist()


# ------------------------------------------------------------------------------- CPU chunks of a CUDA compute device


def test_chunks_are_registered_at_once(registrar: FakeRegistrar, reserve: Reserve) -> None:
    array = registered(9)  # 3 of the last 4 rows are left: too early for a spare
    assert len(registrar.registered) == 1
    assert len(array.chunks) == 3
    assert all(registrar.has(chunk) for chunk in array.chunks)
    assert torch.equal(array.take(torch.arange(9)), content(9))
    assert reserve.requests == 0
    del array
    assert not registrar.registered


def test_ordinary_arrays_are_not_registered(registrar: FakeRegistrar, reserve: Reserve) -> None:
    array = filled(12)
    array.move(CPU)
    deepcopy(array)
    assert not registrar.registered
    assert reserve.requests == 0


def test_refusal_changes_nothing(registrar: FakeRegistrar, reserve: Reserve) -> None:
    array = registered(5)
    before = [chunk.data_ptr() for chunk in array.chunks]
    registrar.refuses = True
    with pytest.raises(CapacityError, match="refused"):
        array.grow(100)
    assert [chunk.data_ptr() for chunk in array.chunks] == before
    assert array.used_rows == 5
    assert torch.equal(array.take(torch.arange(5)), content(5))


def elsewhere(num_rows: int) -> ChunkedArray:
    """An array that believes to be on a GPU."""
    array = filled(num_rows)
    array.address_table  # noqa: B018  (made while the compute device is one that exists here)
    array.device = array.compute_device = CUDA
    return array


def test_moving_from_the_gpu_registers(registrar: FakeRegistrar, reserve: Reserve) -> None:
    array = elsewhere(10)
    table = array.address_table
    array.move(CPU)
    assert (array.device, array.compute_device) == (CPU, CUDA)
    assert len(registrar.registered) == 1
    assert all(registrar.has(chunk) for chunk in array.chunks)
    assert torch.equal(array.take(torch.arange(10)), content(10))
    assert array.address_table is table
    assert table.tolist() == addresses(array)
    chunks = array.chunks
    array.move(CPU)
    assert array.chunks is chunks


def test_refused_move_changes_nothing(registrar: FakeRegistrar, reserve: Reserve) -> None:
    array = elsewhere(10)
    before = addresses(array)
    registrar.refuses = True
    with pytest.raises(CapacityError, match="refused"):
        array.move(CPU)
    assert array.device == CUDA
    assert addresses(array) == before == array.address_table.tolist()


def test_deepcopy_is_registered_too(registrar: FakeRegistrar, reserve: Reserve) -> None:
    array = registered(9)
    twin = deepcopy(array)
    assert (twin.device, twin.compute_device) == (CPU, CUDA)
    assert all(registrar.has(chunk) for chunk in twin.chunks)
    array.put(torch.arange(9), torch.zeros(9, 3))
    assert torch.equal(twin.take(torch.arange(9)), content(9))
    del array
    assert len(registrar.registered) == 1
    assert all(registrar.has(chunk) for chunk in twin.chunks)


def test_a_fork_has_the_same_chunks_and_grows_alone() -> None:
    array = filled(6)
    fork = array.fork()
    assert all(one.data_ptr() == other.data_ptr() for one, other in zip(fork.chunks, array.chunks, strict=True))
    array.grow(9)
    fork.grow(20)
    assert (len(array.chunks), len(fork.chunks)) == (3, 5)
    assert array.chunks[2].data_ptr() != fork.chunks[2].data_ptr()
    array.shrink(4)
    array.release()
    assert torch.equal(fork.take(torch.arange(6)), content(6))


def test_a_fork_has_a_table_of_its_own() -> None:
    array = filled(6)
    before = array.address_table.clone()
    fork = array.fork()
    fork.grow(20)
    assert fork.address_table[:5].tolist() == [chunk.data_ptr() for chunk in fork.chunks]
    assert torch.equal(array.address_table, before)


@pytest.mark.parametrize("way", ["unshare", "convert", "deepcopy"])
def test_chunks_of_its_own_again(way: str) -> None:
    array = filled(6)
    fork = array.fork()
    assert array.is_shared
    assert fork.is_shared
    if way == "unshare":
        table = fork.address_table
        fork.unshare()
        assert table[:2].tolist() == [chunk.data_ptr() for chunk in fork.chunks]
        fork.unshare()  # nothing is left to do
    elif way == "convert":
        fork.move(CPU, Conversion((3,), torch.float64, lambda rows: rows.double()))
    else:
        fork = deepcopy(fork)
    assert not fork.is_shared
    assert torch.equal(fork.take(torch.arange(6)).float(), content(6))
    fork.put(torch.arange(6), torch.zeros((6, 3)))
    assert torch.equal(array.take(torch.arange(6)), content(6))


def test_registered_chunks_live_as_long_as_a_fork(registrar: FakeRegistrar, reserve: Reserve) -> None:
    array = registered(6)
    fork = array.fork()
    chunks = [chunk.data_ptr() for chunk in array.chunks]
    del array
    assert torch.equal(fork.take(torch.arange(6)), content(6))
    assert [chunk.data_ptr() for chunk in fork.chunks] == chunks
