"""A registrar that stands for the driver and writes down what happens to the memory, and a watch over all mappings."""

from __future__ import annotations

import gc
import mmap
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from spin_hf.errors import CapacityError
from spin_hf.storage import pinned_slab


class RefusedError(CapacityError):
    """What the fake driver raises."""


class FakeRegistrar:
    """Writes down calls; `inspect` is called with every range before it is registered."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}
        self.history: list[tuple[str, int]] = []
        self.open_when_unregistered: list[bool] = []
        self.refuses = self.breaks = self.captures = False
        self.inspect: Callable[[int, int], None] = lambda address, num_bytes: None

    def register(self, address: int, num_bytes: int) -> None:
        self.inspect(address, num_bytes)
        if self.refuses:
            raise RefusedError("refused")
        assert address not in self.registered
        self.registered[address] = num_bytes
        self.history.append(("register", address))

    def unregister(self, address: int) -> None:
        slab = max(first for first in pinned_slab._mappings if first <= address)
        self.open_when_unregistered.append(not pinned_slab._mappings[slab].closed)
        if self.breaks:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        del self.registered[address]
        self.history.append(("unregister", address))

    def capturing(self) -> bool:
        return self.captures

    def has(self, tensor: torch.Tensor) -> bool:
        first, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(address <= first and stop <= address + size for address, size in self.registered.items())


@pytest.fixture
def registrar(monkeypatch: pytest.MonkeyPatch) -> FakeRegistrar:
    """Stands for the registrar of every CUDA device."""
    fake = FakeRegistrar()
    monkeypatch.setattr(pinned_slab, "CudaRegistrar", lambda device: fake)
    return fake


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[mmap.mmap]]:
    """Every mapping made; all must be closed when a test ends, and nothing may have gone wrong in a finalizer."""
    made: list[mmap.mmap] = []
    unraisable: list[Any] = []
    real = pinned_slab._map

    def recorded(num_bytes: int) -> mmap.mmap:
        made.append(real(num_bytes))
        return made[-1]

    monkeypatch.setattr(pinned_slab, "_map", recorded)
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    yield made
    if pinned_slab._mappings:
        gc.collect()  # a failed test's traceback, say
    assert [mapping.closed for mapping in made] == [True] * len(made)
    assert not pinned_slab._mappings
    assert not pinned_slab._dropped
    assert not unraisable
