"""The descriptors of one cache of one sequence, as numbers on the host, for any place in a batch of rows.

    values     what the descriptors of the cache alone hold                     step [F], layers [L, F]
    strides    bytes by which a kernel moves an address for each sequence       0 for fields that are no addresses
    row b      values - b * strides: sequence b of the batch then lies where the cache's sequence 0 does

So kernels index tables by the sequence's place in the batch (`kernels/common.py: own_step`), and pages, frames and scratch are
those of the cache, wherever it stands. The scratch belongs to the cache as well: rows may differ much in length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.descriptor_fields import BIN_TILE_PAGES, LayerField, StepField
from ..kernels.recipe import KernelRecipe
from .descriptors import BASES, bases_of, budget_fraction, capacity_for, layer_fields_of, most_pages, new_scratch

if TYPE_CHECKING:
    from ..state import CacheState, LayerState

_PER_SEQUENCE = (
    StepField.LOGITS, StepField.SCORES, StepField.RERANK, StepField.BIN_LIST_PAGE, StepField.BIN_LIST_SCORE,
    StepField.BIN_LIST_LENGTH, StepField.TIED, StepField.LIST_PAGE, StepField.VICTIMS,
)  # fmt: skip


class RowDescriptors:
    """Descriptors of the layers of one cache with one device and number of KV heads.

    Args:
        state: of the cache, which has pages and one sequence.
        device, num_heads: of the layers.
        recipe: of the method.
    """

    def __init__(self, state: CacheState, device: torch.device, num_heads: int, recipe: KernelRecipe) -> None:
        self.state, self.device, self.num_heads, self.recipe = state, device, num_heads, recipe
        self.step, self.step_strides = (np.zeros(len(StepField), dtype=np.int64) for _ in range(2))
        self.layers, self.layer_strides = (
            np.zeros((len(state.layers), len(LayerField)), dtype=np.int64) for _ in range(2)
        )
        self.step[StepField.BUDGET_FRACTION] = budget_fraction(state)
        self.changes = 0
        """Counts changes of `step`, position and clock left out, and of `layers`."""
        self.past_version = -1
        """Of the page table, when the descriptors were written."""
        self.page_capacity = 0
        self.counts: Tensor | None = None
        """What kernels that the cache has left have counted."""
        self.resident = False
        """Whether all pages are in the compute tier."""
        self._known: tuple[Any, ...] = ()
        self._fits: list[Any] = []
        self._bases: dict[int, tuple[Any, tuple[Tensor, ...]]] = {}
        self._directory: Any = None
        self._held: dict[StepField, Tensor] = {}
        """Scratch and directory, which the descriptors point to."""
        self.refresh()

    def refresh(self) -> None:
        """Follow the cache: its page table, memory and fitted tensors. Cheap if nothing has changed."""
        sequences = self.state.sequences
        if sequences.directory is not self._directory or sequences.past_version != self.past_version:
            self._write_directory(sequences.directory)
            self.past_version = sequences.past_version
        fits = [layer.fitted for layer in self.state.layers]
        known = (sequences.memory_version, sequences.layout_version, *map(id, fits))
        if known != self._known:
            for layer in self._served():
                self._write_layer(layer)
            self._known, self._fits = known, fits  # while held, no other object has their ids
            self.changes += 1

    def make_room(self, group: int) -> bool:
        """Allocate scratch for the context, if it has grown. Returns whether it did.

        Args:
            group: query heads per KV head.
        Raises:
            CapacityError: memory ran out.
        """
        if self.state.sequences.num_pages <= self.page_capacity:
            return False
        pages = capacity_for(self.state.sequences.num_pages)
        most = None if self.recipe.dense_layers else most_pages(self.state)
        listed = pages if most is None else min(pages, most)
        self.page_capacity = 0  # allocate again if this is interrupted
        for field in _PER_SEQUENCE:
            self._held.pop(field, None)
        heads, number = self.num_heads, len(self.state.layers)
        scratch = new_scratch(self.recipe, self.device, heads, group, number, pages, listed)
        for field, tensor in scratch.items():
            self._point(field, tensor, tensor.nbytes)
        if self.recipe.projects_queries:  # one projected query per KV head is scored
            self.step_strides[StepField.LOGITS] = scratch[StepField.LOGITS].nbytes // group
        self.step_strides[StepField.OUTLIER] = scratch[StepField.OUTLIER].nbytes // number
        self.step_strides[StepField.BIN_LIST_LENGTH] = heads * -(-pages // BIN_TILE_PAGES) * 4
        self.step[StepField.PAGE_CAPACITY] = self.page_capacity = pages
        self.step[StepField.LIST_CAPACITY] = listed
        self.changes += 1
        return True

    def add_counts(self, counters: Tensor) -> None:
        """Add counts of kernels, [layers, len(Counter)]."""
        self.counts = counters.clone() if self.counts is None else self.counts + counters

    def _served(self) -> list[LayerState]:
        place = self.device, self.num_heads
        return [
            layer
            for layer in self.state.layers
            if layer.store is not None and (layer.store.device, layer.store.num_heads) == place
        ]

    def _point(self, field: StepField, tensor: Tensor, stride: int) -> None:
        self._held[field] = tensor
        self.step[field], self.step_strides[field] = tensor.data_ptr(), stride

    def _write_directory(self, directory: list[list[int]]) -> None:
        (segments,) = directory
        tensor = torch.tensor(segments, dtype=torch.int32).to(self.device, non_blocking=True)
        self._point(StepField.DIRECTORY, tensor, tensor.nbytes)
        self.step[StepField.DIRECTORY_STRIDE] = len(segments)
        self._directory = directory
        self.changes += 1

    def _write_layer(self, layer: LayerState) -> None:
        store, number = layer.store, layer.number
        assert store is not None
        bases: tuple[Tensor, ...] = ()
        if self.recipe.scans_codes:
            held = self._bases.get(number)
            if held is None or held[0] is not layer.fitted:
                held = self._bases[number] = layer.fitted, bases_of(layer, self.state.method)
            bases = held[1]
        fields, strides = layer_fields_of(store, bases), [0] * len(LayerField)
        for field, basis in zip(BASES, bases, strict=False):
            strides[field] = basis.nbytes
        if store.frames is not None:  # one sequence: all frames and tables are its own
            frames = store.frames
            slots = self.num_heads * frames.num_slots
            strides[LayerField.FRAMES] = slots * store.layout.row_bytes
            strides[LayerField.SLOT_PAGE], strides[LayerField.SLOT_STEP] = slots * 4, slots * 8
            strides[LayerField.PAGE_SLOT] = self.num_heads * frames.page_slot.shape[2] * 4
        self.layers[number], self.layer_strides[number] = fields, strides
        self.resident = all(each.store is None or each.store.frames is None for each in self.state.layers)


def layout_of(state: CacheState) -> tuple[Any, ...]:
    """What launches for several rows must have in common: sizes and layouts of the pages of all layers."""
    stores = [layer.store for layer in state.layers]
    return tuple(
        None if store is None else (
            store.device, store.dtype, store.num_heads, store.key_dim, store.value_dim, store.layout.row_bytes,
            store.backing_layout.row_bytes, store.backing.rows_per_chunk,
            tuple(summary.quantized for summary in store.summaries.values()),
        )
        for store in stores
    )  # fmt: skip
