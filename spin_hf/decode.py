"""The kernels' side of a step on one device: descriptors and scratch, and the launches of one layer.

    begin     host       position, clock, directory, padding -> step descriptor; scratch grows with the context
    append    1 launch              tokens to pages and summaries, of a prefill too
    attend    4 launches a query    score -> rank -> choose and retrieve -> attend
              2 a step              for all layers: plan_step, find_outliers

No launch waits for the host, and no kernel allocates. What the kernels compute is what `plan`, `attend` and `kernels.reference`
specify; `tests/kernels/test_decode.py` holds both against each other.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attend import Call
from .attention.shadowkv import ShadowKV
from .kernels.fields import MAX_QUERIES, PART_PAGES, Counter, LayerField, PlanField, StepField
from .plan import pages_of
from .storage.sequences import SEGMENT_PAGES

if TYPE_CHECKING:
    from .layer import SpinLayer
    from .shared import SharedState
    from .storage.pages import PageStore

_MIN_PAGES = 512
_CHOOSE_TILE = 8192
"""Ranked pages that are chosen from without reading them again."""
_ATTEND_TOKENS, _ATTEND_WARPS, _ATTEND_STAGES, _MERGED_SPLITS = 128, 4, 1, 16
"""Of a program of attention: tokens of a tile, warps, pipeline stages, and parts that are merged at a time."""
_PROGRAMS = 528
"""Programs that a launch should have: four for each multiprocessor of an H100."""


class StepKernels:
    """Launches for the paged layers of one cache on one device.

    Args:
        shared: the cache's state.
        launch: the kernels, from `kernels.launchers`.
        batch_size: sequences; another batch needs another object.
        num_heads: KV heads of the layers.
    """

    def __init__(self, shared: SharedState, launch: Any, device: torch.device, batch_size: int, num_heads: int) -> None:
        self.shared, self.launch, self.device = shared, launch, device
        self.batch_size, self.num_heads = batch_size, num_heads
        self.group = self.value_dim = 0
        self.block_g = 16
        streams = batch_size * num_heads
        self.splits = min(64, max(1, _power_of_two(_PROGRAMS // streams)))
        self.attend_splits = self._attend_splits(streams)
        self.rank_programs = max(1, _PROGRAMS // 4 // streams)

        def make(shape: tuple[int, ...], dtype: torch.dtype, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        self.step = make((len(StepField),), torch.int64)
        self.step_fields = [0] * len(StepField)
        """What `step` holds, or will hold once it is uploaded."""
        budget = shared.options.budget
        share = budget if isinstance(budget, float) else 0.0
        self.step_fields[StepField.SHARE] = struct.unpack("<q", struct.pack("<d", share))[0]
        self.plan = make((MAX_QUERIES, batch_size, len(PlanField)), torch.int32)
        self.outliers = make((len(shared.layers), streams), torch.int64)
        self.found_for = make((len(shared.layers), streams), torch.int32, -1)
        self.layer_fields = make((len(shared.layers), len(LayerField)), torch.int64)
        size = self.layer_fields.shape[1] * 8
        self.layer_addresses = torch.arange(len(shared.layers), device=device) * size + self.layer_fields.data_ptr()
        self.stats = self.parts = self.part_lse = make((0,), torch.float32)
        self.arrivals = make((streams,), torch.int32)
        self.shared_memory = 48 << 10 if device.type != "cuda" else _shared_memory(device)
        self.list_count = make((streams, 2), torch.int32)
        self.counters = make((len(shared.layers), len(Counter)), torch.int64)
        """What the kernels count, for each layer."""
        self.page_capacity, self.padded_capacity = 0, False
        self.scratch: dict[StepField, Tensor] = {}
        self.known: dict[str, Any] = {}
        """What the descriptors were last written from."""
        self.layer_known: list[Any] = [None] * len(shared.layers)
        self.padded = False

    # ------------------------------------------------------------------------------------------------------- the host

    def begin(self, layer: SpinLayer) -> None:
        """Bring the descriptors up to the step that `layer` is about to take. Cheap where nothing has changed."""
        self.begin_step()
        store, number = layer.store, layer.number
        assert store is not None
        frames = store.frames
        tables = () if frames is None else (frames.frames, frames.page_slot, frames.slot_page, frames.slot_step)
        known = (store, *(table.data_ptr() for table in tables), *(table.shape[-1] for table in tables))
        if self.layer_known[number] != known:
            fields = [0] * len(LayerField)
            fields[LayerField.HOME] = store.home.address_table.data_ptr()
            fields[LayerField.LANDMARK] = store.summaries["landmark"].address_table.data_ptr()
            fields[LayerField.MIN_COSINE] = store.summaries["min_cosine"].address_table.data_ptr()
            if frames is not None:
                fields[LayerField.FRAMES] = frames.frames.data_ptr()
                fields[LayerField.NUM_SLOTS] = frames.num_slots
                fields[LayerField.PAGE_SLOT] = frames.page_slot.data_ptr()
                fields[LayerField.PAGE_SLOT_STRIDE] = frames.page_slot.shape[2]
                fields[LayerField.SLOT_PAGE] = frames.slot_page.data_ptr()
                fields[LayerField.SLOT_STEP] = frames.slot_step.data_ptr()
            _upload(fields, self.layer_fields[number])
            self.layer_known[number] = known

    def begin_step(self) -> None:
        """Bring the step descriptor up to the present step."""
        sequences = self.shared.sequences
        if self.known.get("step") == sequences.step and self.known.get("start") == sequences.start:
            return
        follows = self.known.get("length") == sequences.start and self.known.get("events") == sequences.events
        if not follows:
            self.found_for.fill_(-1)
        fields = self.step_fields
        fields[StepField.POSITION], fields[StepField.CLOCK] = sequences.start, sequences.step
        if self.known.get("directory") is not sequences.directory or not follows:
            width = max(len(row) for row in sequences.directory)
            rows = [row + [0] * (width - len(row)) for row in sequences.directory]
            directory = torch.tensor(rows, dtype=torch.int32).to(self.device, non_blocking=True)
            self._point({StepField.DIRECTORY: directory})
            fields[StepField.DIRECTORY_STRIDE] = width
        valid = sequences.mask.valid
        self.padded = valid is not None
        if valid is not None and self.known.get("valid") is not valid:
            bits = valid.to(torch.uint8).contiguous().to(self.device, non_blocking=True)
            upto = torch.nn.functional.pad(bits.cumsum(1, dtype=torch.int32), (1, 0)).contiguous()
            self._point({StepField.VALID: bits, StepField.UPTO: upto})
            fields[StepField.BASE_TOKENS] = bits.shape[1]
        _upload(fields, self.step)
        self.known = {
            "step": sequences.step, "start": sequences.start, "length": sequences.length, "events": sequences.events,
            "directory": sequences.directory, "valid": valid, "planned": False,
        }  # fmt: skip

    def make_room(self) -> None:
        """Scratch for the step that has begun; before the first one its size is unknown."""
        num_pages = self.shared.sequences.num_pages
        if self.group and (num_pages > self.page_capacity or (self.padded and not self.padded_capacity)):
            self._grow(num_pages)

    def fit(self, group: int, value_dim: int) -> None:
        """Buffers for layers of so many query heads a KV head; captured launches hold their addresses."""
        if (group, value_dim) == (self.group, self.value_dim) or not group:
            return
        self.group, self.value_dim, self.block_g = group, value_dim, max(16, _power_of_two(group))
        streams = self.batch_size * self.num_heads
        self.stats, self.parts, self.part_lse = (
            torch.empty((streams, width), dtype=torch.float32, device=self.device)
            for width in (
                self.splits * 2 * self.block_g, self.attend_splits * group * value_dim, self.attend_splits * self.block_g
            )
        )  # fmt: skip
        self.page_capacity = 0  # what `_grow` makes is for so many query heads too

    def _grow(self, num_pages: int) -> None:
        """Scratch for contexts of `num_pages` pages and more."""
        pages = max(_MIN_PAGES, _power_of_two(num_pages))
        chosen = listed = pages
        most = None if self.padded else self._most_pages()  # with padding, a page may hold a single valid token
        if most is not None:
            chosen, listed = (min(pages, count) for count in most)
        stride = min(_power_of_two(chosen), PART_PAGES)
        parts = -(-pages // PART_PAGES)
        streams = self.batch_size * self.num_heads

        def make(width: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((streams, width), dtype=dtype, device=self.device)

        self._point({
            StepField.LOGITS: make(self.group * pages, torch.float32),
            StepField.RANKED_PAGE: make(parts * stride, torch.int32),
            StepField.RANKED_KEY: make(parts * stride, torch.int32),
            StepField.RANKED_COUNT: make(parts, torch.int32),
            StepField.LIST_PAGE: make(listed, torch.int32),
            StepField.LIST_SOURCE: make(listed, torch.int64),
            StepField.LIST_TARGET: make(listed, torch.int64),
            StepField.VICTIMS: make(listed, torch.int32),
        })  # fmt: skip
        fields = self.step_fields
        fields[StepField.PAGE_CAPACITY], fields[StepField.LIST_CAPACITY] = pages, listed
        fields[StepField.RANKED_PARTS], fields[StepField.RANKED_SHIFT] = parts, stride.bit_length() - 1
        _upload(fields, self.step)
        self.page_capacity, self.padded_capacity = pages, self.padded

    def _point(self, tensors: dict[StepField, Tensor]) -> None:
        """Keep tensors, and their addresses for the next upload."""
        self.scratch |= tensors
        for field, tensor in tensors.items():
            self.step_fields[field] = tensor.data_ptr()

    def _attend_splits(self, streams: int) -> int:
        """Programs that share a list of pages: one for each tile of what an int budget lists, if there is room."""
        room, most = min(64, max(1, _PROGRAMS // streams)), self._most_pages()
        return room if most is None else min(room, -(-most[1] * self.shared.method.page_size // _ATTEND_TOKENS))

    def _most_pages(self) -> tuple[int, int] | None:
        """Pages that a query selects at most, and lists with sinks and window, without padding; None for a share."""
        options, page_size = self.shared.options, self.shared.method.page_size
        if isinstance(options.budget, float):
            return None
        chosen = -(-max(options.budget, options.dense_below) // page_size)
        zones = pages_of(options.num_sink_tokens, page_size) + pages_of(options.recent_window, page_size)
        return chosen, chosen + zones

    def recorded(self, layer: SpinLayer) -> tuple[Any, ...]:
        """All that a graph of this layer's launches holds, beside tensors of the model: addresses and compile-time numbers."""
        tensors = (
            self.step, self.plan, self.outliers, self.found_for, self.layer_fields, self.layer_addresses, self.counters,
            self.stats, self.parts, self.part_lse, self.arrivals, self.list_count,
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

    def release(self) -> None:
        """The cache is gone: keep what graphs hold addresses of, and nothing else of it."""
        del self.shared
        self.scratch, self.known, self.layer_known = {}, {}, [None] * len(self.layer_known)
        self.page_capacity, self.padded_capacity = 0, False

    def serve(self, shared: SharedState) -> None:
        """Take up another cache, after `release`."""
        self.shared = shared
        self.counters.zero_()  # not by `release`, which the garbage collector may call while somebody captures

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied cache makes its own: descriptors hold the addresses of this one's memory."""
        return None

    # ---------------------------------------------------------------------------------------------------- the launches

    def append(self, layer: SpinLayer, key: Tensor, value: Tensor) -> None:
        """Write the step's tokens [B, H, n, D] of a layer to its pages and summarise the pages they complete."""
        self.begin(layer)
        key, value = _rows(key), _rows(value)
        sequences, count = self.shared.sequences, key.shape[2]
        pages = sequences.num_pages - sequences.start // sequences.page_size
        self.launch.append[(pages, self.batch_size * self.num_heads)](
            self.step, self._fields(layer), key, value, count, *key.stride()[:3], *value.stride()[:3],
            **self._shapes(layer), num_warps=1,
        )  # fmt: skip

    def attend(self, layer: SpinLayer, call: Call, out: Tensor) -> None:
        """Attend to what each query of the step selects; the step's tokens are in their pages.

        Args:
            out: [B, Q, heads, Dv]; written.
        """
        self.begin(layer)
        self.fit(call.query.shape[2], out.shape[-1])
        self.make_room()
        streams = self.batch_size * self.num_heads
        method, store, fields = self.shared.method, layer.store, self._fields(layer)
        assert isinstance(method, ShadowKV)
        assert store is not None
        shapes = self._shapes(layer)
        common = {name: shapes[name] for name in ("H", "PAGE", "SEGMENT", "ROWS", "PADDED")}
        query = _rows(call.query.flatten(1, 2))
        if not self.known["planned"]:
            self._plan(query.shape[2])
            if query.shape[2] == 1:  # a page that this step completes is no candidate yet, in any layer
                mine = [other for other in self.shared.layers if self._serves(other)]
                for layers in [mine] if len(mine) == len(self.shared.layers) else [[other] for other in mine]:
                    self._find_outliers(self.plan[0], layers, common)
        for i in range(query.shape[2]):
            one = query[:, :, i : i + 1]
            plan = self.plan[i]
            if query.shape[2] > 1:
                self._find_outliers(plan, [layer], common)
            self.launch.score[(streams, self.splits)](
                self.step, fields, one, self.stats, plan, self.splits, *one.stride()[:2], call.scale,
                SUMMARY=shapes["SUMMARY"], G=self.group, BLOCK_G=self.block_g, DK=shapes["DK"],
                BLOCK_K=shapes["BLOCK_K"], TILE=64 if store.home.dtype.itemsize > 2 else 128, **common,
                num_warps=4,
            )  # fmt: skip
            self.launch.rank[(streams, self.rank_programs)](
                self.step, fields, self.stats, plan, self.outliers[layer.number], self.splits,
                SUMMARY=shapes["SUMMARY"], OUTLIERS=method.outlier_pages_per_1024 > 0, G=self.group,
                BLOCK_G=self.block_g, SPLITS=self.splits, PART=PART_PAGES,
                HEADS=min(4, _power_of_two(self.group)), **common, num_warps=8,
            )  # fmt: skip
            self.launch.choose[(streams,)](
                self.step, fields, plan, self.list_count, self.counters[layer.number], i,
                PAGE_BYTES=store.home.row_bytes, PART=PART_PAGES, TILE=_CHOOSE_TILE, NARROW=min(_CHOOSE_TILE, 2048),
                LIST_TILE=512, SLOT_TILE=2048, **common, num_warps=8,
            )  # fmt: skip
            self.launch.attend[(streams, self.attend_splits)](
                self.step, one, out[:, i], call.sinks if call.sinks is not None else one, self.list_count, self.parts,
                self.part_lse, self.arrivals, i, query.shape[2], *one.stride()[:2], out.stride(0), out.stride(2), call.scale,
                call.softcap or 1.0, CAPPED=call.softcap is not None, SINKS=call.sinks is not None, G=self.group,
                BLOCK_G=self.block_g, TILE_PAGES=self._tile_pages(store, shapes), SPLITS=self.attend_splits,
                ALL_SPLITS=_power_of_two(self.attend_splits), MERGED_G=_power_of_two(self.group),
                MERGED_SPLITS=min(_power_of_two(self.attend_splits), _MERGED_SPLITS),
                DTYPE=self.launch.dtype(store.home.dtype), num_warps=_ATTEND_WARPS,
                num_stages=_ATTEND_STAGES,
                **{name: shapes[name] for name in ("H", "DK", "DV", "BLOCK_K", "BLOCK_V", "PAGE", "PADDED")},
            )  # fmt: skip

    def _tile_pages(self, store: PageStore, shapes: dict[str, Any]) -> int:
        """Pages of a tile of attention, or fewer if a program's shared memory does not hold them."""
        row_bytes = (shapes["BLOCK_K"] + shapes["BLOCK_V"]) * store.home.dtype.itemsize
        tokens = min(_ATTEND_TOKENS, _power_of_two(self.shared_memory // (2 * row_bytes) + 1) // 2)  # two are under way
        return max(16, tokens, store.page_size) // store.page_size

    def _serves(self, layer: SpinLayer) -> bool:
        store = layer.store
        return store is not None and (store.device, store.num_heads) == (self.device, self.num_heads)

    def _plan(self, num_queries: int) -> None:
        options, method = self.shared.options, self.shared.method
        assert isinstance(method, ShadowKV)
        self.launch.plan_step[(self.batch_size, num_queries)](
            self.step, self.plan, SINKS=options.num_sink_tokens, WINDOW=options.recent_window,
            BUDGET=options.budget if isinstance(options.budget, int) else 0, DENSE_BELOW=options.dense_below,
            OUTLIERS_PER_1024=method.outlier_pages_per_1024, PAGE=method.page_size, PADDED=self.padded, TILE=1024,
        )  # fmt: skip
        self.known["planned"] = True

    def _find_outliers(self, plan: Tensor, layers: list[SpinLayer], common: dict[str, Any]) -> None:
        """Of consecutive layers, for the query that `plan` is of."""
        method = self.shared.method
        assert isinstance(method, ShadowKV)
        if method.outlier_pages_per_1024:
            for layer in layers:
                self.begin(layer)
            self.launch.find_outliers[(self.batch_size * self.num_heads, len(layers))](
                self.step, self.layer_addresses, plan, self.outliers, self.found_for, layers[0].number,
                SUMMARY=self._shapes(layers[0])["SUMMARY"], TILE=1024, **common,
            )  # fmt: skip

    def _fields(self, layer: SpinLayer) -> Tensor:
        return self.layer_fields[layer.number]

    def _shapes(self, layer: SpinLayer) -> dict[str, Any]:
        store = layer.store
        assert store is not None
        return {
            "SUMMARY": self.launch.dtype(store.summaries["landmark"].dtype), "H": self.num_heads,
            "DK": store.key_dim, "DV": store.value_dim, "BLOCK_K": max(16, _power_of_two(store.key_dim)),
            "BLOCK_V": max(16, _power_of_two(store.value_dim)), "PAGE": store.page_size, "SEGMENT": SEGMENT_PAGES,
            "ROWS": store.home.rows_per_chunk, "PADDED": self.padded,
        }  # fmt: skip


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) - 4096  # some is for reductions


def _upload(fields: list[int], descriptor: Tensor) -> None:
    """Write a descriptor, in stream order. The host does not wait: CUDA copies so little out of the way at once."""
    descriptor.copy_(torch.tensor(fields), non_blocking=True)


def _rows(states: Tensor) -> Tensor:
    """`states` with a contiguous last dimension."""
    return states if states.stride(-1) == 1 else states.contiguous()


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
