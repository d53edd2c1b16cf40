"""`plan`: memory that a `SpinCache` will take for a batch, and what fits, before anything is allocated.

    config, dtype, method, options -> TierBudget of each paged layer (`memory/layer_budget.py`) -> bytes, as in `stats()`

The layers will get the same budgets, so a plan predicts the cache's page frames and errors. Layers that are not paged (sliding
windows, linear attention) are not counted, as in `stats()`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..attention.methods.base import Method
from ..attention.methods.registry import resolve_method
from ..config import MOST_TOKENS, SpinOptions, require_count
from ..errors import BudgetError, CapacityError, OptionError, OptionTypeError
from ..integration.device_map import layer_devices
from ..integration.layer_types import build_layers, check_model, decoder_config
from ..integration.tensor_parallel import local_shapes
from ..stats import table
from ..storage.chunked_array import MAX_CHUNKS
from ..storage.page_table import ENTRY_BYTES, SEGMENT_PAGES, segments_of
from ..storage.tier_budget import (
    PAGE_SLOT_BYTES,
    SLOT_PAGE_BYTES,
    SLOT_STEP_BYTES,
    TierBudget,
    check_all,
    largest,
    whole_segments,
)
from .layer_budget import check_spans, clustering_bytes, layer_shapes, num_arrays, tier_budget
from .prefill_peak import fitting_tokens, indexing_bytes, key_means_bytes, piece_bytes, prefill_bytes
from .watermarks import Watermarks, free_gpu_memory


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a cache that holds a full batch without padding. `print` shows it as a table.

    The compute tier is GPU memory, or RAM without a GPU. The cpu tier is host memory. A page frame is a place in the compute
    tier for a copy of a page.

    If the batch does not fit, sizes are those with `smallest_gpu_memory` as the cap.

    Attributes:
        batch_size, context_length: sequences, and tokens of each.
        fits: whether the batch fits the caps.
        reason: where the pages live, or the error message that the cache would raise.
        gpu_bytes: pages, page frames and summaries in the compute tier, as `CacheStats.gpu_bytes`.
        cpu_bytes: pages in the cpu tier.
        metadata_bytes: the sum of `metadata`.
        prefill_bytes: temporary memory of a prompt of this length, in addition: activations of a chunk of
            `prefill_chunk_size` tokens, earlier keys and values in use, and mean keys with `prefill="sparse"`; or clustering
            and summarizing its pages, if that takes more. An estimate from the config.
        parts: bytes of pages, page frames, summaries and host pages.
        device_parts: `gpu_bytes` by device, if the model's layers lie on several.
        metadata: bytes by table, as `CacheStats.metadata`, without zeros.
        page_frames: per sequence and KV head, in the layer with the fewest; 0 if all pages live in the compute tier.
        smallest_gpu_memory: smallest cap in bytes that this batch fits, for each device.
        largest_batch_size: most sequences of this length that fit the caps; None without a cap.
        largest_context_length: most tokens per sequence at which this batch size fits the caps; None without a cap.
        paged_layers: layers that select pages. Only these are counted.
        dense_layers: reason -> number of layers that are not paged.
    """

    batch_size: int
    context_length: int
    fits: bool
    reason: str
    gpu_bytes: int
    cpu_bytes: int
    metadata_bytes: int
    prefill_bytes: int
    parts: Mapping[str, int]
    metadata: Mapping[str, int]
    page_frames: int
    smallest_gpu_memory: int
    largest_batch_size: int | None
    largest_context_length: int | None
    paged_layers: int
    dense_layers: Mapping[str, int]
    device_parts: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = [item.name for item in fields(self) if item.name != "device_parts" or self.device_parts]
        return table("MemoryPlan", {name: getattr(self, name) for name in shown})


