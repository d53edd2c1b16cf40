"""Prefetches chunks in a background thread, so that no step waits for page-locking.

    array --ask--> PrefetchedSlab (empty) --background thread--> PrefetchedSlab (filled) --take--> array

An array's next chunk is allocated while its last one fills, and the chunks of a prompt while its first tokens are read. One
thread serves the process. Chunks with low numbers come first: all layers need their second chunk before any needs its third.
"""

from __future__ import annotations

import atexit
import heapq
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from .pinned_slab import THREAD_PREFIX, allocate_rows, leave_mapped


class PrefetchedSlab:
    """The next chunks of an array, allocated ahead of need. Owns them until `take`.

    Args:
        count: chunks of the slab.
        make: allocates them.
    """

    def __init__(self, count: int, make: Callable[[], list[Tensor]]) -> None:
        self.count, self._make = count, make
        self._chunks: list[Tensor] | None = None
        self._closed = False
        self._lock = threading.Lock()

    def fill(self) -> None:
        """Allocate the chunks, unless `take` came first. Drops errors: the taker then allocates and raises them itself."""
        with self._lock:
            if not self._closed:
                with suppress(Exception):
                    self._chunks = self._make()

    def take(self) -> list[Tensor] | None:
        """The chunks, or None if their allocation failed or has not started. Waits for an allocation under way.

        Only the first call can return chunks.
        """
        with self._lock:
            self._closed = True
            chunks, self._chunks = self._chunks, None
            return chunks


class SlabPrefetcher:
    """Fills prefetched slabs of all arrays of the process in one background thread: lowest number first, then first asked.

    It holds weak references only, so dropping a `PrefetchedSlab` frees its memory.

    Args:
        allocate: allocates chunks, see `allocate_rows`.
    """

    def __init__(self, allocate: Callable[..., list[Tensor]] = allocate_rows) -> None:
        self._allocate = allocate
        self.reset()

    def reset(self) -> None:
        """Reset all state. Needed in a forked child, which has no such thread and may inherit a held lock."""
        self._requests: list[tuple[int, int, weakref.ref[PrefetchedSlab]]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def ask(
        self, chunk_shape: Sequence[int], dtype: torch.dtype, *, compute_device: torch.device, count: int = 1, number: int = 0
    ) -> PrefetchedSlab:  # fmt: skip
        """Request chunks. Returns at once; allocation errors are not raised here.

        Args:
            number: of the first chunk in its array.
        """
        shape = tuple(chunk_shape)
        spare = PrefetchedSlab(count, lambda: self._allocate(count, shape, dtype, compute_device=compute_device))
        with self._changed:
            if not self._stopped:
                heapq.heappush(self._requests, (number, next(self._order), weakref.ref(spare)))
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name=f"{THREAD_PREFIX}ahead", daemon=True)
                    self._thread.start()
                self._changed.notify()
        return spare

    def stop(self) -> None:
        """Stop the thread after its current allocation. Later requests stay empty."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._requests or self._stopped)
                if self._stopped:
                    return
                spare = heapq.heappop(self._requests)[2]()
            if spare is not None:
                spare.fill()
            del spare  # do not keep it alive while waiting


PREFETCHER = SlabPrefetcher()
"""The prefetcher of this process."""


@atexit.register
def _at_exit() -> None:
    """Stop the thread, so that it is not inside the driver during interpreter shutdown."""
    PREFETCHER.stop()
    leave_mapped()


def _in_child() -> None:
    PREFETCHER.reset()
    leave_mapped()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_in_child)
