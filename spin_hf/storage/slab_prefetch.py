"""Chunks ahead of need: a decode step must not wait for page-locking.

    array --ask--> spare (empty) --background thread--> spare (a chunk) --take--> array

A spare is one chunk of an array, made while the array's last chunk fills. One thread serves the process.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from .pinned_slab import THREAD_PREFIX, allocate_rows, leave_mapped


class PrefetchedChunk:
    """A chunk that is made ahead of need. Whoever lets go of it lets go of the chunk.

    Args:
        make: makes the chunk.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._chunk: Tensor | None = None
        self._closed = False
        self._lock = threading.Lock()

    def fill(self) -> None:
        """Make the chunk, unless `take` came first. An error is dropped: the taker makes its own chunk and meets it."""
        with self._lock:
            if not self._closed:
                with suppress(Exception):
                    self._chunk = self._make()

    def take(self) -> Tensor | None:
        """The chunk, or None where it could not be made or its making has not begun; waits for a making under way.

        Only the first call can return a chunk.
        """
        with self._lock:
            self._closed = True
            chunk, self._chunk = self._chunk, None
            return chunk


class SlabPrefetcher:
    """Fills spares in one background thread, in the order of asking, for all arrays of the process.

    It holds no spare itself, so there are never more than the arrays keep.

    Args:
        allocate: makes chunks, see `allocate_rows`.
    """

    def __init__(self, allocate: Callable[..., list[Tensor]] = allocate_rows) -> None:
        self._allocate = allocate
        self.reset()

    def reset(self) -> None:
        """Begin anew: a forked child has no such thread, and may have a lock that the thread held."""
        self._asked: deque[weakref.ref[PrefetchedChunk]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def ask(self, chunk_shape: Sequence[int], dtype: torch.dtype, *, compute_device: torch.device) -> PrefetchedChunk:
        """A spare that will be filled soon; returns at once and raises nothing of what happens later."""
        shape = tuple(chunk_shape)
        spare = PrefetchedChunk(lambda: self._allocate(1, shape, dtype, compute_device=compute_device)[0])
        with self._changed:
            if not self._stopped:
                self._asked.append(weakref.ref(spare))
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name=f"{THREAD_PREFIX}ahead", daemon=True)
                    self._thread.start()
                self._changed.notify()
        return spare

    def stop(self) -> None:
        """End the thread, after the spare that it is making; later spares stay empty."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked or self._stopped)
                if self._stopped:
                    return
                spare = self._asked.popleft()()
            if spare is not None:
                spare.fill()
            del spare  # while the thread waits it must not keep one that nobody wants


PREFETCHER = SlabPrefetcher()
"""The reserve of this process."""


@atexit.register
def _at_exit() -> None:
    """No thread of ours may be inside the driver while the process takes itself apart."""
    PREFETCHER.stop()
    leave_mapped()


def _in_child() -> None:
    PREFETCHER.reset()
    leave_mapped()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_in_child)
