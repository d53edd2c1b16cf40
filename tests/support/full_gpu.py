"""A GPU that is only counted, and whose allocations fail once it is full.

    total   [ pages, frames, summaries of every cache alive ][ free ............ ][ lost ]
    lost    free memory in pieces that are too small: allocations fail though it counts as free
    forward needs `token_bytes` for each of its tokens, at its last layer

Every cache alive counts, whether a loop still knows it or not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch
from weakref import WeakSet

import torch

from spin_hf import CapacityError
from spin_hf.storage.chunked_array import ChunkedArray
from spin_hf.storage.page_frames import PageFrames
from spin_hf.storage.page_store import PageStore
from tests.support.fake_gpu import FakeGpu, bytes_of_store, fake_gpu


class FullGpu:
    """What is held and free.

    Args:
        fake: the total, and what a user holds.
        lost: bytes that no allocation gets.
    """

    def __init__(self, fake: FakeGpu, lost: int) -> None:
        self.fake, self.lost, self.failures = fake, lost, 0
        self._stores: WeakSet[PageStore] = WeakSet()

    @property
    def stores(self) -> list[PageStore]:
        """Stores that are alive, whether a cache still knows them or not."""
        return list(self._stores)

    def add(self, store: PageStore) -> None:
        """Count a store."""
        self._stores.add(store)

    @property
    def free(self) -> int:
        return self.fake.total - self.fake.user - sum(map(bytes_of_store, self.stores))

    def ask(self, device: torch.device) -> int:
        """Free memory, as a device tells it."""
        return max(0, self.free)

    def fail(self, what: str) -> torch.OutOfMemoryError:
        self.failures += 1
        return torch.OutOfMemoryError(f"CUDA out of memory. {what}")


@contextmanager
def full_gpu(
    total: int,
    model: Any,
    lost: int = 0,
    token_bytes: int = 0,
    draw: random.Random | None = None,
    host_fails: float = 0.0,
) -> Iterator[FullGpu]:
    """Let the CPU be a GPU of `total` bytes for caches with `gpu_memory="auto"`.

    Args:
        model: whose forwards need memory.
        lost, token_bytes: see the head of this file.
        draw, host_fails: how often host memory cannot be page-locked, while several caches are alive.
    """
    grow, move, to_cpu = ChunkedArray.grow, PageFrames._move_slots, PageStore._move_to_cpu
    make, copy = PageStore.__init__, PageStore.new_empty
    with fake_gpu(total) as fake:
        gpu = FullGpu(fake, lost)

        def making(self: PageStore, *args: Any, **kwargs: Any) -> None:
            make(self, *args, **kwargs)
            gpu.add(self)

        def copying(self: PageStore) -> PageStore:
            store = copy(self)
            gpu.add(store)
            return store

        def growing(self: ChunkedArray, num_rows: int, expected: int = 0) -> bool:
            free, used = gpu.free, self.used_rows
            grown = grow(self, num_rows, expected)
            if gpu.free < min(free, gpu.lost):
                self.shrink(used)
                raise CapacityError("pages and summaries") from gpu.fail("pages")
            return grown

        def moving(self: PageFrames, wanted: tuple[int, ...]) -> None:
            total = self.num_heads * sum(wanted)
            if total * (self.frames[:1].new_empty(self.page_elements).nbytes + 12) > gpu.free - gpu.lost:
                raise gpu.fail("frames")
            move(self, wanted)

        def locking(self: PageStore) -> None:
            several = len({id(store.sequences) for store in gpu.stores}) > 1
            if several and draw is not None and draw.random() < host_fails:
                raise CapacityError("page-locked memory")
            to_cpu(self)

        def at_last_layer(module: Any, arguments: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = arguments[0] if arguments else kwargs["hidden_states"]
            if states.shape[0] * states.shape[1] * token_bytes > gpu.free - gpu.lost:
                raise gpu.fail("activations")

        handle = model.model.layers[-1].register_forward_pre_hook(at_last_layer, with_kwargs=True)
        try:
            with (
                patch.object(FakeGpu, "ask", lambda self, device: gpu.ask(device)),
                patch("spin_hf.memory.watermarks.free_gpu_memory", gpu.ask),
                patch.object(PageStore, "__init__", making),
                patch.object(PageStore, "new_empty", copying),
                patch.object(ChunkedArray, "grow", growing),
                patch.object(PageFrames, "_move_slots", moving),
                patch.object(PageStore, "_move_to_cpu", locking),
            ):
                yield gpu
        finally:
            handle.remove()
