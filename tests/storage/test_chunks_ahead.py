"""Chunks of a registered array that are allocated ahead: when they are requested, used and given back."""

from __future__ import annotations

import threading

import pytest
import torch

from spin_hf.errors import CapacityError
from spin_hf.storage import chunked_array
from spin_hf.storage.chunked_array import ChunkedArray
from tests.support.chunked_arrays import CPU, CUDA, Reserve, content, registered
from tests.support.fake_registrar import FakeRegistrar


def wait_for_spare(array: ChunkedArray) -> torch.Tensor:
    """The array's spare chunk, which stays where it is."""
    spare = array._spares[0]
    deadline = 3000
    while spare._chunks is None and deadline:
        threading.Event().wait(0.01)
        deadline -= 1
    assert spare._chunks is not None
    return spare._chunks[0]


def test_spare_is_made_while_the_last_chunk_fills(registrar: FakeRegistrar, reserve: Reserve) -> None:
    array = registered(5)
    assert reserve.requests == 0
    array.grow(6)  # half
    assert reserve.requests == 1
    for num_rows in (6, 7, 8):
        array.grow(num_rows)
    assert reserve.requests == 1  # one at a time
    spare = wait_for_spare(array)
    assert len(array.chunks) == 2
    assert registrar.has(spare)
    registrar.refuses = True  # nothing more has to be registered
    array.grow(9)
    assert array.chunks[-1].data_ptr() == spare.data_ptr()
    assert not array._spares
    registrar.refuses = False
    array.grow(10)
    assert reserve.requests == 2


def test_spare_is_used_where_one_is_not_enough(registrar: FakeRegistrar, reserve: Reserve) -> None:
    array = registered(4)
    spare = wait_for_spare(array)
    array.grow(20)
    assert len(array.chunks) == 5
    assert array.chunks[1].data_ptr() == spare.data_ptr()


def test_expected_chunks_are_made_in_the_background(
    registrar: FakeRegistrar, reserve: Reserve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In slabs of two chunks here."""
    monkeypatch.setattr(chunked_array, "_SLAB_BYTES", 2 * 48)
    arrays = [registered(3), registered(3)]
    for array in arrays:
        array.grow(3, 14)
        array.grow(3, 14)
    assert [[slab.count for slab in array._spares] for array in arrays] == [[1, 2], [1, 2]]
    assert reserve.requests == 4
    spares = [wait_for_spare(array) for array in arrays]
    for array, spare in zip(arrays, spares, strict=True):
        array.grow(14)
        assert len(array.chunks) == 4
        assert array.chunks[1].data_ptr() == spare.data_ptr()
        assert torch.equal(array.take(torch.arange(3)), content(3))


def test_expected_chunks_that_are_not_needed_are_given_back(registrar: FakeRegistrar, reserve: Reserve) -> None:
    array = registered(3)
    array.grow(3, 4000)
    array.grow(3, 8000)
    array.shrink(3)
    assert len(array._spares) == 1
    reserve.stop()
    array.release()
    assert not registrar.registered


def test_growing_without_the_spare_where_it_failed(registrar: FakeRegistrar, reserve: Reserve) -> None:
    array = registered(5)
    registrar.refuses = True
    array.grow(8)
    with pytest.raises(CapacityError, match="refused"):
        array.grow(9)
    assert (array.num_rows, array.used_rows) == (8, 8)
    registrar.refuses = False
    array.grow(9)
    assert registrar.has(array.chunks[-1])
    assert torch.equal(array.take(torch.arange(5)), content(5))


def test_no_spare_where_no_chunk_can_follow(
    registrar: FakeRegistrar, reserve: Reserve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_array, "MAX_CHUNKS", 2)
    array = ChunkedArray((3,), 4, torch.float32, CPU, compute_device=CUDA)
    array.grow(0)
    assert reserve.requests == 0
    array.grow(8)
    assert reserve.requests == 0
    with pytest.raises(CapacityError, match="at most 2"):
        array.grow(9)


def test_spare_dies_with_its_array(registrar: FakeRegistrar, reserve: Reserve) -> None:
    array = registered(8)
    wait_for_spare(array)
    reserve.stop()  # the thread may hold it for a moment longer
    assert len(registrar.registered) == 2
    del array
    assert not registrar.registered
