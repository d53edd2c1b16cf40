"""Kernel descriptors and the tensors that they point to: the host work of a decode step on one device.

    begin          position, clock, page directory, padding -> step descriptor; tables of a layer -> layer descriptor
    make_room      scratch that grows with the context
    upload_next    after the launch of a step: step descriptor of the next one-token step

A descriptor is uploaded only if it has changed, in stream order and without waiting. Its fields are listed in
`kernels/descriptor_fields.py`.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..attention.methods.base import FittedTensors, Method, recipe_of
from ..attention.methods.clustering import ClusteringMethod
from ..indexing.fit import fitted_of, unfitted
from ..inference_mode import outside_inference_mode
from ..kernels.descriptor_fields import BIN_TILE_PAGES, LayerField, StepField, summary_field
from ..kernels.launch import power_of_two
from ..kernels.recipe import KernelRecipe
from ..storage.chunked_array import ChunkedArray, make_tables
from ..storage.out_of_memory import allocating
from ..storage.page_store import PageStore
from ..storage.segment_pool import pages_of
from ..storage.tier_budget import coarsely

if TYPE_CHECKING:
    from ..state import CacheState, LayerState

_MIN_PAGES = 512
BASES = (LayerField.KEY_BASIS, LayerField.VALUE_BASIS, LayerField.BASIS_VECTORS, LayerField.KEY_FORWARD)


class Binding:
    """The cache that descriptors are written for.

    Attributes:
        state: the cache's state.
        owner: whose state it is, if several caches use the descriptors in turn; None once the cache does not need them.
        known: inputs from which the step descriptor was last made.
        layer_known: inputs of each layer's descriptor; None if it must be uploaded.
        bases: for each layer the fitted tensors, and what the scan reads in place of them (`Method.scan_basis`).
    """

    def __init__(self, state: CacheState, owner: Any = None) -> None:
        self.state, self.owner = state, owner
        self.known: dict[str, Any] = {}
        self.layer_known: list[Any] = [None] * len(state.layers)
        self.bases: dict[int, tuple[Any, tuple[Tensor, ...]]] = {}

    def end(self) -> None:
        """Drop all references to the cache. Safe at any time: changes nothing for another cache."""
        self.owner = None
        self.known, self.layer_known, self.bases = {}, [], {}
        self.__dict__.pop("state", None)


class Descriptors:
    """Descriptors of the paged layers of one cache at a time on one device.

    Attributes:
        apart: whether each sequence has descriptors of its own (`row_kernels.py`).
        method: the method of the first cache.

    Args:
        state: the state of the first cache.
        device: where the layers' compute tier is.
        batch_size: number of sequences.
        num_heads: KV heads of the layers.
    """

    apart: ClassVar[bool] = False

    def __init__(self, state: CacheState, device: torch.device, batch_size: int, num_heads: int) -> None:
        recipe = recipe_of(state.method)
        assert recipe is not None
        self.recipe = recipe
        self.binding, self.device, self.method = Binding(state), device, state.method
        self.batch_size, self.num_heads = batch_size, num_heads
        self.streams = batch_size * num_heads
        """(sequence, KV head) pairs. Kernels process them independently."""
        self.group = 0
        """Query heads per KV head; 0 until the first layer attends."""
        each = (batch_size,) if self.apart else ()
        self.step = self.new((*each, len(StepField)), torch.int64)
        self.step_fields = [0] * len(StepField)
        """Fields that `step` should hold."""
        self.uploaded: list[int] = []
        """Fields that `step` holds after all launches so far; empty if unknown."""
        self.step_fields[StepField.BUDGET_FRACTION] = budget_fraction(state)
        self.layer_fields = self.new((len(state.layers), *each, len(LayerField)), torch.int64)
        size = self.layer_fields.stride(0) * 8
        self.layer_addresses = torch.arange(len(state.layers), device=device) * size + self.layer_fields.data_ptr()
        self.found_for = self.new((len(state.layers), self.streams, 2), torch.int32, -1)
        """[layers, streams, 2], (stop page, number of outliers) that the outlier marks are for; -1: recompute."""
        self.page_capacity, self.padded_capacity = 0, False
        self.scratch: dict[StepField, Tensor] = {}
        self.padded = False

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, fill: int = 0) -> Tensor:
        """Allocate a filled tensor on the device. Raises CapacityError if memory runs out."""
        with allocating("tables of decode steps", math.prod(shape) * dtype.itemsize):
            return torch.full(shape, fill, dtype=dtype, device=self.device)

    def bind(self, binding: Binding) -> None:
        """Serve another cache from now on. Its next step writes its descriptors. Launches nothing."""
        self.binding, self.uploaded, self.padded = binding, [], False
        for field in (StepField.DIRECTORY, StepField.VALID, StepField.UPTO):
            self.scratch.pop(field, None)
            self.step_fields[field] = 0

    @property
    def state(self) -> CacheState:
        """The state of the cache that is served."""
        return self.binding.state

    def begin(self, layer: LayerState) -> None:
        """Update the step descriptor and the descriptor of `layer`. Cheap if nothing has changed.

        The descriptors of the layers behind it are updated with it, as far as they have changed too: all of them have in the
        first step of a fork, and one upload takes as long as 32.
        """
        self.begin_step()
        changed: dict[int, tuple[PageStore, Any]] = {}
        for other in self.state.layers[layer.number :]:
            known = self._known(other)
            if known is None or known == self.binding.layer_known[other.number]:
                break
            assert other.store is not None
            changed[other.number] = other.store, known
        if changed:
            self._write_layers(layer.number, changed)

    def _write_layers(self, first: int, changed: dict[int, tuple[PageStore, Any]]) -> None:
        """Upload the descriptors of consecutive layers, from number `first` on."""
        layers, layer_known = self.state.layers, self.binding.layer_known
        make_tables([array for store, _ in changed.values() for array in _arrays_of(store)])
        fields = [layer_fields_of(store, self._basis(layers[number])) for number, (store, _) in changed.items()]
        for number in changed:
            layer_known[number] = None  # upload again if this is interrupted
        _upload(fields, self.layer_fields[first : first + len(fields)])
        for number, (_, known) in changed.items():
            layer_known[number] = known

    def _known(self, layer: LayerState) -> Any:
        """What the descriptor of a layer is made from; None for a layer that others serve, or that has no pages yet."""
        store = layer.store
        if store is None or store.device != self.device or store.num_heads != self.num_heads:
            return None
        tables, slots = ((), ()) if store.frames is None else (store.frames.tensors, store.frames.slots)
        return (
            store,
            slots,
            *(basis.data_ptr() for basis in self._basis(layer)),
            *(table.data_ptr() for table in tables),
            *(table.shape[-1] for table in tables),
        )

    def _basis(self, layer: LayerState) -> tuple[Tensor, ...]:
        """The tensors of `BASES` for a layer; none unless pages are coded."""
        if not self.recipe.scans_codes:
            return ()
        held = self.binding.bases.get(layer.number)
        if held is None or held[0] is not layer.fitted:
            held = self.binding.bases[layer.number] = layer.fitted, bases_of(layer, self.state.method)
        return held[1]

    def begin_step(self) -> None:
        """Update the step descriptor to the current step."""
        sequences, known, fields = self.state.sequences, self.binding.known, self.step_fields
        if known.get("step") != sequences.step or known.get("start") != sequences.start:
            follows = known.get("length") == sequences.start and known.get("past_version") == sequences.past_version
            if not follows:
                self.found_for.fill_(-1)
            fields[StepField.POSITION], fields[StepField.CLOCK] = sequences.start, sequences.step
            if known.get("directory") is not sequences.directory or not follows:
                self._write_directory()
            valid = sequences.mask.valid
            self.padded = valid is not None
            if valid is not None and known.get("valid") is not valid:
                self._write_padding(valid)
            self.binding.known = {
                "step": sequences.step, "start": sequences.start, "length": sequences.length,
                "past_version": sequences.past_version, "directory": sequences.directory, "valid": valid, "planned": False,
            }  # fmt: skip
        if fields != self.uploaded:
            self._upload_step(fields)

    def upload_next(self) -> None:
        """Upload the descriptor of the next one-token step, while the device runs the current one."""
        ahead = list(self.step_fields)
        ahead[StepField.POSITION] += 1
        ahead[StepField.CLOCK] += 1
        self._upload_step(ahead)

    def make_room(self) -> None:
        """Grow the scratch for the step that has begun. Does nothing before the first `fit`, as the group is unknown."""
        num_pages = self.state.sequences.num_pages
        if self.group and (num_pages > self.page_capacity or (self.padded and not self.padded_capacity)):
            self._grow(num_pages)

    def most_pages(self) -> int | None:
        """Maximum pages that a query lists, with sinks and window and without padding; None if the budget is a fraction.

        Valid for sparse layers.
        """
        return most_pages(self.state)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: a copied cache makes its own descriptors, since these hold addresses of this cache's memory."""
        return None

    def _write_directory(self) -> None:
        rows = self.state.sequences.directory
        width = max(len(row) for row in rows)
        padded = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)
        self._point({StepField.DIRECTORY: padded.to(self.device, non_blocking=True)})
        self.step_fields[StepField.DIRECTORY_STRIDE] = width

    def _write_padding(self, valid: Tensor) -> None:
        bits = valid.to(torch.uint8).contiguous().to(self.device, non_blocking=True)
        upto = torch.nn.functional.pad(bits.cumsum(1, dtype=torch.int32), (1, 0)).contiguous()
        self._point({StepField.VALID: bits, StepField.UPTO: upto})
        self.step_fields[StepField.BASE_TOKENS] = bits.shape[1]

    def _grow(self, num_pages: int) -> None:
        """Allocate scratch for contexts of at least `num_pages` pages."""
        pages = capacity_for(num_pages)
        # A padded page may hold a single valid token, so padding gives no bound.
        most = None if self.padded or self.recipe.dense_layers else self.most_pages()
        listed = pages if most is None else min(pages, most)

        self.page_capacity = 0  # allocate again if this is interrupted
        self.found_for.fill_(-1)
        self._point(
            new_scratch(self.recipe, self.device, self.streams, self.group, len(self.state.layers), pages, listed)
        )
        self.step_fields[StepField.PAGE_CAPACITY] = self.page_capacity = pages
        self.step_fields[StepField.LIST_CAPACITY] = listed
        self.padded_capacity = self.padded
        self._upload_step(self.step_fields)

    def _point(self, tensors: dict[StepField, Tensor]) -> None:
        """Store tensors, and their addresses for the next upload."""
        self.scratch |= tensors
        for field, tensor in tensors.items():
            self.step_fields[field] = tensor.data_ptr()

    def _upload_step(self, fields: list[int]) -> None:
        self.uploaded = []
        _upload(fields, self.step)
        self.uploaded = list(fields)