def plan(
    config_or_model: PreTrainedModel | PreTrainedConfig,
    *,
    context_length: int,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    method: str | Method = "fitted",
    **options: Any,
) -> MemoryPlan:
    """Memory that a `SpinCache` with these options takes for a batch, and what fits. Allocates nothing.

    Args:
        config_or_model: the model, or its config. Of a tensor-parallel model the heads of one rank count.
        context_length: tokens of each sequence, including those to be generated.
        batch_size: sequences, including beams.
        dtype: of keys and values; default: that of the model or config.
        method, options: as for `SpinCache`. With `gpu_memory="auto"` the cap is computed for a prefill from the GPU memory that
            is free now. Decoding may get more page frames than planned.
    Returns:
        The plan, also if the batch does not fit.
    Raises:
        OptionTypeError, OptionError, BudgetError, UnsupportedModelError: as for `SpinCache`.
    """
    batch_size = require_count("batch_size", batch_size, 1, MOST_TOKENS, example=1)
    context_length = require_count("context_length", context_length, 1, MOST_TOKENS, example=4096)
    parsed, resolved = SpinOptions.parse(**options), resolve_method(method)
    config, name = decoder_config(config_or_model)
    check_model(config, name)
    layers: list[int] = []
    _, reasons = build_layers(config, layers.append)
    resolved = resolved.bind(config, layers)
    check_spans(resolved)
    shapes = local_shapes(layer_shapes(config, layers), config_or_model)
    if shapes is None:
        raise OptionError(
            f"config_or_model: expected a config of {name} that names its heads and their size, got one without "
            "num_attention_heads or hidden_size; read stats() of a cache instead"
        )
    model = config_or_model if isinstance(config_or_model, nn.Module) else None
    states_dtype = _dtype(model, config, dtype)
    device = _device(model)
    devices = [device] * len(layers) if model is None else _devices_of(model, layers)
    frees = {each: free_gpu_memory(each) for each in dict.fromkeys([device, *devices])}
    caps = {each: _cap(parsed, free) for each, free in frees.items()}
    budgets = [
        tier_budget(shape, states_dtype, resolved, parsed, caps[each], devices.count(each), each, len(layers))
        for shape, each in zip(shapes, devices, strict=True)
    ]
    on_gpus = [shape for shape, each in zip(shapes, devices, strict=True) if each.type == "cuda"]
    arrays = sum(num_arrays(shape, states_dtype, resolved, parsed) for shape in on_gpus)
    made = _Planner(budgets, resolved, arrays, devices).of(batch_size, context_length)
    tuning, chunk = parsed.tuning, parsed.prefill_chunk_size
    item_bytes, tokens = states_dtype.itemsize, batch_size * context_length
    by_layer = list[int]()
    if parsed.prefill == "sparse":
        by_layer = [key_means_bytes([shape], item_bytes, batch_size, context_length) for shape in shapes]
    free = min((each for each in frees.values() if each is not None), default=None)
    fitting = fitting_tokens(config, item_bytes, tuning, 0, free, sum(by_layer))
    most = fitting if chunk is None else batch_size * chunk
    means = sum(by_layer) if tokens > most else max(by_layer, default=0)  # read whole: of one layer at a time
    peak = prefill_bytes(config, item_bytes, tokens, most, piece_bytes(tuning, free), means)
    for each, free in frees.items():
        on_it = [budget for budget, where in zip(budgets, devices, strict=True) if where == each]
        taken = made.device_parts.get(str(each), made.gpu_bytes) + made.metadata_bytes
        left = None if free is None else max(0, free - taken)
        peak = max(peak, indexing_bytes(resolved, on_it, tuning, batch_size, context_length, left))
    return replace(made, dense_layers=dict(reasons), prefill_bytes=peak)


