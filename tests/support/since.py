"""Threads and caches that appeared since a moment. Those of earlier tests may end at any time: counts of all say nothing."""

from __future__ import annotations

import gc
import threading
from weakref import WeakSet

from spin_hf import SpinCache


def living_caches() -> WeakSet[SpinCache]:
    """Caches that something refers to."""
    gc.collect()
    return WeakSet(each for each in gc.get_objects() if isinstance(each, SpinCache))


class Since:
    """Remembers the threads and the caches that there are when it is made."""

    def __init__(self) -> None:
        self._threads = WeakSet(threading.enumerate())
        self._caches = living_caches()

    def threads(self) -> list[str]:
        """Names of the threads started since that have not ended."""
        return [thread.name for thread in threading.enumerate() if thread not in self._threads]

    def caches(self) -> list[SpinCache]:
        """Caches made since that something refers to."""
        return [cache for cache in living_caches() if cache not in self._caches]
