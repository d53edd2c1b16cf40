"""What lets one compiled graph serve many caches: numbers for what is recorded in it, and kernels that outlive a cache.

    generate     get_mask_sizes -> mask function      SharedState.expect: room, descriptors, inputs of the next step
    compiled     update, attend_prepared(handle)      launches by address; in a replay no Python of ours runs
    afterwards   any access to the cache              SharedState.settle: the tokens count, or are taken back

A CUDA graph inside a compiled forward has addresses in it, and so may serve a cache only if that has its tables there. The
handle stands for all of them: a compiled forward takes it as an argument, so another handle means another recording. When a
cache is dropped, its kernels, with the small buffers that graphs know, wait for the next cache of the same config.
"""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections import Counter, deque
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from .. import kernels
from ..attention.methods.base import recipe_of
from ..integration.layer_types import is_placeholder

if TYPE_CHECKING:
    from ..state import SharedState
    from .triton_step import StepKernels

_MAX_WAITING = 8
"""Kernels kept for a config; beyond that the oldest go, and a graph is recorded anew when their like returns."""

_numbers = itertools.count(1)
_handles: dict[Hashable, int] = {}


def may_be_compiled(shared: SharedState, layers: list[Any]) -> bool:
    """Whether kernels serve every layer that holds tokens: host work, as of windows, has no place in a graph.

    Args:
        shared: of the paged layers.
        layers: of the cache.
    """
    served = kernels.on_gpu() and recipe_of(shared.method) is not None
    return served and all(is_placeholder(layer) or layer in shared.layers for layer in layers)


def new_handle() -> int:
    """A number for a cache whose graphs serve no other."""
    return next(_numbers)


def handle_of(recorded: Hashable) -> int:
    """The number of what a graph holds: equal for equal addresses and compile-time numbers, and for nothing else."""
    return _handles.get(recorded) or _handles.setdefault(recorded, new_handle())


class KernelPool:
    """Kernels of dropped caches of one config. Threads may share it: a kernel is lent to one cache at a time."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Hashable, StepKernels]] = []
        self.lent: Counter[Hashable] = Counter()
        self._returned: deque[tuple[Hashable, StepKernels]] = deque()
        """Put back, and not yet among those waiting: the garbage collector puts back, in any thread at any time."""
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelPool:
        return self

    def take(self, key: Hashable) -> StepKernels | None:
        """Kernels that were put back with an equal key, the last ones first; None if there are none."""
        found = self._pop(key)
        if found is None and self.lent[key]:
            gc.collect()  # Dynamo keeps what it compiled for in reference cycles: a cache that was dropped, and its memory
            found = self._pop(key)
        with self._lock:
            self.lent[key] += 1
        return found

    def put(self, key: Hashable, step: StepKernels) -> None:
        """Keep kernels whose cache is gone. Waits for nobody."""
        step.release()
        self._returned.append((key, step))

    def _pop(self, key: Hashable) -> StepKernels | None:
        with self._lock:
            while self._returned:
                returned = self._returned.popleft()
                self.lent[returned[0]] -= 1
                self.waiting.append(returned)
            del self.waiting[:-_MAX_WAITING]
            for index in reversed(range(len(self.waiting))):
                if self.waiting[index][0] == key:
                    return self.waiting.pop(index)[1]
        return None


_pools: dict[int, KernelPool] = {}


def pool_of(config: Any) -> KernelPool:
    """The pool of a config, for as long as that lives."""
    pool = _pools.get(id(config))
    if pool is None:
        pool = _pools.setdefault(id(config), KernelPool())
        weakref.finalize(config, _pools.pop, id(config), None)
    return pool
