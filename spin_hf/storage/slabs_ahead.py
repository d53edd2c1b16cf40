"""Page-locks the slabs of several layers while the first of them are used: for a saved cache that goes to host memory.

    caller    slab 0 | slab 1 |   read   | slab 3 | take 2 |  ...        makes a slab itself if none is ready
    thread           | slab 2    | slab 4    | ...                      never more than the caller still needs

Locking one layer's memory leaves most processors idle, so two threads that lock are twice as fast.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .pinned_slab import PREPARED, THREAD_PREFIX, HostSlab, SlabKey, make_slab


class SlabsAhead:
    """Slabs of one size that a thread makes.

    Args:
        count: slabs that will be needed.
        make: makes one.
    """

    def __init__(self, count: int, make: Callable[[], HostSlab]) -> None:
        self._missing, self._make = count, make
        """Slabs that nobody has begun to make."""
        self._ready: deque[HostSlab] = deque()
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"{THREAD_PREFIX}slabs", daemon=True)
        self._thread.start()

    def take(self) -> HostSlab | None:
        """A slab that is ready; None if the caller makes it itself."""
        with self._changed:
            if self._missing and not self._ready:
                self._missing -= 1
                return None
            self._changed.wait_for(lambda: self._ready or self._ended)  # for one that is being made
            return self._ready.popleft() if self._ready else None

    def close(self) -> None:
        """Make no more. Slabs that nobody took are freed."""
        with self._changed:
            self._missing = 0
        self._thread.join()
        self._ready.clear()

    def _work(self) -> None:
        try:
            while self._begins():
                slab = self._make()
                with self._changed:
                    self._ready.append(slab)
                    self._changed.notify()
                del slab
        except Exception:  # the caller meets the same error and raises it
            pass
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify()

    def _begins(self) -> bool:
        with self._changed:
            if not self._missing:
                return False
            self._missing -= 1
            return True


@contextmanager
def slabs_ahead(count: int, key: SlabKey) -> Iterator[None]:
    """Within this context, a thread makes slabs of `key`, up to `count` together with the caller's own."""
    ahead = SlabsAhead(count, lambda: make_slab(key))
    PREPARED[key] = ahead.take
    try:
        yield
    finally:
        PREPARED.pop(key, None)
        ahead.close()
