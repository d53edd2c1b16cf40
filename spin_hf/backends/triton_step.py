"""The kernels of a decode step on one device: their sizes and buffers, and the launches of one layer.

    append    1 launch              tokens to pages, of a prefill too; ShadowKV's summaries
    attend    4 launches a query    score -> rate -> choose and retrieve (`backends/triton_selection.py`) -> attend; `score`
    appends the token of a step; methods that look closer or estimate have up to 3 more
              2 a step              for all layers: plan_step, find_outliers; plan_step twice where some layers attend to all

No launch waits for the host, and no kernel allocates. What the kernels compute is what `plan`, `attend` and `kernels.reference`
specify; `tests/kernels/test_decode.py` holds both against each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels import device_limits
from ..kernels.descriptor_fields import BINS_PER_NAT, MAX_QUERIES, NUM_BINS, Counter, PlanField
from ..storage.out_of_memory import kept
from ..storage.page_table import SEGMENT_PAGES
from .descriptors import Descriptors, power_of_two
from .reference import Call
from .triton_selection import Selection, segments_at_a_time, some

if TYPE_CHECKING:
    from ..layer import SpinLayer
    from ..state import SharedState
    from ..storage.page_store import PageStore

_APPEND_TOKENS = 8
"""Of a warp that appends."""
_ATTEND_TOKENS, _ATTEND_WARPS, _ATTEND_STAGES = 128, 4, 1
"""Of a program of attention: tokens of a tile, warps, pipeline stages."""
_ESTIMATE_WARPS, _ESTIMATE_SPLITS = 4, 64
"""Of a program that estimates: warps, and programs at most for each KV head, as each is one more part to merge."""
_ANY_LENGTH = (1 << 31) - 1
_PROGRAMS = 528
"""Programs that a launch should have: four for each multiprocessor of an H100."""


class StepKernels(Descriptors):
    """Launches for the paged layers of one cache on one device.

    Args:
        shared, device, batch_size, num_heads: as for `Descriptors`; another batch needs another object.
        launch: the kernels, from `kernels.launchers`.
    """

    def __init__(self, shared: SharedState, launch: Any, device: torch.device, batch_size: int, num_heads: int) -> None:
        super().__init__(shared, device, batch_size, num_heads)
        self.launch, self.block_g = launch, 16
        self.fits: tuple[Any, ...] = ()
        self.compiled_variants: set[tuple[Any, ...]] = set()
        """Of the launches that attend: those that were compiled ahead, several at a time."""
        layers, programs = len(shared.layers), max(1, _PROGRAMS // self.streams)
        self.whole_splits = self.attend_splits = min(64, programs)
        if (most := self.most_pages()) is not None:  # one for each tile of what an int budget lists, if there is room
            self.attend_splits = min(self.attend_splits, -(-most * shared.method.page_size // _ATTEND_TOKENS))
        self.estimate_splits = min(_ESTIMATE_SPLITS, programs) if self.recipe.estimated_share else 0
        self.compiled = device.type == "cuda"
        self.multiplies_int8, self.shared_memory = device_limits.multiplies(device), device_limits.shared_memory(device)
        plans = (MAX_QUERIES, batch_size, len(PlanField))
        self.plan = self.new(plans, torch.int32)
        self.whole_plan = self.new(plans if self.recipe.dense_layers else (0,), torch.int32)
        """Of layers that attend to everything."""
        self.arrivals = self.new((self.streams,), torch.int32)
        self.counters = self.new((layers, len(Counter)), torch.int64)
        """What the kernels count, for each layer."""
        self.parts = self.new((0,), torch.float32)
        self.selection = Selection(self, programs)

    def fit(self, group: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
        """Buffers for layers of so many query heads a KV head; captured launches hold their addresses.

        Raises:
            CapacityError: there is no memory for them; the next call asks again.
        """
        fits = (group, key_dim, value_dim, dtype)
        if fits == self.fits or not group:
            return
        splits = self.whole_splits if self.recipe.dense_layers else self.attend_splits
        width = (splits + self.estimate_splits) * 2 * group * value_dim
        with kept("buffers of decode steps", 4 * self.streams * width):
            parts = torch.empty((self.streams, width), dtype=torch.float32, device=self.device)
            self.selection.fit(group, key_dim, dtype)
        self.shared.forget_recorded()
        self.page_capacity = 0  # what `_grow` makes is for so many query heads too
        self.parts, self.fits, self.group, self.block_g = parts, fits, group, max(16, power_of_two(group))

    # ---------------------------------------------------------------------------------------------------- the launches

    def append(self, layer: SpinLayer, key: Tensor, value: Tensor) -> None:
        """Write the step's tokens [B, H, n, D] of a layer to its pages and summarise the pages they complete."""
        self.begin(layer)
        key, value = _rows(key), _rows(value)
        sequences, count = self.shared.sequences, key.shape[2]
        pages = sequences.num_pages - sequences.start // sequences.page_size
        self.launch.append[(pages, self.streams)](
            self.step, self.fields(layer), key, value, count, *key.stride()[:3], *value.stride()[:3],
            SUMMARISE=self.recipe.summarised_by_append, **self.shapes(layer),
            num_warps=max(1, self.shared.method.page_size // _APPEND_TOKENS),
        )  # fmt: skip

    def attend(self, layer: SpinLayer, call: Call, out: Tensor, new: tuple[Tensor, Tensor] | None = None) -> None:
        """Attend to what each query of the step selects.

        Args:
            out: [B, Q, heads, Dv]; written.
            new: keys and values [B, H, 1, D] of the one token of the step, to be appended; None if the step's tokens
                are in their pages.
        """
        self.begin(layer)
        assert layer.store is not None
        self.fit(call.query.shape[2], call.query.shape[-1], out.shape[-1], layer.store.dtype)
        self.make_room()
        shapes = self.shapes(layer)
        new = None if new is None else (_rows(new[0]), _rows(new[1]))
        query = _rows(call.query.flatten(1, 2))
        variants = (*shapes.values(), self.is_whole(layer), new is None, query.shape[2] == 1)
        if variants not in self.compiled_variants:
            self._compile_ahead(layer, query, call, out, new, shapes)
            self.compiled_variants.add(variants)
        self._launches(layer, query, call, out, new, shapes)
        self.known["planned"] = True

    def _launches(
        self, layer: SpinLayer, query: Tensor, call: Call, out: Tensor, new: tuple[Tensor, Tensor] | None,
        shapes: dict[str, Any],
    ) -> None:  # fmt: skip
        """What `attend` launches: for all layers if this is the step's first, and for each query of this layer."""
        choice = self.selection
        if not self.known["planned"]:
            self._plan(query.shape[2])
            if query.shape[2] == 1:  # a page that this step completes is no candidate yet, in any layer
                mine = [other for other in self.shared.layers if self.serves(other)]
                for layers in [mine] if len(mine) == len(self.shared.layers) else [[other] for other in mine]:
                    choice.find_outliers(self.plan[0], layers)
        for i in range(query.shape[2]):
            if query.shape[2] > 1:
                choice.find_outliers(self.plan[i], [layer])
            choice.select(layer, query[:, :, i : i + 1], i, call.scale, new, shapes)
            if self.estimate_splits:
                self._estimate(layer, i, call.softcap, shapes)
            self._attend(layer, query[:, :, i : i + 1], i, call, out, shapes)

    def _compile_ahead(self, *launches: Any) -> None:
        """Compile the `_launches` with these arguments."""
        found = self.launch

        def compile_by(launch: Any) -> None:
            self.launch = launch
            self._launches(*launches)

        try:
            found.compile_ahead(compile_by)
        finally:
            self.launch = found

    def _estimate(self, layer: SpinLayer, index: int, softcap: float | None, shapes: dict[str, Any]) -> None:
        """What stands for pages that were not chosen, for one query of the step."""
        store = layer.store
        assert store is not None
        quantized = [summary.quantized for summary in store.summaries.values()][1]
        item = 1 if quantized else store.dtype.itemsize
        runs = segments_at_a_time(shapes["BLOCK_V"], item, self.shared_memory)
        self.launch.estimate[(self.streams, self.estimate_splits)](
            self.step, self.fields(layer), self.plan[index], self.selection.zone_edges, self.parts, softcap or 1.0,
            CAPPED=softcap is not None, ZONE=self.selection.estimates_zone, QUANTIZED=quantized, G=self.group,
            BLOCK_G=self.block_g, RUNS=runs, BINS=NUM_BINS,
            PER_NAT=BINS_PER_NAT, SPLITS=self.attend_splits, DTYPE=self.launch.dtype(store.dtype),
            COMPILED=self.compiled, num_warps=_ESTIMATE_WARPS, num_stages=1,
            **some(shapes, "SUMMARY", "H", "DV", "BLOCK_V", "PAGE", "SEGMENT", "ROWS", "PADDED"),
        )  # fmt: skip

    def _attend(
        self, layer: SpinLayer, query: Tensor, index: int, call: Call, out: Tensor, shapes: dict[str, Any]
    ) -> None:
        """Attend to the pages that `_select` listed, for one query of the step."""
        store, splits = layer.store, self.whole_splits if self.is_whole(layer) else self.attend_splits
        assert store is not None
        out_of = out[:, index]
        self.launch.attend[(self.streams, splits)](
            self.step, self.fields(layer), query, out_of, query if call.sinks is None else call.sinks,
            self.selection.list_count,
            self.parts, self.arrivals, index, out.shape[1], *query.stride()[:2], out_of.stride(0),
            out_of.stride(1), call.scale, call.softcap or 1.0, CAPPED=call.softcap is not None,
            SINKS=call.sinks is not None, G=self.group, BLOCK_G=self.block_g, TILE_PAGES=self._tile_pages(store, shapes),
            SPLITS=splits, ESTIMATED=self.estimate_splits, MERGED_G=power_of_two(self.group), PAGE_BYTES=store.form.row_bytes,
            DTYPE=self.launch.dtype(store.dtype), num_warps=_ATTEND_WARPS, num_stages=_ATTEND_STAGES,
            **some(shapes, "H", "DK", "DV", "BLOCK_K", "BLOCK_V", "PAGE", "SEGMENT", "ROWS", "PADDED", "HOME_BYTES"),
        )  # fmt: skip

    def _tile_pages(self, store: PageStore, shapes: dict[str, Any]) -> int:
        """Pages of a tile of attention, or fewer if a program's shared memory does not hold them."""
        row_bytes = (shapes["BLOCK_K"] + shapes["BLOCK_V"]) * store.dtype.itemsize
        tokens = min(_ATTEND_TOKENS, power_of_two(self.shared_memory // (2 * row_bytes) + 1) // 2)  # two are under way
        return max(16, tokens, store.page_size) // store.page_size

    def serves(self, layer: SpinLayer) -> bool:
        """Whether a layer has pages on this device and so many KV heads."""
        store = layer.store
        return store is not None and (store.device, store.num_heads) == (self.device, self.num_heads)

    def _plan(self, num_queries: int) -> None:
        options, page_size = self.shared.options, self.shared.method.page_size
        plans = [(self.plan, options.dense_below)]
        if self.recipe.dense_layers:
            plans.append((self.whole_plan, _ANY_LENGTH))
        for plan, dense_below in plans:
            self.launch.plan_step[(self.batch_size, num_queries)](
                self.step, plan, SINKS=options.num_sink_tokens, WINDOW=options.recent_window,
                BUDGET=options.budget if isinstance(options.budget, int) else 0, DENSE_BELOW=dense_below,
                OUTLIERS_PER_1024=self.recipe.outliers_per_1024, PAGE=page_size, PADDED=self.padded, TILE=1024,
            )  # fmt: skip

    def is_whole(self, layer: SpinLayer) -> bool:
        """Whether a layer attends to everything, whatever the budget."""
        return layer.number < self.recipe.dense_layers

    def plan_of(self, layer: SpinLayer) -> Tensor:
        """The plan [Q, B, len(PlanField)] that a layer follows."""
        return self.whole_plan if self.is_whole(layer) else self.plan

    def fields(self, layer: SpinLayer) -> Tensor:
        """The descriptor of a layer."""
        return self.layer_fields[layer.number]

    def shapes(self, layer: SpinLayer) -> dict[str, Any]:
        """What most kernels are compiled for."""
        store = layer.store
        assert store is not None
        return {
            "SUMMARY": self.launch.dtype(store.dtype), "QUANTIZED": next(iter(store.summaries.values())).quantized,
            "H": self.num_heads,
            "DK": store.key_dim, "DV": store.value_dim, "BLOCK_K": max(32, power_of_two(store.key_dim)),
            "BLOCK_V": max(16, power_of_two(store.value_dim)), "PAGE": store.page_size, "SEGMENT": SEGMENT_PAGES,
            "ROWS": store.home.rows_per_chunk, "PADDED": self.padded,
            "HOME_BYTES": 0 if store.home_form == store.form else store.home_form.row_bytes,
        }  # fmt: skip


def _rows(states: Tensor) -> Tensor:
    """`states` with a contiguous last dimension."""
    return states if states.stride(-1) == 1 else states.contiguous()
