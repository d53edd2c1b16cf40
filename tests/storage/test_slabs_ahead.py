"""Slabs made ahead by a thread: no more than are needed, taken before new ones are made, and freed if nobody takes them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch

from spin_hf.errors import CapacityError
from spin_hf.storage import pinned_slab, slabs_ahead
from spin_hf.storage.chunked_array import ChunkedArray
from spin_hf.storage.pinned_slab import PAGE, PREPARED, allocate_rows, slab_key
from tests.support.chunked_arrays import CPU, CUDA
from tests.support.fake_registrar import FakeRegistrar

pytestmark = pytest.mark.usefixtures("maps")
SHAPE, COUNT = (16, 64), 3
KEY = slab_key(COUNT, 16 * 64 * 4, CUDA)


def _allocate() -> list[torch.Tensor]:
    return allocate_rows(COUNT, SHAPE, torch.float32, compute_device=CUDA)


def _slabs(registrar: FakeRegistrar) -> int:
    return len({address for kind, address in registrar.history if kind == "register"})


def _wait(until: Callable[[], bool]) -> None:
    event = threading.Event()
    for _ in range(3000):
        if until():
            return
        event.wait(0.01)
    raise AssertionError("nothing happened")


def test_what_is_ready_is_taken(registrar: FakeRegistrar) -> None:
    with slabs_ahead.slabs_ahead(2, KEY):
        _wait(lambda: _slabs(registrar) == 2)
        made = [_allocate() for _ in range(3)]
        assert _slabs(registrar) == 3  # two were ready, and a third is made by the caller
    assert not PREPARED
    assert all(registrar.has(chunk) for chunks in made for chunk in chunks)
    assert len({chunks[0].data_ptr() for chunks in made}) == 3


def test_no_more_than_needed(registrar: FakeRegistrar) -> None:
    with slabs_ahead.slabs_ahead(5, KEY):
        made = [_allocate() for _ in range(5)]
    assert _slabs(registrar) == 5
    assert len({chunks[0].data_ptr() for chunks in made}) == 5


def test_what_nobody_takes_is_freed(registrar: FakeRegistrar) -> None:
    with slabs_ahead.slabs_ahead(2, KEY):
        _wait(lambda: _slabs(registrar) == 2)
    gc.collect()
    pinned_slab.give_back_dropped()
    assert not registrar.registered
    assert all(not thread.name.startswith(pinned_slab.THREAD_PREFIX + "slabs") for thread in threading.enumerate())


def test_other_sizes_are_made_as_always(registrar: FakeRegistrar) -> None:
    with slabs_ahead.slabs_ahead(1, KEY):
        _wait(lambda: _slabs(registrar) == 1)
        allocate_rows(COUNT + 1, SHAPE, torch.float32, compute_device=CUDA)
        assert _slabs(registrar) == 2


def test_the_caller_meets_the_error_of_the_thread(registrar: FakeRegistrar) -> None:
    registrar.refuses = True
    with slabs_ahead.slabs_ahead(3, KEY):
        for _ in range(3):
            with pytest.raises(CapacityError, match="refused"):
                _allocate()
    registrar.refuses = False
    assert all(registrar.has(chunk) for chunk in _allocate())


def test_an_array_grows_into_them(registrar: FakeRegistrar) -> None:
    with slabs_ahead.slabs_ahead(1, KEY):
        _wait(lambda: _slabs(registrar) == 1)
        array = ChunkedArray((64,), 16, torch.float32, CPU, compute_device=CUDA)
        array.grow(16 * COUNT)
        assert _slabs(registrar) == 1
    assert all(registrar.has(chunk) for chunk in array.chunks)
    assert all(chunk.data_ptr() % PAGE == 0 for chunk in array.chunks)
