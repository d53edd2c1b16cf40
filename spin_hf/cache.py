"""SpinCache: the interface that transformers calls.

    SpinCache
     ├── CacheState    options, method, page table, padding: one for all paged layers
     └── layers[i]     SpinLayer for full attention, else transformers' own layer

Operations on sequences (crop, reorder, select, reset) run once on the shared state and once on each unpaged layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig

from .attention.interface import MaskedLength
from .attention.methods.base import Method, check_recipe
from .attention.methods.registry import resolve_method
from .backends.state_checks import held_batch
from .config import SpinOptions, parse_bytes
from .forward_log import ForwardLog
from .forward_pass import ForwardPass
from .graph.model_calls import ModelCalls, model_of
from .indexing import cluster
from .inference_mode import outside_inference_mode
from .integration import dropped_cache
from .integration.batch_indices import removed_by_crop, rows_of, times_of
from .integration.cache_copies import CacheCopies
from .integration.from_cache import check_source, take_over
from .integration.layer_types import build_layers, check_model, decoder_config
from .integration.linear_states import LinearStates
from .integration.rank_agreement import meeting
from .integration.tensor_parallel import ranks_of, shared_options
from .layer import SpinLayer
from .memory.layer_budget import check_spans
from .persistence.prompt_store import PromptStore, checked_store
from .persistence.saved_caches import SavedCaches
from .state import CacheState
from .stats import CacheStats, stats_of
from .storage.page_table import PageTable, check_batch
from .transaction import finished, undone


class SpinCache(CacheCopies, SavedCaches, LinearStates):
    """A paged, two-tier, query-aware sparse KV cache for `generate`.

    Keys and values live in pages: in the compute tier (GPU memory, or RAM without a GPU) while all fit, else in the cpu tier
    (page-locked host memory). Attention reads the sinks (first tokens), the recent window (last tokens) and the pages that
    `method` selects for the query. With `budget >= context` the output equals `DynamicCache`'s. Source: arXiv 2604.26837.

    Args:
        model: the model, or its config. Given a model, `config._attn_implementation` is "spin" during its calls that carry
            the cache. Given a config, it stays "spin" until the cache's first forward has shown which model runs it. Calls
            without a `SpinCache` use the model's original implementation.
        method: "fitted", "bisection", "shadowkv", "retroinfer", "quest", or an object such as `ShadowKV(...)`,
            `SeerAttention(gates)`.
        budget: tokens selected per KV head and step, in addition to sinks and recent window: an int, or a float fraction of
            the context in (0, 1]. Rounded up to whole pages.
        num_sink_tokens, recent_window: first and last tokens that are always attended to. Rounded up to whole pages.
        dense_below: contexts of at most this many tokens are attended to densely. "auto": those whose keys and values a GPU
            reads faster than it selects pages, while all of them are in its memory.
        gpu_memory, cpu_memory: caps on the tiers: bytes, or a string such as "8GiB". "auto" is free GPU memory less a margin,
            and no cap on the cpu tier. On several GPUs `gpu_memory` is a cap on each, for the layers on it.
        summary_dtype: dtype of the vectors in page summaries: "int8" with one scale each, "model" for the dtype of the keys, or
            "auto": int8 if keys have 16 bits.
        cpu_dtype: dtype of pages in the cpu tier: "auto" for the dtype of the keys, or "int8" with one scale per key and
            value. Int8 halves 16-bit pages in host memory and in transfers. Every read of a page, also of its copy on the GPU,
            then gives the dequantized values, so outputs do not depend on which pages have copies. Nothing is quantized while
            all pages fit the compute tier. A forward attends to its own keys and values unquantized.
        prefill_chunk_size: tokens of a prompt that are read at a time; "auto" by free memory, None for all.
            Exact, unless `cpu_dtype` is "int8".
        prefill: "sparse" lets blocks of 128 queries of a long prompt attend to the blocks of keys that matter to them, as
            estimated, and its last 512 tokens to everything. Faster from about 32K tokens on; approximate. Padded prompts and
            models with a softcap are read densely.
        prefill_top_p: share of the estimated attention that a sparse prompt reads.
        rectify_interval: after so many generated tokens, from 64 to 1024, they are read again like a prompt, which replaces
            their keys and values. The errors of sparse steps then do not add up (dense rectification, arXiv 2506.04108). None
            for never. Models with sliding or linear layers keep what they computed.
        store: prompts that were read before. A prompt of `generate` that begins like one of them is restored as far as that
            goes, and stored for later ones. None for none.
    Raises:
        OptionTypeError, OptionError, BudgetError: an option cannot work.
        UnsupportedModelError: the model cannot be served.
    """

    @outside_inference_mode
    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        method: str | Method = "fitted",
        *,
        budget: int | float = 2048,
        num_sink_tokens: int = 4,
        recent_window: int = 64,
        dense_below: int | str = "auto",
        gpu_memory: int | str = "auto",
        cpu_memory: int | str = "auto",
        summary_dtype: str = "auto",
        cpu_dtype: str = "auto",
        prefill_chunk_size: int | str | None = "auto",
        prefill: str = "dense",
        prefill_top_p: float = 0.9,
        rectify_interval: int | None = None,
        store: PromptStore | None = None,
    ) -> None:
        target = model_of(model)
        ranks = ranks_of(model if target is None else target)
        with meeting(ranks, "make a SpinCache"):
            options = SpinOptions.parse(
                budget=budget, num_sink_tokens=num_sink_tokens, recent_window=recent_window, dense_below=dense_below,
                gpu_memory=gpu_memory, cpu_memory=cpu_memory, summary_dtype=summary_dtype, cpu_dtype=cpu_dtype,
                prefill_chunk_size=prefill_chunk_size, prefill=prefill, prefill_top_p=prefill_top_p,
                rectify_interval=rectify_interval,
            )  # fmt: skip
            resolved = resolve_method(method)
            config, name = decoder_config(model)
            check_model(config, name)
            options = shared_options(ranks, options, resolved, checked_store(store), target)
            sequences = PageTable(resolved.page_size, resolved.uses_positions)
            self._state = CacheState(options, resolved, sequences, name, weakref.ref(model), store=store, ranks=ranks)
            self._passes = ForwardPass(self._state)
            layers, self._dense_reasons = build_layers(config, lambda index: SpinLayer(index, self._passes))
            self._state.method = resolved.bind(config, [layer.layer_idx for layer in self._state.layers])
            check_recipe(self._state.method)
            check_spans(self._state.method)
        super().__init__(layers=layers)
        self._log = ForwardLog(self.layers, self._passes)
        self._bind(config, target)

    def __repr__(self) -> str:
        held = self._state
        return f"SpinCache({held.model_name}, {held.method}, {held.options}, tokens={held.committed})"

    # -------------------------------------------------------------------------------------------- called by transformers

    @outside_inference_mode
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass new keys and values, [B, H, n, Dk] and [B, H, n, Dv], to a layer.

        Returns:
            Keys and values for the attention function. A paged layer returns the new ones only; "spin" attention reads the
            others from the cache.
        Raises:
            AttentionError: the config names another attention implementation.
            BatchSizeError: the batch size differs from the cache's. Nothing has changed.
        """
        self._before(layer_idx, key_states.shape[0])
        states = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        self._log.touched(layer_idx, self.layers)
        return states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held by every layer. Those of an interrupted forward do not count."""
        if self._state.layers:
            return self.layers[self._state.layers[0].layer_idx].get_seq_length()  # type: ignore[return-value, unused-ignore]
        interrupted = not torch.compiler.is_compiling() and self._log.last >= 0
        return super().get_seq_length(self._log.final if interrupted else layer_idx)

    @outside_inference_mode
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of a layer's mask. transformers calls this before each forward, so memory is checked here.

        Raises:
            AttentionError: the config names another attention implementation.
            BudgetError, CapacityError: the new tokens do not fit.
            CacheStateError: an interrupted forward cannot be rolled back.
        """
        if not torch.compiler.is_compiling():
            self.calls.before_mask(self)
            if self._state.layers:  # models without paged layers may call this in the middle of a forward
                self._log.settle(self.layers)
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        if self._state.captured_length is not None and not isinstance(self.layers[layer_idx], SpinLayer):
            return MaskedLength.of(length, None, window=True), 0  # the window is full and has no padding: no mask
        return length, offset

    @outside_inference_mode
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last n tokens of every sequence: `crop(-n)`. `crop(0)` only drops the past that sliding layers record.

        Before 5.18 transformers also passes positive numbers: the length after the crop.
        """
        tokens_to_remove = removed_by_crop(tokens_to_remove)
        self._log.settle(self.layers)
        length = self.get_seq_length()
        with undone(self._state, self._unpaged_layers()), meeting(self._state.ranks, "crop", length):
            for layer in self._unpaged_layers():
                layer.crop(tokens_to_remove)
            if self._state.layers:
                keep = min(length, tokens_to_remove) if tokens_to_remove > 0 else max(0, length + tokens_to_remove)
                if keep < length:
                    self._passes.truncate(keep)

    @outside_inference_mode
    def reset(self) -> None:
        """Remove all tokens. Options and allocated pages remain; the next batch may have another size."""
        fresh, _ = build_layers(self._config, lambda index: self.layers[index])

        def forget() -> None:
            self.layers[:] = fresh  # reset() of transformers' own layers does not reset the batch size
            self._passes.clear()
            self._log.clear()

        finished(self._state, forget)

    @outside_inference_mode
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence i becomes a copy of sequence `beam_idx[i]`. Pages are shared, not copied."""
        self._select(beam_idx)

    @outside_inference_mode
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` (integers or a bool mask), in that order."""
        self._select(indices)

    @outside_inference_mode
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times, side by side. Pages are shared, not copied."""
        times = times_of(repeats)
        self._log.settle(self.layers)
        rows = [row for row in range(held_batch(self._state, self.layers) or 0) for _ in range(times)]
        self._select(rows)

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """As `DynamicCache`: keys, values and, for a sliding layer, the window size. Paged layers give copies."""
        for layer in self.layers:
            yield layer.keys, layer.values, getattr(layer, "_sliding_window_tensor", None)

    # ---------------------------------------------------------------------------------------------- SpinCache's own

    @classmethod
    @outside_inference_mode
    def from_cache(
        cls, cache: Cache, model: PreTrainedModel | PreTrainedConfig, method: str | Method = "fitted",
        *, attention_mask: Tensor | None = None, **options: Any,
    ) -> SpinCache:  # fmt: skip
        """A SpinCache with the tokens of a `DynamicCache`, indexed and placed as after a prefill.

        Args:
            cache: the source. It is not changed and shares no memory with the result.
            model, method: as for `SpinCache`.
            attention_mask: [B, tokens], padding mask of its tokens; None for no padding.
            options: as for `SpinCache`.
        Raises:
            OptionTypeError, OptionError, BatchSizeError: not a cache, or layers or mask do not match the model or each other.
        """
        if not isinstance(cache, Cache):
            check_source(cache, [], (), None, None)
        made = cls(model, method, **options)
        paged = {layer.layer_idx for layer in made._state.layers}
        valid = check_source(cache, made.layers, paged, made._config, attention_mask, made.calls.model())
        with meeting(made._state.ranks, "take over a cache"):
            take_over(cache, made.layers, paged, valid)
        made._passes.commit()
        made._state.visible_length.fill_(made._state.committed)
        return made

    @outside_inference_mode
    def stats(self, all_ranks: bool = False) -> CacheStats:
        """Memory and tokens held, and counters of the steps so far. `print` shows the result as a table.

        Args:
            all_ranks: of a tensor-parallel model, whether to sum over all ranks. All of them must then call it.
        """
        if self._log.can_settle(self.layers):
            self._log.settle(self.layers)
        ranks = self._state.ranks if all_ranks else None
        return stats_of(self._state, self._passes.backends.counted(), self.get_seq_length(), self._dense_reasons, ranks)

    @outside_inference_mode
    def release_gpu_memory(self, num_bytes: int | str | None = None) -> int:
        """Free GPU memory now: buffer page frames, and pages that can move to the cpu tier.

        For `except torch.OutOfMemoryError:`, or before another allocation. torch's allocator holds the memory until
        `torch.cuda.empty_cache()`. No output changes; pages are loaded again on demand. Later steps may allocate memory again
        when much is free. An interrupted forward is rolled back first.

        Args:
            num_bytes: bytes to free, as an int or a string such as "2GiB"; None for everything that no step needs.
        Returns:
            Bytes freed; fewer than `num_bytes` if steps need the rest.
        """
        wanted = None if num_bytes is None else parse_bytes("num_bytes", num_bytes)
        self._log.drop_pending()
        self._log.settle(self.layers)
        return self._passes.gpu.give_back(wanted)

    @outside_inference_mode
    def roll_back(self) -> None:
        """Remove the tokens of an interrupted forward, if there is one.

        A cache does this itself, except for the first forward of a cache made from a config, whose end it cannot see.
        """
        self._log.drop_pending()
        if self._state.failed or not self._log.is_complete(self.layers):
            self._log.roll_back(self.layers)

    @outside_inference_mode
    def check_integrity(self) -> None:
        """Raise CacheStateError if tables, tiers or summaries contradict each other. Reads all pages; meant for tests.

        An interrupted forward is rolled back first.
        """
        self._log.settle(self.layers)
        self._state.sequences.check_integrity()
        cluster.check_integrity(self._state)
        for layer in self.paged_layers:
            layer.check_integrity()

    @property
    def paged_layers(self) -> list[SpinLayer]:
        """The layers whose keys and values live in pages. Their attributes are for inspection and may change."""
        return [layer for layer in self.layers if isinstance(layer, SpinLayer)]

    def _unpaged_layers(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, SpinLayer)]

    def _before(self, index: int, batch_size: int) -> None:
        """Before layer `index` changes: check the batch size and log the change."""
        if torch.compiler.is_compiling():
            self.calls.check_traced()
            return
        self.calls.check()
        held = held_batch(self._state, self.layers)
        if held is not None:
            check_batch(held, batch_size)
        self._log.check_layer(index, self.layers)
        self._log.touch(index, self.layers)

    def _select(self, indices: Any) -> None:
        """Select sequences in all layers. If it fails, no layer has changed."""
        self._log.settle(self.layers)
        rows = rows_of(indices, held_batch(self._state, self.layers))
        if not rows:
            return  # the cache is empty
        chosen = torch.tensor(rows)
        with undone(self._state, self._unpaged_layers()), meeting(self._state.ranks, "select sequences", len(rows)):
            for layer in self._unpaged_layers():
                layer.reorder_cache(chosen)  # every layer type has it; any number of rows is allowed
            self._passes.select_sequences(rows)

    def _bind(self, config: Any, model: nn.Module | None, copied: ModelCalls | None = None) -> None:
        """Hook the calls of `model` that carry this cache, while the cache lives. `copied` is of the cache it is a copy of."""
        self._config = config
        wrapped = None if copied is None else copied.wrapped
        self.calls = ModelCalls(config, model, self.layers, self._passes, self._log, wrapped)
        made_from = self._state.model_or_config
        dropped_cache.acquire(self, None if made_from is None else made_from(), config)
        self._finalizer = weakref.finalize(self, self.calls.close)
