"""A GPU that is only counted: `total` bytes, of which caches on the CPU hold some, and a user some more.

Bytes are counted from the caches' tensors, not from the caches' own counters. A `Conversation` runs a cache on such a GPU, and
compares it with a cache without a cap.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch
from weakref import WeakSet

import torch

from spin_hf import SpinCache
from spin_hf.config import Tuning
from spin_hf.memory import other_caches, watermarks
from spin_hf.storage.page_store import PageStore
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.tuning import tuned


def bytes_of(cache: SpinCache) -> int:
    """Bytes of all tensors that the layers hold in the compute tier; of arrays that grow by chunks, the rows in use."""
    return sum(bytes_of_store(layer.store) for layer in cache.paged_layers if layer.store is not None)


def bytes_of_store(store: PageStore) -> int:
    arrays = store._arrays() if store.frames is None else [a for a in store._arrays() if a is not store.backing]
    total = sum(array.used_rows * array.row_bytes for array in arrays)
    if store.frames is not None:
        total += sum(value.nbytes for value in vars(store.frames).values() if isinstance(value, torch.Tensor))
    return total


class FakeGpu:
    """`total` bytes: `user` bytes are taken by the user, others by `caches`, the rest is free."""

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
def other_device() -> Iterator[None]:
    """For a cache on another device."""
    with patch.object(watermarks, "free_gpu_memory", lambda device: None):
        yield


@contextmanager
def fake_gpu(total: int) -> Iterator[FakeGpu]:
    """Let the CPU be a GPU of `total` bytes for caches with `gpu_memory="auto"`."""
    gpu = FakeGpu(total)
    with (
        patch.object(watermarks, "free_gpu_memory", gpu.ask),
        tuned(margin_bytes=0),
        patch.object(other_caches, "live", WeakSet()),  # not those that a failed test keeps alive
    ):
        yield gpu


CHECK_INTERVAL_STEPS = Tuning().check_interval_steps
WATERMARKS = watermarks.Watermarks(margin_bytes=0)
"""Of a fake GPU."""
SHAPE = Shape(layers=2, kv_heads=2, group=1, key_dim=4, value_dim=4)
OPTIONS: dict[str, Any] = dict(budget=24, num_sink_tokens=4, recent_window=10)
PAGE = 8 * (4 + 4) * 4
"""Bytes of a page."""


class Conversation:
    """A cache on a fake GPU, and one without a cap that gets the same tokens."""

    def __init__(self, gpu: FakeGpu, batch_size: int, prompt: int, seed: int = 0, **options: Any) -> None:
        self.kv = RandomKV.random(SHAPE, batch_size, prompt + 6 * CHECK_INTERVAL_STEPS, seed)
        self.driver = CacheDriver(SHAPE, **OPTIONS, **options)
        self.gpu, self.length, self.prompt = gpu, 0, prompt
        gpu.caches.append(self.driver.cache)
        self.expected = CacheDriver(SHAPE, **OPTIONS)

    @property
    def cache(self) -> SpinCache:
        return self.driver.cache

    @property
    def frames(self) -> list[int]:
        """Page frames of a KV head, of each layer that has any."""
        stores = [layer.store for layer in self.cache.paged_layers]
        return [store.frames.num_slots for store in stores if store is not None and store.frames is not None]

    def read(self, count: int) -> None:
        """One forward over more tokens."""
        start, self.length = self.length, self.length + count
        outputs = self.driver.step(self.kv, start, self.length)
        with other_device():
            others = self.expected.step(self.kv, start, self.length)
        for ours, expected in zip(outputs, others, strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        self.cache.check_integrity()

    def decode(self, count: int = 1) -> None:
        for _ in range(count):
            self.read(1)

    def begin(self) -> Conversation:
        self.read(self.prompt)
        self.decode()
        return self


def resident_batch_bytes(batch_size: int, tokens: int) -> int:
    """GPU bytes of a batch whose pages are all resident."""
    return batch_size * -(-tokens // 256) * 32 * SHAPE.layers * SHAPE.kv_heads * (PAGE + 5 * 4)