def budget_fraction(state: CacheState) -> int:
    """The content of BUDGET_FRACTION."""
    budget = state.options.budget
    (bits,) = struct.unpack("<q", struct.pack("<d", budget if isinstance(budget, float) else 0.0))
    return int(bits)


def most_pages(state: CacheState) -> int | None:
    """As `Descriptors.most_pages`."""
    options, page_size = state.options, state.method.page_size
    if isinstance(options.budget, float):
        return None
    zones = pages_of(options.num_sink_tokens, page_size) + pages_of(options.recent_window, page_size)
    return -(-max(options.budget, options.dense_tokens) // page_size) + zones


def bases_of(layer: LayerState, method: Method) -> tuple[Tensor, ...]:
    """What the scan over coded pages reads in place of a layer's fitted tensors: the tensors of `BASES`. Not written to."""
    store = layer.store
    assert store is not None
    if layer.fitted is not None:
        return _bases(method, fitted_of([layer], method), store.dtype)
    sizes = store.sequences.batch_size, store.num_heads, store.key_dim, store.value_dim
    return _unfitted_bases(method, sizes, store.dtype, store.device)


@lru_cache(maxsize=8)
@outside_inference_mode
def _unfitted_bases(
    method: Method, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """`bases_of` before the fit: one for all layers of these sizes, and for all caches."""
    assert isinstance(method, ClusteringMethod)
    return _bases(method, unfitted(method, sizes, device), dtype)


def _bases(method: Method, fitted: FittedTensors | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    basis = method.scan_basis(fitted, dtype)
    vectors = torch.cat([basis.origin, basis.widths, basis.value_origin, basis.value_widths], -1)
    return basis.inverse, basis.value_axes, vectors, basis.forward


def layer_fields_of(store: PageStore, bases: tuple[Tensor, ...]) -> list[int]:
    """The descriptor of a layer with these pages; `bases` is empty unless pages are coded."""
    fields, frames = [0] * len(LayerField), store.frames
    make_tables(_arrays_of(store))
    fields[LayerField.BACKING] = store.backing.address_table.data_ptr()
    for i, summary in enumerate(store.summaries.values()):
        for j, array in enumerate(summary.arrays):
            fields[summary_field(i, j)] = array.address_table.data_ptr()
    for field, basis in zip(BASES, bases, strict=False):
        fields[field] = basis.data_ptr()
    if frames is not None:
        fields[LayerField.FRAMES] = frames.frames.data_ptr()
        fields[LayerField.NUM_SLOTS] = frames.num_slots if frames.slot_counts is None else -1
        fields[LayerField.SLOT_COUNTS] = 0 if frames.slot_counts is None else frames.slot_counts.data_ptr()
        fields[LayerField.PAGE_SLOT] = frames.page_slot.data_ptr()
        fields[LayerField.PAGE_SLOT_STRIDE] = frames.page_slot.shape[2]
        fields[LayerField.SLOT_PAGE] = frames.slot_page.data_ptr()
        fields[LayerField.SLOT_STEP] = frames.slot_step.data_ptr()
    return fields


def _arrays_of(store: PageStore) -> list[ChunkedArray]:
    """The arrays whose address tables kernels read."""
    return [store.backing, *(array for summary in store.summaries.values() for array in summary.arrays)]


def new_scratch(
    recipe: KernelRecipe, device: torch.device, streams: int, group: int, num_layers: int, pages: int, listed: int
) -> dict[StepField, Tensor]:
    """Allocate what grows with the context, for `pages` pages per sequence and page lists of `listed` pages.

    Raises:
        CapacityError: memory ran out.
    """

    def make(width: int, dtype: torch.dtype) -> Tensor:
        with allocating("buffers of decode steps", streams * width * dtype.itemsize):
            return torch.empty((streams, width), dtype=dtype, device=device)

    outliers, reranks = recipe.outliers_per_1024 > 0, recipe.rerank_factor > 0
    return {
        StepField.LOGITS: make(group * pages, torch.float32),
        StepField.SCORES: make(pages, torch.float32),
        StepField.OUTLIER: make(num_layers * pages * outliers, torch.uint8),
        StepField.RERANK: make(group * pages * reranks, torch.float32),
        StepField.BIN_LIST_PAGE: make(pages, torch.int32),
        StepField.BIN_LIST_SCORE: make(pages, torch.float32),
        StepField.BIN_LIST_LENGTH: make(-(-pages // BIN_TILE_PAGES), torch.int32),
        StepField.TIED: make(pages, torch.int64),
        StepField.LIST_PAGE: make(listed, torch.int32),
        StepField.VICTIMS: make(listed, torch.int32),
    }


def capacity_for(num_pages: int) -> int:
    """Capacity in pages of a step's buffers, for a context of `num_pages` pages that grows.

    A multiple of `BIN_TILE_PAGES` if larger: entry i of list j is at i * num_lists + j, and lists may differ in length.
    """
    if num_pages <= BIN_TILE_PAGES:
        return max(_MIN_PAGES, power_of_two(num_pages))
    return -(-coarsely(num_pages) // BIN_TILE_PAGES) * BIN_TILE_PAGES


def _upload(fields: list[Any], descriptor: Tensor) -> None:
    """Write descriptors in stream order. The host does not wait: CUDA stages so small a copy at once."""
    descriptor.copy_(torch.tensor(fields), non_blocking=True)
