"""The backends of one cache: the reference, and one `StepKernels` per device and number of KV heads of the current batch.

Kernels belong to a pool (`kernel_pool.py`). Between two forwards another cache of the model may take them over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..attention.methods.base import recipe_of
from ..inference_mode import outside_inference_mode
from ..integration.compile_bar import show_compiles
from ..kernels.compile_progress import report_by
from ..kernels.descriptor_fields import Counter
from ..state import CacheState, LayerState
from .base import AttentionBackend, Call
from .early_compile import compile_behind_prompt, wait_for_index
from .kernel_pool import KernelPool
from .reference import ReferenceBackend
from .triton_step import StepKernels
from .zones import StepPlan

report_by(show_compiles)

_Place = tuple[torch.device, int]
"""Device and number of KV heads of layers."""


class BackendSet:
    """Creates and holds the backends of one cache.

    Args:
        state: the cache's state.
        zones: plans of the step's queries, for the reference.
    """

    def __init__(self, state: CacheState, zones: StepPlan) -> None:
        self.state = state
        self.reference = ReferenceBackend(state, zones)
        self.pool = KernelPool()
        self.is_busy = False
        """Whether a forward is in progress. Another cache does not take over the kernels then."""
        self.row_sizes: Sequence[int] = ()
        """Places of the batches of rows that the cache may become a row of: what they launch is compiled behind its prompt."""
        self._taken: dict[_Place, StepKernels] = {}
        """Kernels that this cache has taken. Another cache may own them by now."""
        self._in_use: tuple[tuple[int, int], list[StepKernels], bool] | None = None
        """What `in_use` found last, for which batch size and number of stores, and whether it serves all layers."""
        self._snapshots: dict[_Place, list[Tensor]] = {}
        """What kernels that another cache has taken over had left for the next step."""
        self._counted: dict[str, int] = {}
        """Counts of kernels for another batch size."""
        self._inherited: list[Tensor] = []
        """Counters of the cache that this one is a copy of, [1, len(Counter)] for each device. Not written to."""

    def use_pool(self, pool: KernelPool) -> None:
        """Take kernels from this pool from now on. A cache that has kernels already keeps its own pool."""
        if not self._taken:
            self.pool = pool

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward of the model. Within it no other cache takes over the kernels."""
        with self.pool.lock:
            self.is_busy = True
        try:
            yield
        finally:
            for step in self._taken.values():
                if step.device.type == "cuda" and self._owns(step):
                    step.last_stream = torch.cuda.current_stream(step.device)
            self.is_busy = False

    def _leave(self, step: StepKernels) -> None:
        binding = step.binding  # another cache may replace it at any time
        if binding.owner is self:
            binding.end()

    def _owns(self, step: StepKernels) -> bool:
        return step.binding.owner is self

    def of(self, layer: LayerState) -> AttentionBackend:
        """The backend of a layer with pages: kernels where device and method have them, else the reference."""
        return self.kernels_of(layer) or self.reference

    def kernels_of(self, layer: LayerState) -> StepKernels | None:
        """The kernels of a layer with pages; None if the reference serves it."""
        assert layer.store is not None
        place, batch_size = (layer.store.device, layer.store.num_heads), self.state.sequences.batch_size
        launch, found = kernels.launchers(place[0]), self._taken.get(place)
        if launch is None:
            return None
        recipe = recipe_of(self.state.method) if found is None else found.recipe
        if recipe is None or not recipe.serves(layer.store.key_dim, layer.store.value_dim):
            return None
        if found is None or not self._owns(found) or found.batch_size != batch_size:
            found = self._take(place, batch_size, found)
        return found

    def _take(self, place: _Place, batch_size: int, before: StepKernels | None) -> StepKernels:
        """Take kernels from the pool, in place of `before`."""
        launch = kernels.launchers(place[0])
        assert launch is not None

        def make() -> StepKernels:
            return outside_inference_mode(StepKernels)(self.state, launch, place[0], batch_size, place[1])

        has_lost = before is not None and not self._owns(before)
        taken = self.pool.take(self._key(place, batch_size), self, not has_lost, make)
        self._in_use = None  # only now: nothing is lost if memory runs out above
        self._taken[place], snapshot = taken, self._snapshots.pop(place, None)
        if before is not None and before.batch_size != batch_size:
            for name, count in _counts(before.counters if snapshot is None else snapshot[0]).items():
                self._counted[name] = self._counted.get(name, 0) + count
            snapshot = None
            self._leave(before)
        taken.restore(snapshot)
        if before is not None and before.fits:
            taken.fit(*before.fits)
        return taken

    def _key(self, place: _Place, batch_size: int) -> Any:
        """What determines the buffers and the launches of kernels, the layout of pages left out."""
        options, method, recipe = self.state.options, self.state.method, recipe_of(self.state.method)
        assert recipe is not None
        projects = _Identity(method) if recipe.projects_queries else None  # graphs hold the addresses of its tensors
        return (
            place, batch_size, len(self.state.layers), recipe, projects, method.page_size,
            options.budget, options.num_sink_tokens, options.recent_window, options.dense_below, options.tuning,
        )  # fmt: skip

    def on_taken_over(self, kernels: StepKernels) -> None:
        """Keep what kernels leave for the next step, as another cache takes them over."""
        for place, taken in self._taken.items():
            if taken is kernels:
                self._snapshots[place] = kernels.snapshot()

    def in_use(self) -> list[StepKernels]:
        """The kernels of all layers, without duplicates."""
        return self._find_in_use()[0]

    def _find_in_use(self) -> tuple[list[StepKernels], bool]:
        """`in_use`, and whether kernels serve all layers."""
        sequences, found = self.state.sequences, self._in_use
        current = sequences.batch_size, len(sequences.stores)
        if found is None or found[0] != current or not all(map(self._owns, found[1])):
            steps = [self.kernels_of(layer) for layer in self.state.layers if layer.store is not None]
            distinct = list(dict.fromkeys(step for step in steps if step is not None))
            serves = bool(steps) and len(steps) == len(self.state.layers) and None not in steps
            found = self._in_use = (current, distinct, serves)
        return found[1:]

    def make_room(self) -> None:
        """Grow the kernels' buffers for the step that has begun. Otherwise its first layer does."""
        for step in self.in_use():
            step.make_room()

    def read_all(self, length: int) -> bool:
        """Whether kernels serve all layers, and attend to all `length` tokens in a step of one (`StepKernels.may_read_all`)."""
        steps, serves = self._find_in_use()
        return serves and all(step.may_read_all(length) for step in steps)

    def compile_early(self, layer: LayerState, call: Call) -> None:
        """Start to compile the steps behind a prompt, of which `call` is a chunk."""
        kernels = self.kernels_of(layer)
        if kernels is not None:
            compile_behind_prompt(kernels, layer, call, self.row_sizes)

    def wait_for_compiles(self) -> None:
        """Wait for kernels that cluster and summarise, if they are being compiled (`early_compile.py`)."""
        for step in self.in_use():
            wait_for_index(step)

    def counted(self) -> dict[str, int]:
        """Totals of the kernels' counters, by the names of `Counter`. Reads the device."""
        counts = [_counts(each) for each in self._counters()]
        return {c.name: self._counted.get(c.name, 0) + sum(count[c.name] for count in counts) for c in Counter}

    def _counters(self) -> list[Tensor]:
        """Sums of the counters of all layers, [1, len(Counter)] for each device. Does not read the device."""
        with self.pool.lock:
            held = [step.counters for step in self._taken.values() if self._owns(step)]
            held += [counters for counters, *_ in self._snapshots.values()]
            sums = [counters.sum(0, keepdim=True) for counters in held]
        found: dict[torch.device, Tensor] = {}
        for each in [*self._inherited, *sums]:
            found[each.device] = found[each.device] + each if each.device in found else each
        return list(found.values())

    def add_counts(self, counters: Tensor) -> None:
        """Add what kernels of a batch of rows have counted for this cache: [layers, len(Counter)]. Reads the device."""
        for name, count in _counts(counters).items():
            self._counted[name] = self._counted.get(name, 0) + count

    def forget(self) -> None:
        """Leave the kernels, and drop their counts."""
        for step in self._taken.values():
            self._leave(step)
        self._taken.clear()
        self._snapshots.clear()
        self._in_use = None

    def __deepcopy__(self, memo: dict[int, Any]) -> BackendSet:
        """A copied cache takes its own kernels, since descriptors hold addresses. It starts with the same counts.

        These are not read yet: a fork does not wait for the device.
        """
        twin = BackendSet(memo[id(self.state)], deepcopy(self.reference.zones, memo))
        memo[id(self)] = twin
        twin._counted, twin._inherited, twin.row_sizes = dict(self._counted), self._counters(), self.row_sizes
        return twin


class _Identity:
    """An object as a part of a key: equal to itself only, whatever its own `==` says."""

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def _counts(counters: Tensor) -> dict[str, int]:
    """Counts of all layers, by the names of `Counter`. Reads the device."""
    return {counter.name: count for counter, count in zip(Counter, counters.sum(0).tolist(), strict=True)}
