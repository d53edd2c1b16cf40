"""A registrar that stands for the CUDA driver and records what happens to the memory."""

from __future__ import annotations

from collections.abc import Callable

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
