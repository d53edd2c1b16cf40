"""The step kernels of one model, and their captured graphs, which its caches use in turn.

    pool of a model    StepKernels 0    binding: cache A    graphs { call: captured step }
                       StepKernels 1    binding: none       graphs { ... }

A captured graph holds the addresses of the buffers of its `StepKernels`, and finds everything of a cache through descriptors.
So it serves any cache for which the descriptors are written. Windows and linear states of unpaged layers are first copied to
tensors of the graph (`graph/static_states.py`).

A cache takes kernels over for its first forward: those that no cache owns, or those of a cache that is not within a forward.
Then it needs no eager step and no capture. A cache that has lost its kernels makes its own at its next forward. So two caches
that step in turn do not take them from each other forever.

Kernels without an owner stay for the next cache, as long as the model lives.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from .descriptors import Binding

if TYPE_CHECKING:
    from ..state import CacheState
    from .triton_step import StepKernels

_MOST_IDLE = 4
"""Most kernels without an owner that a pool holds. The least recently taken ones are freed."""


class Owner(Protocol):
    """A user of kernels: the backends of one cache."""

    state: CacheState
    is_busy: bool
    """Whether a forward is in progress."""

    def on_taken_over(self, kernels: StepKernels) -> None:
        """Called before another owner takes over kernels: keep what they leave for the next step."""


class KernelPool:
    """Step kernels that caches of one model share."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held while kernels are taken. Finalizers of caches do not take it: they only end bindings."""
        self.record: Any = None
        """The model as it was when the graphs were captured (`graph/eligibility.py`)."""
        self._kernels: list[StepKernels] = []
        """The least recently taken ones first."""
        self._numbers: dict[Any, int] = {}
        """Layout -> the number that `number_of` gave it."""

    def take(self, key: Any, owner: Owner, may_take_over: bool, make: Callable[[], StepKernels]) -> StepKernels:
        """Kernels that belong to `owner` from now on, until it ends their binding or another one takes them over.

        Args:
            key: what the kernels must have been made for.
            may_take_over: whether kernels of another owner may be taken, while it is not busy.
            make: makes new ones.
        """
        with self.lock:
            chosen = self._idle(key, may_take_over)
            if chosen is None:
                chosen = make()
                chosen.key = key
            else:
                self._kernels.remove(chosen)
                _wait_for_stream_of(chosen)
                before = chosen.binding.owner
                if before is not None:
                    before.on_taken_over(chosen)
                for graph in chosen.graphs.values():
                    if graph is not None:
                        graph.detach()
            chosen.bind(Binding(owner.state, owner))
            self._kernels.append(chosen)
            unowned = [each for each in self._kernels if each.binding.owner is None]
            for each in unowned[: max(0, len(unowned) - _MOST_IDLE)]:
                self._kernels.remove(each)
            return chosen

    def _idle(self, key: Any, may_take_over: bool) -> StepKernels | None:
        """Kernels that no forward uses, those without an owner first."""
        alike = [(each, each.binding.owner) for each in self._kernels if each.key == key]
        unowned = [kernels for kernels, owner in alike if owner is None]
        idle = [kernels for kernels, owner in alike if may_take_over and owner is not None and not owner.is_busy]
        return next(iter(unowned + idle), None)

    def forget_graphs(self, record: Any) -> None:
        """Drop all captured graphs, as the model has changed. `record` is of the model as it is now."""
        with self.lock:
            for each in self._kernels:
                each.graphs.clear()
            self.record = record

    def number_of(self, layout: Any) -> int:
        """A number for a layout of pages, which is long, as a part of keys: equal for equal layouts."""
        return self._numbers.setdefault(layout, len(self._numbers))


_pools: weakref.WeakKeyDictionary[nn.Module, KernelPool] = weakref.WeakKeyDictionary()


def pool_of(model: nn.Module) -> KernelPool:
    """The pool of a model. It lives as long as the model."""
    return _pools.setdefault(model, KernelPool())


def _wait_for_stream_of(kernels: StepKernels) -> None:
    """Have the current stream wait for the last forward that used the kernels."""
    if kernels.last_stream is not None:
        torch.cuda.current_stream(kernels.device).wait_stream(kernels.last_stream)
