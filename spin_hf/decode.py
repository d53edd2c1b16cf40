"""The kernels of a decode step on one device: their sizes and buffers, and the launches of one layer.

    append    1 launch              tokens to pages and summaries, of a prefill too
    attend    4 launches a query    score -> rate -> choose and retrieve -> attend; `score` appends the token of a step
              2 a step              for all layers: plan_step, find_outliers

No launch waits for the host, and no kernel allocates. What the kernels compute is what `plan`, `attend` and `kernels.reference`
specify; `tests/kernels/test_decode.py` holds both against each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attend import Call
from .attention.shadowkv import ShadowKV
from .descriptors import Descriptors, power_of_two
from .kernels.fields import BINS_PER_NAT, MAX_QUERIES, NUM_BINS, PART_PAGES, Counter, PlanField
from .storage.sequences import SEGMENT_PAGES

if TYPE_CHECKING:
    from .layer import SpinLayer
    from .shared import SharedState
    from .storage.pages import PageStore

_SCORE_BYTES, _SCORE_WARPS, _SCORE_SPLITS = 16 << 10, 4, 64
"""Of a program of scoring: bytes of landmarks at a time, warps, and programs at most for each KV head."""
_RATE_WARPS = 8
_CHOOSE_TILE, _CHOOSE_PARTS, _CHOOSE_WARPS, _HAND_TILE, _SLOT_TILE = 1024, 128, 8, 512, 2048
"""Of a program that chooses: pages and parts of a tile, warps, slots of a tile at the hand and where all are looked at."""
_FEW_TIED, _TIED_TILE = 64, 512
"""Pages of one bin that are compared each with each, or at a time in a search."""
_KEPT = 3
"""So many times the pages that are chosen are looked at, if scores are spread as they were at the last step."""
_ATTEND_TOKENS, _ATTEND_WARPS, _ATTEND_STAGES = 128, 4, 1
"""Of a program of attention: tokens of a tile, warps, pipeline stages."""
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
        self.launch, self.value_dim, self.block_g = launch, 0, 16
        layers, programs = len(shared.layers), max(1, _PROGRAMS // self.streams)
        self.splits, self.rate_programs = min(_SCORE_SPLITS, power_of_two(programs)), programs
        self.attend_splits = min(64, programs)
        if (most := self.most_pages()) is not None:  # one for each tile of what an int budget lists, if there is room
            self.attend_splits = min(self.attend_splits, -(-most * shared.method.page_size // _ATTEND_TOKENS))
        self.multiplies_int8 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
        self.shared_memory = 48 << 10 if device.type != "cuda" else _shared_memory(device)
        self.plan = self.new((MAX_QUERIES, batch_size, len(PlanField)), torch.int32)
        self.edges = self.new((layers, self.streams), torch.int64)
        self.histogram = self.new((self.streams, NUM_BINS), torch.int32)
        self.floors = self.new((layers, self.streams), torch.int32, NUM_BINS)
        self.hands = self.new((layers, self.streams), torch.int32)
        self.list_count = self.new((self.streams, 2), torch.int32)
        self.arrivals = self.new((self.streams,), torch.int32)
        self.counters = self.new((layers, len(Counter)), torch.int64)
        """What the kernels count, for each layer."""
        self.stats = self.parts = self.new((0,), torch.float32)

    def fit(self, group: int, value_dim: int) -> None:
        """Buffers for layers of so many query heads a KV head; captured launches hold their addresses."""
        if (group, value_dim) == (self.group, self.value_dim) or not group:
            return
        self.group, self.value_dim, self.block_g = group, value_dim, max(16, power_of_two(group))
        self.stats, self.parts = (
            torch.empty((self.streams, width), dtype=torch.float32, device=self.device)
            for width in (self.splits * 2 * self.block_g, self.attend_splits * 2 * group * value_dim)
        )
        self.shared.forget_recorded()
        self.page_capacity = 0  # what `_grow` makes is for so many query heads too

    def recorded(self, layer: SpinLayer) -> tuple[Any, ...]:
        """All that a graph of this layer's launches holds, beside tensors of the model: addresses and compile-time numbers."""
        tensors = (
            self.step, self.plan, self.edges, self.found_for, self.layer_fields, self.layer_addresses, self.counters,
            self.histogram, self.floors, self.hands, self.stats, self.parts, self.arrivals, self.list_count,
        )  # fmt: skip
        store, shared = layer.store, self.shared
        assert store is not None
        shapes = tuple(str(value) for value in self._shapes(layer).values())
        numbers = (
            self.batch_size,
            self.group,
            layer.number,
            len(shared.layers),
            store.home.row_bytes,
            store.home.dtype,
        )
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        return *addresses, *shapes, *numbers, repr(shared.options), repr(shared.method)

    def serve(self, shared: SharedState) -> None:
        """Take up another cache, after `release`."""
        super().serve(shared)
        self.counters.zero_()  # not by `release`, which the garbage collector may call while somebody captures

    # ---------------------------------------------------------------------------------------------------- the launches

    def append(self, layer: SpinLayer, key: Tensor, value: Tensor) -> None:
        """Write the step's tokens [B, H, n, D] of a layer to its pages and summarise the pages they complete."""
        self.begin(layer)
        key, value = _rows(key), _rows(value)
        sequences, count = self.shared.sequences, key.shape[2]
        pages = sequences.num_pages - sequences.start // sequences.page_size
        self.launch.append[(pages, self.streams)](
            self.step, self._fields(layer), key, value, count, *key.stride()[:3], *value.stride()[:3],
            **self._shapes(layer), num_warps=1,
        )  # fmt: skip

    def attend(self, layer: SpinLayer, call: Call, out: Tensor, new: tuple[Tensor, Tensor] | None = None) -> None:
        """Attend to what each query of the step selects.

        Args:
            out: [B, Q, heads, Dv]; written.
            new: keys and values [B, H, 1, D] of the one token of the step, to be appended; None if the step's tokens
                are in their pages.
        """
        self.begin(layer)
        self.fit(call.query.shape[2], out.shape[-1])
        self.make_room()
        method, shapes = self.shared.method, self._shapes(layer)
        assert isinstance(method, ShadowKV)
        query = _rows(call.query.flatten(1, 2))
        if not self.known["planned"]:
            self._plan(query.shape[2])
            if query.shape[2] == 1:  # a page that this step completes is no candidate yet, in any layer
                mine = [other for other in self.shared.layers if self._serves(other)]
                for layers in [mine] if len(mine) == len(self.shared.layers) else [[other] for other in mine]:
                    self._find_outliers(self.plan[0], layers)
        for i in range(query.shape[2]):
            if query.shape[2] > 1:
                self._find_outliers(self.plan[i], [layer])
            self._select(layer, query[:, :, i : i + 1], i, call.scale, new, shapes)
            self._attend(layer, query[:, :, i : i + 1], i, call, out, shapes)

    def _select(
        self, layer: SpinLayer, query: Tensor, index: int, scale: float, new: tuple[Tensor, Tensor] | None,
        shapes: dict[str, Any],
    ) -> None:  # fmt: skip
        """List the pages of one query [B, heads, 1, Dk] of the step, and retrieve them; `new` as for `attend`."""
        store, number, plan, fields = layer.store, layer.number, self.plan[index], self._fields(layer)
        assert store is not None
        key, value = (query, query) if new is None else map(_rows, new)
        digits = shapes["QUANTIZED"] and self.multiplies_int8
        block_g = max(4 if digits else 8, power_of_two(self.group))  # columns of a product: eight at least
        common = {
            "PART": PART_PAGES, "BINS": NUM_BINS, "PER_NAT": BINS_PER_NAT, **_some(shapes, "H", "PAGE", "PADDED")
        }  # fmt: skip
        self.launch.score[(self.streams, self.splits + (new is not None))](
            self.step, fields, query, self.stats, plan, self.histogram, self.splits, *query.stride()[:2], scale, key, value,
            *key.stride()[:2], *value.stride()[:2], APPEND=new is not None, DIGITS=digits, G=self.group,
            BLOCK_G=block_g, BINS=NUM_BINS, RUNS=self._score_runs(shapes), **shapes, num_warps=_SCORE_WARPS, num_stages=1,
        )  # fmt: skip
        self.launch.rate[(self.streams, self.rate_programs)](
            self.step, self.stats, plan, self.histogram, self.floors[number], number, self.splits,
            OUTLIERS=self._num_outliers() > 0, G=self.group, BLOCK_G=block_g, SPLITS=power_of_two(self.splits),
            HEADS=min(4, power_of_two(self.group)), RUN=min(PART_PAGES, 32), **common, num_warps=_RATE_WARPS,
        )  # fmt: skip
        self.launch.choose[(self.streams,)](
            self.step, fields, plan, self.histogram, self.list_count, self.counters[number], self.floors[number],
            self.hands[number], index, PAGE_BYTES=store.home.row_bytes, TILE=_CHOOSE_TILE,
            PARTS=_CHOOSE_PARTS, KEPT=_KEPT, FEW=_FEW_TIED, TIED_TILE=_TIED_TILE,
            LIST_TILE=512, HAND_TILE=_HAND_TILE, SLOT_TILE=_SLOT_TILE, **common, num_warps=_CHOOSE_WARPS,
        )  # fmt: skip

    def _attend(
        self, layer: SpinLayer, query: Tensor, index: int, call: Call, out: Tensor, shapes: dict[str, Any]
    ) -> None:
        """Attend to the pages that `_select` listed, for one query of the step."""
        store, splits = layer.store, self.attend_splits
        assert store is not None
        out_of = out[:, index]
        self.launch.attend[(self.streams, splits)](
            self.step, self._fields(layer), query, out_of, query if call.sinks is None else call.sinks, self.list_count,
            self.parts, self.arrivals, index, out.shape[1], *query.stride()[:2], out_of.stride(0),
            out_of.stride(1), call.scale, call.softcap or 1.0, CAPPED=call.softcap is not None,
            SINKS=call.sinks is not None, G=self.group, BLOCK_G=self.block_g, TILE_PAGES=self._tile_pages(store, shapes),
            SPLITS=splits, MERGED_G=power_of_two(self.group), PAGE_BYTES=store.home.row_bytes,
            DTYPE=self.launch.dtype(store.home.dtype), num_warps=_ATTEND_WARPS, num_stages=_ATTEND_STAGES,
            **_some(shapes, "H", "DK", "DV", "BLOCK_K", "BLOCK_V", "PAGE", "SEGMENT", "ROWS", "PADDED"),
        )  # fmt: skip

    def _score_runs(self, shapes: dict[str, Any]) -> int:
        """Segments that a program scores at a time, by the bytes of their landmarks; fewer where shared memory is small."""
        item = 1 if shapes["QUANTIZED"] else shapes["SUMMARY"].primitive_bitwidth // 8
        segment = SEGMENT_PAGES * shapes["BLOCK_K"]
        room = self.shared_memory // (4 * segment * max(2, item))  # landmarks may be converted
        return power_of_two(max(1, min(_SCORE_BYTES // (segment * item), room)) + 1) // 2

    def _tile_pages(self, store: PageStore, shapes: dict[str, Any]) -> int:
        """Pages of a tile of attention, or fewer if a program's shared memory does not hold them."""
        row_bytes = (shapes["BLOCK_K"] + shapes["BLOCK_V"]) * store.home.dtype.itemsize
        tokens = min(_ATTEND_TOKENS, power_of_two(self.shared_memory // (2 * row_bytes) + 1) // 2)  # two are under way
        return max(16, tokens, store.page_size) // store.page_size

    def _serves(self, layer: SpinLayer) -> bool:
        store = layer.store
        return store is not None and (store.device, store.num_heads) == (self.device, self.num_heads)

    def _plan(self, num_queries: int) -> None:
        options, page_size = self.shared.options, self.shared.method.page_size
        self.launch.plan_step[(self.batch_size, num_queries)](
            self.step, self.plan, SINKS=options.num_sink_tokens, WINDOW=options.recent_window,
            BUDGET=options.budget if isinstance(options.budget, int) else 0, DENSE_BELOW=options.dense_below,
            OUTLIERS_PER_1024=self._num_outliers(), PAGE=page_size, PADDED=self.padded, TILE=1024,
        )  # fmt: skip
        self.known["planned"] = True

    def _num_outliers(self) -> int:
        method = self.shared.method
        assert isinstance(method, ShadowKV)
        return method.outlier_pages_per_1024

    def _find_outliers(self, plan: Tensor, layers: list[SpinLayer]) -> None:
        """Of consecutive layers, for the query that `plan` is of."""
        if not self._num_outliers():
            return
        for layer in layers:
            self.begin(layer)
        self.launch.find_outliers[(self.streams, len(layers))](
            self.step, self.layer_addresses, plan, self.edges, self.found_for, layers[0].number, TILE=1024,
            **_some(self._shapes(layers[0]), "SUMMARY", "H", "SEGMENT", "ROWS", "PAGE", "PADDED"),
        )  # fmt: skip

    def _fields(self, layer: SpinLayer) -> Tensor:
        return self.layer_fields[layer.number]

    def _shapes(self, layer: SpinLayer) -> dict[str, Any]:
        store = layer.store
        assert store is not None
        return {
            "SUMMARY": self.launch.dtype(store.home.dtype), "QUANTIZED": store.summaries["landmark"].quantized,
            "H": self.num_heads,
            "DK": store.key_dim, "DV": store.value_dim, "BLOCK_K": max(32, power_of_two(store.key_dim)),
            "BLOCK_V": max(16, power_of_two(store.value_dim)), "PAGE": store.page_size, "SEGMENT": SEGMENT_PAGES,
            "ROWS": store.home.rows_per_chunk, "PADDED": self.padded,
        }  # fmt: skip


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) - 4096  # some is for reductions


def _some(shapes: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: shapes[name] for name in names}


def _rows(states: Tensor) -> Tensor:
    """`states` with a contiguous last dimension."""
    return states if states.stride(-1) == 1 else states.contiguous()
