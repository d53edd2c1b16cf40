"""The Triton backend: kernels of a decode step on one device, their buffers, and the launches of a layer in order.

    append_tokens    tokens to pages, also for a prefill; ShadowKV's summaries
    plan_zones       once per step for all layers; a second time if some layers are dense
    find_outliers    ShadowKV only, once per step for all layers
    dense steps      attend_segments, which also appends the token, in place of all below
    per query        score_pages, rank_pages (`Selection`), estimate_rest, attend_pages;
                     in a one-token step score_pages appends the token
    with reranking   bin_scores, rerank_pages, select_pages in place of rank_pages
    with coded pages project_queries, scan_pages, which appends the token, rank_pages, attend_pages

Launches do not wait for the host, and kernels do not allocate. `zones.py`, `reference.py` and `kernels.reference` specify the
results; `tests/backends/test_triton_step.py` compares both backends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..attention.methods import four_bit_keys
from ..attention.methods.base import Method
from ..config import MOST_TOKENS
from ..kernels import device_limits
from ..kernels.descriptor_fields import MAX_QUERIES, NUM_BINS, Counter, PlanField
from ..kernels.launch import (
    Launch,
    LaunchShape,
    LayerBuffers,
    ScanBuffers,
    Splits,
    StepBuffers,
    product_columns,
    rerank_sizes,
)
from ..storage.out_of_memory import allocating
from ..storage.page_table import SEGMENT_PAGES
from .base import AttentionBackend, Call
from .descriptors import Descriptors

if TYPE_CHECKING:
    from ..kernels.triton_launchers import Launchers
    from ..state import CacheState, LayerState

_ANY_LENGTH = (1 << 31) - 1


class StepKernels(Descriptors, AttentionBackend):
    """Launches for the paged layers of one cache at a time on one device.

    Args:
        state, device, batch_size, num_heads: as for `Descriptors`; another batch needs another object.
        launchers: the kernels, from `kernels.launchers`.
    """

    capturable = True
    least_splits: ClassVar[int] = 1
    """Programs per stream at least, where there are many streams."""

    def __init__(
        self, state: CacheState, launchers: Launchers, device: torch.device, batch_size: int, num_heads: int
    ) -> None:
        Descriptors.__init__(self, state, device, batch_size, num_heads)
        self.launchers = launchers
        self.fits: tuple[Any, ...] = ()
        self.compiled_variants: set[tuple[Any, ...]] = set()
        """Variants of attention launches that were compiled ahead, in parallel."""
        self.early: dict[Any, dict[bool, Any]] = {}
        """What is compiled on background threads (`early_compile.py`), by shape and by whether a step reads all tokens."""
        self.compiling: list[Any] = []
        """What is compiled there that clusters and summarises a prompt, as long as nobody has waited for it."""
        self.graphs: dict[Any, Any] = {}
        """Call -> captured step that holds addresses of these buffers; None if the call has run once, eagerly."""
        self.key: Any = None
        self.last_stream: Any = None
        """Of the pool (`kernel_pool.py`): what these kernels were made for, and the stream of the last forward."""
        self.compiled = device.type == "cuda"
        self.multiplies_int8, self.shared_memory = device_limits.multiplies(device), device_limits.shared_memory(device)
        self.overlaps = device_limits.overlaps_launches(device)
        layers, streams = len(state.layers), self.streams
        plans = (MAX_QUERIES, batch_size, len(PlanField))
        self.zone_plan = self.new(plans, torch.int32)
        self.dense_plan = self.new(plans if self.recipe.dense_layers else (0,), torch.int32)
        """The plan of dense layers."""
        self.outlier_edges = self.new((layers, streams), torch.int64)
        each = (batch_size,) if self.apart else ()
        self.counters = self._by_layer((*each, len(Counter)), torch.int64)
        """[layers, len(Counter)], counters of the kernels; of each sequence if they are apart."""
        reranked = streams if self.recipe.rerank_factor else 0
        floors, rerank_floors, hands = (self._by_layer((n,), torch.int32) for n in (streams, reranked, streams))
        self.carried = ((self.counters, 0), (floors, NUM_BINS), (rerank_floors, NUM_BINS), (hands, 0))
        """Tensors that a step leaves for the next one, and what they are filled with before the first step."""
        self.restore(None)
        per_layer = zip(self.layer_fields, floors, rerank_floors, hands, self.counters, strict=True)
        self.layer_buffers = [LayerBuffers(number, *tensors) for number, tensors in enumerate(per_layer)]
        most, empty = self.most_pages(), self.new((0,), torch.float32)
        self.buffers = StepBuffers(
            splits=Splits.choose(
                streams, programs=max(state.options.tuning.programs, self.least_splits * streams),
                estimates=self.recipe.estimated_fraction > 0, scans_codes=self.recipe.scans_codes,
                most_tokens=None if most is None else most * state.method.page_size,
            ),
            step=self.step, histogram=self.new((streams, NUM_BINS), torch.int32),
            rerank_histogram=self.new((reranked, NUM_BINS), torch.int32), zone_edges=self.new((streams,), torch.int32),
            list_count=self.new((streams, 2), torch.int32), arrivals=self.new((streams,), torch.int32), stats=empty,
            split_outputs=empty, basis=empty, rotated=empty, operands=empty, factors=empty, rerank_stats=empty,
        )  # fmt: skip
        self.scan: ScanBuffers | None = None
        """`fit` allocates the empty ones, and `scan` if pages have codes."""
        self.selection = Selection(self)

    def _by_layer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros [layers, *shape]. Each layer begins at a multiple of 16 bytes: other addresses need another kernel variant."""
        numbers, each = math.prod(shape), 16 // dtype.itemsize
        return self.new((len(self.state.layers), -(-numbers // each) * each), dtype)[:, :numbers].unflatten(1, shape)

    def fit(self, group: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
        """Allocate buffers for `group` query heads per KV head. Captured launches hold their addresses.

        Raises:
            CapacityError: memory ran out. The next call tries again.
        """
        fits, splits = (group, key_dim, value_dim, dtype), self.buffers.splits
        if fits == self.fits or not group:
            return
        num_splits = (splits.dense if self.recipe.dense_layers else splits.attend) + splits.estimate
        width = max(num_splits * 2 * value_dim, splits.whole * (value_dim + 1)) * group

        def new(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty((self.streams, width), dtype=dtype, device=self.device)

        with allocating("buffers of decode steps", 4 * self.streams * width):
            stats = new(splits.score * 2 * max(16, product_columns(group, False)))
            buffers = replace(self.buffers, split_outputs=new(width), stats=stats)
            if self.recipe.rerank_factor:
                digits, columns, key_bytes = rerank_sizes(group, key_dim, dtype, self.multiplies_int8)
                rows = 2 * columns * (2 if digits else 1)
                buffers = replace(
                    buffers, rotated=new(group * key_dim), operands=new(rows * key_bytes, torch.int8 if digits else dtype),
                    factors=new(4 * columns), rerank_stats=new(splits.programs * 3 * columns),
                    basis=four_bit_keys.basis(key_dim, self.device).to(dtype),
                )  # fmt: skip
            scan = None
            if self.recipe.scans_codes:
                scan = ScanBuffers.allocate(
                    self.streams, group, splits, key_dim, value_dim, self.multiplies_int8, self.device
                )
        self.page_capacity = 0  # the scratch depends on the group too: `_grow` allocates it again
        self.graphs.clear()
        self.buffers, self.scan, self.fits, self.group = buffers, scan, fits, group

    def snapshot(self) -> list[Tensor]:
        """Copies of what a step leaves for the next one, the counters first."""
        return [tensor.clone() for tensor, _ in self.carried]

    def restore(self, snapshot: list[Tensor] | None) -> None:
        """Continue from a `snapshot`; None to begin anew."""
        for index, (tensor, initial) in enumerate(self.carried):
            tensor.fill_(initial) if snapshot is None else tensor.copy_(snapshot[index])

    def prepare(self, layer: LayerState) -> None:
        """Do the host work of a layer's launches for the step that has begun."""
        self.begin(layer)
        self.selection.place(layer)

    # ---------------------------------------------------------------------------------------------------- the launches

    def plan(self, layer: LayerState, call: Call) -> None:
        """Allocate the buffers of `call` and of later steps."""
        assert layer.store is not None
        self.fit(call.query.shape[2], layer.store.key_dim, layer.store.value_dim, layer.store.dtype)

    def append(self, layer: LayerState, key: Tensor, value: Tensor) -> bool:
        """Write the step's tokens [B, H, n, D] to a layer's pages. Summarizes completed pages if the recipe says so."""
        self.begin(layer)
        sequences = self.state.sequences
        self.launchers.append_tokens(
            self.launchers.launch_now, self.buffers, self.layer_buffers[layer.number], _rows(key), _rows(value),
            num_pages=sequences.num_pages - sequences.start // sequences.page_size,
            summarizes=self.recipe.summarised_by_append, shape=self.shape(layer),
        )  # fmt: skip
        return self.recipe.summarised_by_append

    def attend(self, layer: LayerState, call: Call, out: Tensor, new: tuple[Tensor, Tensor] | None = None) -> None:
        """As `AttentionBackend.attend`, in launches that do not wait for the host."""
        self.begin(layer)
        self.plan(layer, call)
        self.make_room()
        shape = self.shape(layer)
        new = None if new is None else (_rows(new[0]), _rows(new[1]))
        query, reads_all = _rows(call.query.flatten(1, 2)), self.reads_segments()

        def launches(launch: Launch) -> None:
            self.launch_attention(launch, layer, query, call, out, new, shape, reads_all)

        def launches_and_encodes(launch: Launch) -> None:
            launches(launch)
            if (
                self.recipe.scans_codes and not reads_all
            ):  # what a later step launches, for a page that is complete then
                self.launchers.encode_last_unit(
                    launch, self.step, self.layer_addresses, batch_size=self.batch_size, first=0, num_pages=1, shape=shape
                )  # fmt: skip

        variant = (shape, self.is_dense_layer(layer), new is None, query.shape[2] == 1, reads_all)
        if variant not in self.compiled_variants:
            early = self.early.get((shape, self.is_dense_layer(layer)), {}).get(reads_all)
            if early is not None:
                self.launchers.wait_for_compiles(early)
            self.launchers.compile_ahead(launches_and_encodes)
            self.compiled_variants.add(variant)
        launches(self.launchers.launch_now)
        self.binding.known["planned"] = True

    def launch_attention(
        self, launch: Launch, layer: LayerState, query: Tensor, call: Call, out: Tensor, new: tuple[Tensor, Tensor] | None,
        shape: LaunchShape, reads_all: bool,
    ) -> None:  # fmt: skip
        """The launches of `attend`: those for all layers if this is the step's first layer, then those of each query.

        Args:
            reads_all: whether a step of one token attends to whole segments.
        """
        launchers, buffers, own = self.launchers, self.buffers, self.layer_buffers[layer.number]
        num_queries, dense = query.shape[2], self.is_dense_layer(layer)
        if num_queries == 1 and reads_all:
            launchers.attend_segments(
                launch, buffers, own, query, out[:, 0], call.sinks, new, summarizes=self.recipe.summarised_by_append,
                scale=call.scale, softcap=call.softcap, shape=shape,
            )  # fmt: skip
            return
        if not self.binding.known["planned"]:
            self._plan(launch, num_queries)
            if num_queries == 1:  # one launch for all layers: a page that this step completes is not a candidate yet
                served = [other for other in self.state.layers if self.serves(other)]
                for layers in [served] if len(served) == len(self.state.layers) else [[other] for other in served]:
                    self._find_outliers(launch, self.zone_plan[0], layers)
        for i in range(num_queries):
            one, plan = query[:, :, i : i + 1], (self.dense_plan if dense else self.zone_plan)[i]
            if num_queries > 1:
                self._find_outliers(launch, self.zone_plan[i], [layer])
            self.selection.select(launch, layer, plan, one, i, call, new, shape)
            if buffers.splits.estimate:
                launchers.estimate_rest(
                    launch, buffers, own, plan, group=self.group, softcap=call.softcap, recipe=self.recipe, shape=shape
                )
            launchers.attend_pages(
                launch, buffers, own, one, out[:, i], call.sinks, query_index=i, num_queries=num_queries, dense=dense,
                scale=call.scale, softcap=call.softcap, shape=shape, scan=self.scan, plan=plan,
            )  # fmt: skip

    def _plan(self, launch: Launch, num_queries: int) -> None:
        options = self.state.options
        plans = [(self.zone_plan, options.dense_tokens)]
        if self.recipe.dense_layers:
            plans.append((self.dense_plan, _ANY_LENGTH))
        for plan, dense_below in plans:
            self.launchers.plan_zones(
                launch, self.step, plan, num_queries=num_queries, num_sink_tokens=options.num_sink_tokens,
                recent_window=options.recent_window, budget=options.budget if isinstance(options.budget, int) else 0,
                dense_below=dense_below, outliers_per_1024=self.recipe.outliers_per_1024,
                page_size=self.method.page_size, padded=self.padded, apart=self.apart,
            )  # fmt: skip

    def _find_outliers(self, launch: Launch, plan: Tensor, layers: list[LayerState]) -> None:
        """Find outlier pages in consecutive layers for the query of `plan`."""
        if not self.recipe.outliers_per_1024:
            return
        for layer in layers:
            self.begin(layer)
        self.launchers.find_outliers(
            launch, self.step, self.layer_addresses, plan, self.outlier_edges, self.found_for,
            first_layer=layers[0].number, num_layers=len(layers), shape=self.shape(layers[0]),
        )  # fmt: skip

    def reads_segments(self) -> bool:
        """Whether the current step attends to whole segments."""
        return self.state.reads_all

    # ----------------------------------------------------------------------------------------------------- of a layer

    def serves(self, layer: LayerState) -> bool:
        """Whether a layer's pages have this device and number of KV heads."""
        store = layer.store
        return store is not None and (store.device, store.num_heads) == (self.device, self.num_heads)

    def may_read_all(self, length: int) -> bool:
        """Whether a step of one token should attend to whole segments in all layers: as told to, or because that is faster.

        Args:
            length: tokens with the step's own.
        """
        resident = (layer.store is not None and layer.store.frames is None for layer in self.state.layers)
        return self.pays_to_read_all([length] * self.batch_size) and all(resident)

    def pays_to_read_all(self, lengths: Sequence[int]) -> bool:
        """`may_read_all` for sequences of these `lengths`, if all pages are in the compute tier.

        Selecting takes some time, and then saves the tokens that it does not read. So what counts is the sum of these.
        """
        options = self.state.options
        budget = options.budget if isinstance(options.budget, int) else MOST_TOKENS if options.budget >= 1.0 else 0
        if max(lengths) <= max(budget, options.dense_tokens):
            return True
        store = next((layer.store for layer in self.state.layers if self.serves(layer)), None)
        if options.dense_below != "auto" or store is None:
            return False
        room = options.tuning.dense_factor * self.recipe.overhead_us * device_limits.bytes_per_us(self.device)
        crossover = int(room / (self.num_heads * (store.key_dim + store.value_dim) * store.dtype.itemsize))
        """Tokens of one sequence for which both take the same time."""
        return sum(max(0, length - budget) for length in lengths) <= crossover - budget

    def is_dense_layer(self, layer: LayerState) -> bool:
        """Whether a layer attends to all tokens, regardless of the budget."""
        return layer.number < self.recipe.dense_layers

    def layout(self, layer: LayerState) -> LaunchShape:
        """Compile-time parameters of a layer's kernels that do not depend on padding."""
        return replace(self.shape(layer), padded=False)

    def shape(self, layer: LayerState) -> LaunchShape:
        """Compile-time parameters of a layer's kernels."""
        store = layer.store
        assert store is not None
        return LaunchShape(
            dtype=store.dtype, quantized=tuple(summary.quantized for summary in store.summaries.values()),
            num_heads=self.num_heads, key_dim=store.key_dim, value_dim=store.value_dim, page_size=store.page_size,
            page_bytes=store.layout.row_bytes, backing_bytes=0 if store.backing_layout == store.layout else
            store.backing_layout.row_bytes, segment_pages=SEGMENT_PAGES, rows_per_chunk=store.backing.rows_per_chunk,
            padded=self.padded, multiplies_int8=self.multiplies_int8, shared_memory=self.shared_memory,
            compiled=self.compiled, overlaps=self.overlaps,
            apart=self.apart,
        )  # fmt: skip


def _rows(states: Tensor) -> Tensor:
    """`states` with a contiguous last dimension."""
    return states if states.stride(-1) == 1 else states.contiguous()


class Selection:
    """Page selection of one cache on one device.

    Args:
        step: the kernels that it belongs to.
    """

    def __init__(self, step: StepKernels) -> None:
        self.step = step
        self.placed_by: dict[int, Method] = {}
        """Layer -> method with tensors that its launches read. Keeps the tensors alive."""

    def place(self, layer: LayerState) -> tuple[Tensor, ...]:
        """Move the method's tensors for a layer to the device, and return them."""
        method = self.step.method
        tensors = method.projection_tensors(layer.number, self.step.device)
        self.placed_by[layer.number] = method
        return tensors

    def select(
        self, launch: Launch, layer: LayerState, plan: Tensor, query: Tensor, index: int, call: Call,
        new: tuple[Tensor, Tensor] | None, shape: LaunchShape,
    ) -> None:  # fmt: skip
        """List the pages of the step's query `index` and assign slots to the missing ones.

        Args:
            plan: int32 [B, len(PlanField)], of this query.
            query: [B, heads, 1, Dk]; call: of all queries.
            new: as for `StepKernels.attend`.
        """
        step, launchers, recipe = self.step, self.step.launchers, self.step.recipe
        buffers, own, scale = step.buffers, step.layer_buffers[layer.number], call.scale
        if recipe.projects_queries:
            states, positions = query.unflatten(1, (step.num_heads, -1)).squeeze(3), plan[:, PlanField.OWN_POSITION]
            query = step.method.project_queries(states, positions, layer.number).contiguous()
            scale = 1.0
        group = query.shape[1] // step.num_heads
        if step.scan is None:
            launchers.score_pages(launch, buffers, own, plan, query, new, scale=scale, recipe=recipe, shape=shape)
        else:
            launchers.project_queries(launch, buffers, step.scan, own, query, scale=scale, shape=shape)
            launchers.scan_pages(
                launch, buffers, step.scan, own, plan, new, group=group, softcap=call.softcap, shape=shape
            )
        chosen: dict[str, Any] = dict(
            query_index=index, group=group, most_listed=step.most_pages(), recipe=recipe, shape=shape
        )
        if not recipe.rerank_factor:
            launchers.rank_pages(launch, buffers, own, plan, **chosen, scan=step.scan)
            return
        launchers.bin_scores(launch, buffers, own, plan, query, scale=scale, recipe=recipe, shape=shape)
        launchers.rerank_pages(launch, buffers, own, plan, group=group, recipe=recipe, shape=shape)
        launchers.select_pages(launch, buffers, own, plan, **chosen)
