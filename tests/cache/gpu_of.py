"""A GPU that is arithmetic: so many bytes, of which caches on the CPU hold some and a user some more.

What caches hold is counted by the tensors themselves, and not by what the cache believes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch
from weakref import WeakSet

import torch

from spin_hf import SpinCache, gpu_memory
from spin_hf.storage import pressure
from spin_hf.storage.pages import PageStore


def bytes_of(cache: SpinCache) -> int:
    """Bytes of all tensors that the layers hold in the compute tier; of arrays that grow by chunks, the rows in use."""
    return sum(_bytes_of_store(layer.store) for layer in cache._shared.layers if layer.store is not None)


def _bytes_of_store(store: PageStore) -> int:
    arrays = store._arrays() if store.frames is None else [a for a in store._arrays() if a is not store.home]
    total = sum(array.used_rows * array.row_bytes for array in arrays)
    if store.frames is not None:
        total += sum(value.nbytes for value in vars(store.frames).values() if isinstance(value, torch.Tensor))
    return total


class FakeGpu:
    """`total` bytes; `user` of them are the user's own, the rest that of `caches`."""

    def __init__(self, total: int) -> None:
        self.total, self.user, self.looks = total, 0, 0
        self.caches: list[SpinCache] = []

    @property
    def free(self) -> int:
        return self.total - self.user - sum(map(bytes_of, self.caches))

    def ask(self, device: torch.device) -> int:
        self.looks += 1
        return self.free


@contextmanager
def elsewhere() -> Iterator[None]:
    """For a cache that is not on that GPU."""
    with patch.object(pressure, "free_gpu_memory", lambda device: None):
        yield


@contextmanager
def gpu_of(total: int) -> Iterator[FakeGpu]:
    """Let the CPU be a GPU of so many bytes for caches with `gpu_memory="auto"`."""
    gpu = FakeGpu(total)
    with (
        patch.object(pressure, "free_gpu_memory", gpu.ask),
        patch.object(pressure, "MARGIN_BYTES", 0),
        patch.object(gpu_memory, "_live", WeakSet()),  # not those that a failed test keeps alive
    ):
        yield gpu
