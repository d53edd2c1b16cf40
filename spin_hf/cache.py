"""SpinCache: the transformers contract, nothing else.

    SpinCache
     ├── SharedState   options, method, sequences (directory, padding): one for all paged layers
     └── layers[i]     SpinLayer where the model has full attention, else transformers' own layer

Everything that changes sequences (crop, reorder, select, reset) is done once on the shared state, and handed to the
layers that are not paged.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.configuration_utils import PreTrainedConfig

from . import defer, kernels, regroup, rereading, wrap
from .attention import switch
from .attention.interface import MaskedLength
from .attention.methods import resolve_method
from .attention.partition import Method, check_recipe, recipe_of
from .compiled import pool_of
from .config import SpinOptions, parse_bytes
from .errors import BatchSizeError, OptionError, OptionTypeError
from .forward import ForwardLog, unpaged_or_none
from .graph import DecodeSteps, graph_model
from .layer import SpinLayer
from .layer_budget import check_stretches
from .layer_kinds import build_layers, check_model, decoder_config, is_placeholder
from .shared import SharedState
from .stats import CacheStats
from .step_plan import StepPlan
from .storage.sequences import Sequences, check_batch

_CROP_TAKES_LENGTHS = Version(transformers.__version__) < Version("5.18")


class SpinCache(Cache):
    """A paged, two-tier, query-aware sparse KV cache for `generate`.

    Keys and values live in pages; attention reads sinks, the recent window and the pages that `method` selects for the
    query. With `budget >= context` the output equals `DynamicCache`'s.

    Args:
        model: the model, or its config. Its `_attn_implementation` becomes "spin" while a cache of it exists; calls
            without a `SpinCache` still get the implementation that stood there.
        method: a name, `"bisection"` unless you say another, or a method object (`ShadowKV(...)`).
        budget: tokens selected per KV head and step, beside sinks and recent window: an int, or a float share of the
            context. Rounded up to whole pages.
        num_sink_tokens, recent_window: first and last tokens that are always attended to, by whole pages.
        dense_below: contexts of at most this many tokens are attended to densely.
        gpu_memory, cpu_memory: caps on the tiers: bytes, or a text such as "8GiB"; "auto" lets the cache choose.
        summary_dtype: in which the vectors that pages are chosen by are kept: "int8" with a scale each, "model" for the
            dtype of the keys, or "auto": int8 where keys have 16 bits.
        cpu_dtype: of pages in the cpu tier: "auto" for the dtype of the keys, or "int8" with a scale for each key and value,
            which takes half of 16 bits in host memory and in every load. A page's content is then what its int8 numbers
            give, wherever it is read, so outputs do not depend on the number of page frames. While all fits the compute tier
            nothing is int8, and prompts attend to their own keys and values as they are.
    Raises:
        OptionTypeError, OptionError, BudgetError: an option cannot work.
        UnsupportedModelError: the model cannot be served.

    Source: SPIN, arXiv 2604.26837.
    """

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        method: str | Method = "bisection",
        *,
        budget: int | float = 2048,
        num_sink_tokens: int = 4,
        recent_window: int = 64,
        dense_below: int = 0,
        gpu_memory: int | str = "auto",
        cpu_memory: int | str = "auto",
        summary_dtype: str = "auto",
        cpu_dtype: str = "auto",
    ) -> None:
        options = SpinOptions.parse(
            budget=budget, num_sink_tokens=num_sink_tokens, recent_window=recent_window, dense_below=dense_below,
            gpu_memory=gpu_memory, cpu_memory=cpu_memory, summary_dtype=summary_dtype, cpu_dtype=cpu_dtype,
        )  # fmt: skip
        resolved = resolve_method(method)
        config, name = decoder_config(model)
        check_model(config, name)
        sequences = Sequences(resolved.page_size, resolved.uses_positions)
        self._shared = SharedState(options, resolved, sequences, StepPlan(options, sequences), name)
        layers, self._dense_reasons = build_layers(config, lambda index: SpinLayer(index, self._shared))
        self._shared.method = resolved.bind(config, [layer.layer_idx for layer in self._shared.layers])
        check_recipe(self._shared.method)
        check_stretches(self._shared.method)
        super().__init__(layers=layers)
        heads = getattr(config, "num_attention_heads", 0)
        self._shared.query_heads = heads if isinstance(heads, int) else 0  # some configs have a list
        self._shared.served = weakref.ref(model)
        self._log = ForwardLog(self.layers, self._shared)
        if isinstance(model, PreTrainedConfig) and self._may_be_compiled():
            self._shared.pool = pool_of(config)
        self._bind(config, graph_model(model))

    def __repr__(self) -> str:
        shared, tokens = self._shared, self._shared.committed
        return f"SpinCache({shared.model_name}, {shared.method}, {shared.options}, tokens={tokens})"

    # ---------------------------------------------------------------------------------------------------- the contract

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take the new keys and values of a layer, [B, H, n, Dk] and [B, H, n, Dv].

        Returns:
            What to hand to the attention function: for a paged layer the new states only (it finds the rest).
        Raises:
            AttentionError: the config names another attention implementation.
            BatchSizeError: the batch differs from what the cache holds. Nothing has changed.
        """
        switch.check(self._config)
        if torch.compiler.is_compiling():
            return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        self._touch(layer_idx, key_states.shape[0])
        states = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        self._log.touched(layer_idx, self.layers)
        return states

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers', for linear-attention and convolution layers."""
        if torch.compiler.is_compiling():
            return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)
        self._touch(layer_idx, conv_states.shape[0])
        states = super().update_conv_state(conv_states, layer_idx, *args, **kwargs)
        self._log.touched(layer_idx, self.layers)
        return states

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers', for linear-attention layers."""
        if torch.compiler.is_compiling():
            return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)
        self._touch(layer_idx, recurrent_states.shape[0])
        states = super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)
        self._log.touched(layer_idx, self.layers)
        return states

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the decode step: with a cache made from a config, on a GPU."""
        return self._shared.pool is not None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held by every layer; a forward that was interrupted does not count."""
        if self._shared.layers:
            return self._shared.layers[0].get_seq_length()  # type: ignore[return-value]
        interrupted = not torch.compiler.is_compiling() and self._log.last >= 0
        return super().get_seq_length(self._log.final if interrupted else layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of a layer's mask. transformers asks before a forward, so here is checked what it needs.

        Raises:
            AttentionError: the config names another attention implementation.
            BudgetError, CapacityError: there is no room for the tokens to come.
            CacheStateError: an interrupted forward cannot be taken back.
        """
        if not torch.compiler.is_compiling():
            switch.check(self._config)
            self._log.settle(self.layers)
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        if self._shared.captured_length is not None and not isinstance(self.layers[layer_idx], SpinLayer):
            return MaskedLength.of(length, None, window=True), 0  # a full window without padding, seen whole
        return length, offset

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens of every sequence; 0 lets sliding layers drop what they recorded.

        transformers before 5.18 also passes positive numbers, the length to keep; newer versions do not.
        """
        tokens_to_remove = int(tokens_to_remove)  # older transformers pass a tensor
        if tokens_to_remove > 0 and not _CROP_TAKES_LENGTHS:
            raise OptionError(
                f"crop: expected 0 or a negative number of tokens to remove, got {tokens_to_remove}; pass -n"
            )
        self._log.settle(self.layers)
        length = self.get_seq_length()
        with unpaged_or_none(self._unpaged_layers()) as unpaged:
            for layer in unpaged:
                layer.crop(tokens_to_remove)
            if self._shared.layers:
                keep = min(length, tokens_to_remove) if tokens_to_remove > 0 else max(0, length + tokens_to_remove)
                if keep < length:
                    self._shared.truncate(keep)

    def reset(self) -> None:
        """Forget all tokens. Options, and the pages' memory, are kept; the next batch may have another size."""
        fresh, _ = build_layers(self._config, lambda index: self.layers[index])
        self.layers[:] = fresh  # transformers' own layers keep the batch size of their states over a reset
        self._shared.clear()
        self._log.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i continues what sequence `beam_idx[i]` was. Pages are shared, not copied."""
        self._select(beam_idx.tolist(), lambda layer: layer.reorder_cache(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` (int64, or a bool mask), in that order."""
        rows = (indices.nonzero().flatten() if indices.dtype == torch.bool else indices).tolist()
        self._select(rows, lambda layer: layer.batch_select_indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, side by side. Pages are shared, not copied."""
        rows = [row for row in range(self._held_batch() or 0) for _ in range(repeats)]
        self._select(rows, lambda layer: layer.batch_repeat_interleave(repeats))

    # ------------------------------------------------------------------------------------------------------- our own

    @classmethod
    def from_cache(
        cls, cache: Cache, model: PreTrainedModel | PreTrainedConfig, method: str | Method = "bisection",
        *, attention_mask: Tensor | None = None, **options: Any,
    ) -> SpinCache:  # fmt: skip
        """A SpinCache that holds what a `DynamicCache` holds, indexed and placed as a prefill would have.

        Args:
            cache: the source; it is not changed and shares nothing with the result.
            attention_mask: [B, tokens], the padding mask of what it holds; None for no padding.
            options: as for `SpinCache`.
        Raises:
            OptionTypeError: `cache` is no transformers cache.
            OptionError: its layers do not match the model's.
        """
        if not isinstance(cache, Cache):
            raise OptionTypeError(
                f"cache: expected a transformers Cache, got {type(cache).__name__}; pass a DynamicCache"
            )
        made = cls(model, method, **options)
        if len(cache.layers) not in (0, len(made.layers)):
            raise OptionError(
                f"cache: expected {len(made.layers)} layers as the model has, got {len(cache.layers)}; "
                "pass a cache of this model"
            )
        valid = None if attention_mask is None else attention_mask.bool()
        for index, (layer, source) in enumerate(zip(list(made.layers), cache.layers, strict=False)):
            if not isinstance(layer, SpinLayer):
                made.layers[index] = deepcopy(source)
            elif source.keys is not None and source.keys.numel():
                if source.keys.shape[-2] != source.get_seq_length():
                    raise OptionError(
                        f"cache: layer {index} holds only a window of its tokens, expected all; "
                        "pass a DynamicCache(config=model.config)"
                    )
                layer.append(source.keys, source.values, valid)
        made._shared.commit()
        made._shared.visible_length.fill_(made._shared.committed)
        return made

    def stats(self) -> CacheStats:
        """What the cache holds and what its steps did so far."""
        shared = self._shared
        if not (self._log.irreversible or self._log.overwritten):
            self._log.settle(self.layers)
        stores = [layer.store for layer in shared.layers if layer.store is not None]
        frames = [store.frames for store in stores if store.frames is not None]
        counted = shared.counted()
        loads, hits = sum(f.loads for f in frames) + counted["LOADS"], sum(f.hits for f in frames) + counted["HITS"]
        queries = sum(layer.attended_queries for layer in shared.layers) + counted["QUERIES"]
        attended = sum(layer.attended_tokens for layer in shared.layers) + counted["TOKENS"]
        segments, mandatory = shared.sequences.segments_in_use, sum(store.mandatory_frames for store in stores)
        metadata = Counter(shared.sequences.metadata)
        for store in stores:
            metadata.update(store.metadata(segments))
        return CacheStats(
            sequences=shared.sequences.batch_size,
            tokens=self.get_seq_length(),
            pages=sum(store.pages_held() for store in stores),
            gpu_bytes=sum(store.gpu_bytes(segments) for store in stores),
            cpu_bytes=sum(store.cpu_bytes(segments) for store in stores),
            metadata_bytes=metadata.total(),
            metadata=dict(metadata),
            mandatory_frames=mandatory,
            buffer_frames=sum(f.frames.shape[0] for f in frames) - mandatory,
            loads=loads,
            evictions=sum(f.evictions for f in frames) + counted["EVICTIONS"],
            hit_rate=hits / (hits + loads) if hits + loads else 1.0,
            attended_tokens=attended / queries if queries else float("nan"),
            sparse_queries=queries,
            paged_layers=len(shared.layers),
            dense_layers=dict(self._dense_reasons),
        )

    def release_gpu_memory(self, num_bytes: int | str | None = None) -> int:
        """Give GPU memory back at once: page frames that steps can do without, and pages that can go to the cpu tier.

        For `except torch.OutOfMemoryError:`, or before something else needs the memory. torch keeps it for reuse until
        `torch.cuda.empty_cache()`. No token changes; pages are loaded when they are needed. The cache takes memory again, if
        much is free, at one of its later steps. A forward that was interrupted is taken back first.

        Args:
            num_bytes: how much is needed, in bytes or as "2GiB"; None for all that no step needs.
        Returns:
            bytes given back; less than was asked for where steps need the rest.
        """
        wanted = None if num_bytes is None else parse_bytes("num_bytes", num_bytes)
        self._shared.pending = None  # an interrupted forward's keys never come
        self._log.settle(self.layers)
        return self._shared.gpu.give_back(wanted)

    def check_integrity(self) -> None:
        """Raise CacheStateError where tables, tiers or summaries contradict each other. Reads everything: for tests.

        A forward that was interrupted is taken back first.
        """
        self._log.settle(self.layers)
        self._shared.sequences.check_integrity()
        regroup.check_integrity(self._shared)
        for layer in self._shared.layers:
            layer.check_integrity()

    def __deepcopy__(self, memo: dict[int, Any]) -> SpinCache:
        """An independent cache of the same model with the same contents (transformers' way to reuse a prefix)."""
        self._log.settle(self.layers)
        self._shared.gpu.before_copy()
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, attribute in self.__dict__.items():
            if name not in _BOUND:
                setattr(twin, name, deepcopy(attribute, memo))
        twin._shared.forget_kernels(self._shared.counted())
        twin._bind(self._config, None if self.steps is None else self.steps.model())
        return twin

    def _unpaged_layers(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, SpinLayer)]

    def _may_be_compiled(self) -> bool:
        """Whether kernels serve every layer that holds tokens: host work, as of windows, has no place in a graph."""
        served = kernels.on_gpu() and recipe_of(self._shared.method) is not None
        return served and all(is_placeholder(layer) for layer in self._unpaged_layers())

    def _touch(self, index: int, batch_size: int) -> None:
        """Before layer `index` changes: note it, and refuse a batch of another size."""
        check_batch(self._held_batch() or batch_size, batch_size)
        self._log.touch(index, self.layers)

    def _held_batch(self) -> int | None:
        """Sequences held, by whichever layer says so; None while empty."""
        if self._shared.layers:
            return self._shared.sequences.batch_size if self._shared.committed else None
        for layer in self.layers:
            if isinstance(layer, CacheLayerMixin) and layer.is_initialized and layer.get_seq_length():
                return layer.keys.shape[0]
        return None

    def _select(self, rows: list[int], select: Callable[[Any], object]) -> None:
        """Check and select sequences of all layers; `select` does so in one that is not paged. All or none."""
        self._log.settle(self.layers)
        held = self._held_batch()
        bad = [row for row in rows if held is not None and not 0 <= row < held]
        if held is not None and not rows:
            raise BatchSizeError(f"expected at least one of the {held} sequences held, got none; call cache.reset()")
        if bad:
            raise BatchSizeError(f"indices {bad} are outside the {held} sequences held; pass 0 to {(held or 0) - 1}")
        with unpaged_or_none(self._unpaged_layers()) as unpaged:
            for layer in unpaged:
                select(layer)
            self._shared.select(rows)

    def _bind(self, config: Any, model: nn.Module | None) -> None:
        """For as long as this cache lives: switch the config to "spin", and wrap the forward of `model`."""
        self._config = config
        if self._shared.layers:  # some models without paged layers ask for the name of the implementation
            switch.acquire(config)
        self.steps = None if model is None else DecodeSteps(model, self.layers, self._shared, self._log)
        wrapped = None if model is None else wrap.acquire(model)
        if wrapped is not None:
            defer.acquire()
        rereading.acquire(self, None if self._shared.served is None else self._shared.served(), config)
        self._finalizer = weakref.finalize(self, _dispose, config, wrapped, self._shared)


_BOUND = ("_config", "_finalizer", "steps")


def _dispose(config: Any, wrapped: weakref.ref[nn.Module] | None, shared: SharedState) -> None:
    """Give back what a cache held as soon as it is dropped, without waiting for the garbage collector."""
    switch.release(config)
    if wrapped is not None:
        wrap.release(wrapped)
        defer.release()
    shared.dispose()
