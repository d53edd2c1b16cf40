"""Whether memory is freed as soon as nothing refers to a cache, without the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from spin_hf import SpinCache
from tests.support.inspection import state_of


@contextmanager
def without_gc() -> Iterator[None]:
    """Reference cycles stay."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def weak_arrays(cache: SpinCache) -> list[weakref.ref[Any]]:
    """Weak references to the stores of a cache, and to their arrays and page frames."""
    stores = [layer.store for layer in state_of(cache).layers if layer.store is not None]
    assert stores
    held = [*stores, *(array for store in stores for array in store._arrays())]
    held += [store.frames for store in stores if store.frames is not None]
    return [weakref.ref(each) for each in held]
