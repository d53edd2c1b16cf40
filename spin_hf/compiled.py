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
import weakref
from collections import Counter
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decode import StepKernels

_MAX_WAITING = 8
"""Kernels kept for a config; beyond that the oldest go, and a graph is recorded anew when their like returns."""

_numbers = itertools.count(1)
_handles: dict[Hashable, int] = {}


def new_handle() -> int:
    """A number for a cache whose graphs serve no other."""
    return next(_numbers)


def handle_of(recorded: Hashable) -> int:
    """The number of what a graph holds: equal for equal addresses and compile-time numbers, and for nothing else."""
    if recorded not in _handles:
        _handles[recorded] = new_handle()
    return _handles[recorded]


class KernelPool:
    """Kernels of dropped caches of one config."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Hashable, StepKernels]] = []
        self.lent: Counter[Hashable] = Counter()

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelPool:
        return self

    def take(self, key: Hashable) -> StepKernels | None:
        """Kernels that were put back with an equal key, the last ones first; None if there are none."""
        if self.lent[key] and all(key != other for other, _ in self.waiting):
            gc.collect()  # Dynamo keeps what it compiled for in reference cycles: a cache that was dropped, and its memory
        self.lent[key] += 1
        for index in reversed(range(len(self.waiting))):
            if self.waiting[index][0] == key:
                return self.waiting.pop(index)[1]
        return None

    def put(self, key: Hashable, step: StepKernels) -> None:
        """Keep kernels whose cache is gone."""
        step.release()
        self.lent[key] -= 1
        self.waiting.append((key, step))
        del self.waiting[:-_MAX_WAITING]


_pools: dict[int, KernelPool] = {}


def pool_of(config: Any) -> KernelPool:
    """The pool of a config, for as long as that lives."""
    if id(config) not in _pools:
        _pools[id(config)] = KernelPool()
        weakref.finalize(config, _pools.pop, id(config), None)
    return _pools[id(config)]
