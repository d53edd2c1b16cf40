"""The backends of one cache: the reference, and one `StepKernels` per device and number of KV heads of the current batch."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from .. import kernels
from ..attention.methods.base import recipe_of
from ..inference_mode import outside_inference_mode
from ..integration.compile_bar import show_compiles
from ..kernels.compile_progress import report_by
from ..kernels.descriptor_fields import Counter
from ..state import CacheState, LayerState
from .base import AttentionBackend
from .reference import ReferenceBackend
from .triton_step import StepKernels
from .zones import StepPlan

report_by(show_compiles)


class BackendSet:
    """Creates and holds the backends of one cache.

    Args:
        state: the cache's state.
        zones: plans of the step's queries, for the reference.
    """

    def __init__(self, state: CacheState, zones: StepPlan) -> None:
        self.state = state
        self.reference = ReferenceBackend(state, zones)
        self._made: dict[tuple[torch.device, int], StepKernels] = {}
        self._in_use: tuple[tuple[int, int], list[StepKernels]] | None = None
        self._counted: dict[str, int] = {}
        """Counts of kernels that were replaced."""

    def of(self, layer: LayerState) -> AttentionBackend:
        """The backend of a layer with pages: kernels where device and method have them, else the reference."""
        return self.kernels_of(layer) or self.reference

    def kernels_of(self, layer: LayerState) -> StepKernels | None:
        """The kernels of a layer with pages; None if the reference serves it."""
        assert layer.store is not None
        key, batch_size = (layer.store.device, layer.store.num_heads), self.state.sequences.batch_size
        launch, found = kernels.launchers(key[0]), self._made.get(key)
        if launch is None or (found is None and recipe_of(self.state.method) is None):
            return None
        if found is None or found.batch_size != batch_size:
            counts = [] if found is None else found.counters.sum(0).tolist()
            made = outside_inference_mode(StepKernels)(self.state, launch, key[0], batch_size, key[1])
            if found is not None:
                if found.fits:
                    made.fit(*found.fits)
                for counter, count in zip(Counter, counts, strict=True):
                    self._counted[counter.name] = self._counted.get(counter.name, 0) + count
            found = self._made[key] = made
            self._in_use = None
        return found

    def in_use(self) -> list[StepKernels]:
        """The kernels of all layers, without duplicates."""
        sequences, found = self.state.sequences, self._in_use
        if found is None or found[0] != (sequences.batch_size, len(sequences.stores)):
            steps = [self.kernels_of(layer) for layer in self.state.layers if layer.store is not None]
            distinct = list(dict.fromkeys(step for step in steps if step is not None))
            found = self._in_use = ((sequences.batch_size, len(sequences.stores)), distinct)
        return found[1]

    def counted(self) -> dict[str, int]:
        """Totals of the kernels' counters, by the names of `Counter`. Reads the device."""
        counts = [step.counters.sum(0).tolist() for step in self._made.values()]
        return {c.name: self._counted.get(c.name, 0) + sum(count[c] for count in counts) for c in Counter}

    def forget(self) -> None:
        """Drop the kernels and their counts."""
        self._made.clear()
        self._in_use = None

    def __deepcopy__(self, memo: dict[int, Any]) -> BackendSet:
        """A copied cache makes its own kernels, since descriptors hold addresses. It starts with the same counts."""
        twin = BackendSet(memo[id(self.state)], deepcopy(self.reference.zones, memo))
        memo[id(self)] = twin
        twin._counted = self.counted()
        return twin