class _Planner:
    """Plans for one cache.

    Args:
        budgets: of the paged layers.
        arrays: number of chunked arrays with an address table.
        devices: of the paged layers.
    """

    def __init__(self, budgets: list[TierBudget], method: Method, arrays: int, devices: list[torch.device]) -> None:
        self.budgets, self.arrays, self.page_size, self.devices = budgets, arrays, method.page_size, devices
        self.clustering = clustering_bytes(method)
        self.kinds = set(budgets)

    def of(self, batch_size: int, context_length: int) -> MemoryPlan:
        pages = -(-context_length // self.page_size)
        room = batch_size, batch_size * segments_of(pages), pages
        smallest = max((budget.smallest_gpu_memory(*room) for budget in self.kinds), default=0)
        refusal = None
        try:
            check_all(self.kinds, *room)
        except (BudgetError, CapacityError) as error:
            refusal = str(error)
        counted = self.budgets if refusal is None else [replace(b, gpu_memory=smallest) for b in self.budgets]
        parts, metadata, frames = _sizes(counted, room, self.clustering)
        metadata["address tables"] = self.arrays * MAX_CHUNKS * 8
        by_device = {}
        for device in dict.fromkeys(self.devices):
            on_it = [budget for budget, where in zip(counted, self.devices, strict=True) if where == device]
            by_device[str(device)] = _gpu_bytes(_sizes(on_it, room, self.clustering)[0])
        held = "all pages stay in the compute tier" if not frames else "pages live in the cpu tier"
        return MemoryPlan(
            batch_size=batch_size, context_length=context_length, fits=refusal is None,
            reason=(held if self.budgets else "no layer keeps pages") if refusal is None else refusal,
            gpu_bytes=_gpu_bytes(parts), cpu_bytes=parts["host pages"],
            metadata_bytes=metadata.total(), prefill_bytes=0, parts=dict(parts),
            metadata={name: number for name, number in metadata.items() if number},
            page_frames=min(frames, default=0), smallest_gpu_memory=smallest,
            largest_batch_size=self._most(lambda number: self._fits(number, segments_of(pages))),
            largest_context_length=self._longest(batch_size), paged_layers=len(self.budgets), dense_layers={},
            device_parts=by_device if len(by_device) > 1 else {},
        )  # fmt: skip

    def _longest(self, batch_size: int) -> int | None:
        segments = self._most(lambda number: self._fits(batch_size, number))
        return None if segments is None else segments * SEGMENT_PAGES * self.page_size

    def _fits(self, batch_size: int, segments: int) -> bool:
        """Whether `batch_size` sequences of `segments` segments each fit."""
        room = batch_size, batch_size * segments, segments * SEGMENT_PAGES
        return all(budget.fits(*room) for budget in self.kinds)

    def _most(self, fits: Callable[[int], bool]) -> int | None:
        """Largest number that fits; None without a cap."""
        if all(budget.gpu_memory is None for budget in self.kinds):
            return None
        most = 1
        while fits(most):
            most *= 2
        return largest(fits, most)


def _sizes(
    budgets: list[TierBudget], room: tuple[int, int, int], clustering: dict[str, int]
) -> tuple[Counter[str], Counter[str], list[int]]:
    """Bytes by part and by table of a batch that fits, and the page frames of layers that have frames.

    Args:
        room: batch size, segments, pages per sequence.
        clustering: bytes per page of the tables of clustering, by name.
    """
    batch_size, segments, pages = room
    parts: Counter[str] = Counter({"pages": 0, "page frames": 0, "summaries": 0, "host pages": 0})
    metadata: Counter[str] = Counter()
    if budgets:
        metadata.update({"directory": ENTRY_BYTES * segments, "reference counts": ENTRY_BYTES * segments})
    numbers = []
    for budget in budgets:
        rows, streams, frames = budget.rows(segments), batch_size * budget.num_heads, budget.num_frames(*room)
        parts["summaries"] += rows * budget.summary_bytes
        metadata.update({name: rows * each for name, each in clustering.items()})
        metadata["fitted tensors"] += streams * budget.sequence_bytes
        if frames is None:
            parts["pages"] += rows * budget.page_bytes
        else:
            numbers.append(frames)
            parts["host pages"] += rows * budget.host_page_bytes
            parts["page frames"] += streams * frames * budget.page_bytes
            metadata["page_slot"] += streams * whole_segments(pages) * PAGE_SLOT_BYTES
            metadata["slot_page"] += streams * frames * SLOT_PAGE_BYTES
            metadata["slot_step"] += streams * frames * SLOT_STEP_BYTES
    return parts, metadata, numbers


def _gpu_bytes(parts: Counter[str]) -> int:
    return parts["pages"] + parts["page frames"] + parts["summaries"]


def _cap(options: SpinOptions, free: int | None) -> int | None:
    """The cap of a device with `free` bytes; None for none."""
    if free is None or options.gpu_memory is not None:
        return options.gpu_memory
    return Watermarks(options.tuning.margin_bytes).cap_for_prompts(0, free)


def _devices_of(model: nn.Module, layers: list[int]) -> list[torch.device]:
    """The device of each paged layer of a model."""
    devices = layer_devices(model, max(layers, default=-1) + 1)
    return [devices[layer] for layer in layers]


def _dtype(model: nn.Module | None, config: Any, given: Any) -> torch.dtype:
    """Dtype of keys and values."""
    if given is None:
        given = getattr(config if model is None else model, "dtype", None) or torch.get_default_dtype()
    if not isinstance(given, torch.dtype):
        raise OptionTypeError(f"dtype: expected a torch.dtype, got {type(given).__name__}; pass dtype=torch.bfloat16")
    if not given.is_floating_point:
        raise OptionError(f"dtype: expected one of floating point, got {given}; pass dtype=torch.bfloat16")
    return given


def _device(model: Any) -> torch.device:
    """The compute tier: the model's device; for a config the GPU if there is one."""
    if model is not None:
        return torch.device(model.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
