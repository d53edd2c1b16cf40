"""Fixtures for tests of memory that is registered with CUDA: a fake registrar, and all mappings."""

from __future__ import annotations

import gc
import mmap
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from spin_hf.storage import chunked_array, pinned_slab
from tests.support.chunked_arrays import Reserve
from tests.support.fake_registrar import FakeRegistrar


@pytest.fixture
def registrar(monkeypatch: pytest.MonkeyPatch) -> FakeRegistrar:
    """Replaces the registrar of every CUDA device."""
    fake = FakeRegistrar()
    monkeypatch.setattr(pinned_slab, "CudaRegistrar", lambda device: fake)
    return fake


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[mmap.mmap]]:
    """Every mapping made. Soon after a test all must be closed, and no finalizer may have failed."""
    made: list[mmap.mmap] = []
    unraisable: list[Any] = []
    real = pinned_slab._map

    def recorded(num_bytes: int) -> mmap.mmap:
        made.append(real(num_bytes))
        return made[-1]

    monkeypatch.setattr(pinned_slab, "_map", recorded)
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    yield made
    deadline = time.monotonic() + 10
    while not all(mapping.closed for mapping in made) and time.monotonic() < deadline:
        gc.collect()  # a failed test's traceback, say
        pinned_slab.give_back_dropped()
        time.sleep(0.01)  # a thread may be making a slab for an array that has gone
    assert [mapping.closed for mapping in made] == [True] * len(made)
    assert not pinned_slab._mappings
    assert not pinned_slab._dropped
    assert not unraisable


@pytest.fixture
def reserve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reserve]:
    """Replaces the prefetcher of chunked arrays."""
    made = Reserve()
    monkeypatch.setattr(chunked_array, "PREFETCHER", made)
    yield made
    made.stop()
