"""One full-attention layer of the cache: the five operations of SPIN on its own pages.

    index     method     summaries of the pages that this step completed
    offload   store      tokens to their pages, in whichever tier those are
    select    method     pages that the query needs, beside sinks and recent window
    retrieve  store      page frames of these pages, missing ones loaded
    attend    kernels    exact softmax over the retrieved tokens

A layer is called twice per forward: `update` (by the model) tags the new keys, `run` (by the custom op) does the work.

Which queries attend to what:
    first call on an empty cache, or more than `MAX_SPARSE_QUERIES` tokens (prefill)    all tokens
    a mask that is more than padding                                                    all tokens, by that mask
    otherwise (decode, verification)                                                    each query its own selection
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from . import kernels
from .attention.interface import LAYER_TAG, MaskedLength, register_layer
from .attention.partition import Method, Query
from .config import SpinOptions
from .errors import AttentionError, CacheStateError
from .plan import StepPlan, pages_of
from .storage.budget import TierBudget, auto_gpu_memory
from .storage.pages import PageStore
from .storage.sequences import Sequences

logger = logging.getLogger("spin_hf")

MAX_SPARSE_QUERIES = 16
"""Most tokens of one call whose queries select pages; longer calls are prefill and attend to everything."""

_INDEX_PAGES = 4096
"""Pages indexed at a time, which bounds the temporary memory of a long prefill."""


@dataclass
class SharedState:
    """What the paged layers of a cache have in common."""

    options: SpinOptions
    method: Method
    sequences: Sequences
    plan: StepPlan
    model_name: str
    layers: list[SpinLayer] = field(default_factory=list)
    pending: SpinLayer | None = None
    has_unpaged_layers: bool = False
    visible_length: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    """Tokens held, for code that Dynamo traces: advanced by `update`, never read by the custom op."""
    warned_waves: bool = False

    def committed_length(self) -> int:
        """Tokens that every layer holds: what an interrupted forward added is not counted."""
        store = self.layers[-1].store
        return min(self.sequences.length, store.length) if store is not None else 0

    def reconcile(self, mask: Tensor | None) -> None:
        """Take the padding mask [B, >= tokens held] of a batch: tokens held may have become padding, or real again."""
        sequences, length = self.sequences, self.committed_length()
        changed = sequences.mask.changed_tokens(mask, length) if length and (mask is None or mask.shape[0] == sequences.batch_size) else None
        if changed is None:
            return
        tokens = changed.any(0).nonzero()
        pages = range(int(tokens.min()) // sequences.page_size, int(tokens.max()) // sequences.page_size + 1)
        for row in changed.any(1).nonzero().flatten().tolist():
            sequences.unshare(row, pages)
        sequences.mask.replace(mask, length)
        for layer in self.layers:
            layer.index(pages.start, min(pages.stop, length // sequences.page_size))


class SpinLayer(CacheLayerMixin):
    """Pages, summaries and attention of one layer.

    Args:
        layer_idx: its number in the model.
        shared: state of the cache it belongs to; the layer enters itself.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, layer_idx: int, shared: SharedState) -> None:
        self.layer_idx = layer_idx
        self.shared = shared
        self.store: PageStore | None = None
        self.attended_tokens = 0
        self.attended_queries = 0
        self.handle = register_layer(self)
        shared.layers.append(self)

    # ------------------------------------------------------------------------------------ what transformers asks for

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether the layer has seen tokens."""
        return self.store is not None

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether `generate` may compile the decode step by itself."""
        return False

    @property
    def batch_size(self) -> int:
        """Sequences held; AttributeError before the first token, which is how transformers asks."""
        if self.store is None or not self.shared.sequences.batch_size:
            raise AttributeError("batch_size")
        return self.shared.sequences.batch_size

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """All keys [B, H, tokens, Dk] in order (a copy), or None; for inspection and hand-over."""
        return self._dense()[0]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """All values [B, H, tokens, Dv] in order (a copy), or None."""
        return self._dense()[1]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Build the layer's storage for states like these [B, H, n, D]. Called by the first step."""
        shared, (_, num_heads, _, key_dim) = self.shared, key_states.shape
        device, options = key_states.device, shared.options
        page_size, value_dim = shared.sequences.page_size, value_states.shape[-1]
        shapes = shared.method.summary_shapes(key_dim)
        budget = TierBudget(
            num_layers=len(shared.layers),
            num_heads=num_heads,
            page_bytes=page_size * (key_dim + value_dim) * key_states.element_size(),
            summary_bytes=sum(4 * torch.Size(shape).numel() for shape in shapes.values()),
            gpu_memory=options.gpu_memory if options.gpu_memory is not None else auto_gpu_memory(device),
            cpu_memory=options.cpu_memory,
            min_frames=pages_of(options.num_sink_tokens, page_size) + pages_of(options.recent_window, page_size) + 1,
        )
        store = PageStore(shared.sequences, num_heads, key_dim, value_dim, shapes, budget, key_states.dtype, device)
        shared.sequences.attach(store)
        self.store = store

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Tag new keys [B, H, n, Dk] with this layer; attention will append and use them. Nothing is stored yet."""
        shared = self.shared
        if not torch.compiler.is_compiling() and shared.pending is not None:
            lost, shared.pending = shared.pending, None
            raise AttentionError(_LOST_TAG.format(model=shared.model_name, layer=lost.layer_idx))
        if self is shared.layers[0]:
            shared.visible_length.add_(key_states.shape[-2])
        shared.pending = self
        key_states = key_states.view_as(key_states)
        setattr(key_states, LAYER_TAG, self)
        return key_states, value_states

    def take_pending(self) -> bool:
        """Whether `update` was called since the last attention: then its tokens are to be appended."""
        pending = self.shared.pending is self
        self.shared.pending = None
        return pending

    def get_seq_length(self) -> int:
        """Tokens held; a device tensor while Dynamo traces, so that no length is compiled in."""
        if torch.compiler.is_compiling():
            return self.shared.visible_length  # type: ignore[return-value]
        return self.shared.committed_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask, which both lead the mask function here (see `attention/interface.py`)."""
        if torch.compiler.is_compiling():
            return query_length, self.shared.visible_length  # type: ignore[return-value]
        return MaskedLength.of(self.get_seq_length() + query_length, self.shared.reconcile), 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def reset(self) -> None:
        """Layers of a cache change together."""
        raise CacheStateError("expected a call on the cache, got one on a layer; call the cache's own method")

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = offload = prefetch = reset  # type: ignore[assignment]

    # ---------------------------------------------------------------------------------------------- the five operations

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, out: Tensor,
        append: bool, scale: float, softcap: float | None,
    ) -> None:  # fmt: skip
        """Append the new tokens (unless a layer that shares them did) and attend.

        Args:
            query: [B, heads, Q, Dk]; key, value: [B, H, Q, Dk] and [B, H, Q, Dv].
            mask: None, validity [B, 1, 1, Q] of the new tokens, or a dense mask [B, h, Q, tokens].
            sinks: [heads], learned logits in the softmax's denominator, or None.
            out: [B, Q, heads, Dv]; written.
        Raises:
            BatchSizeError, BudgetError, CapacityError: before anything changes.
        """
        num_queries = query.shape[2]
        dense_mask = None if mask is None or mask.shape[-2:] == (1, num_queries) else mask
        if append:
            self.append(key, value, mask[:, 0, 0] if mask is not None and dense_mask is None else None)
        sequences = self.shared.sequences
        grouped = query.unflatten(1, (key.shape[1], -1))
        if dense_mask is not None:
            result = self._attend_masked(grouped, dense_mask, sinks, scale, softcap)
        elif sequences.start == 0 and num_queries > 1:
            result = self._attend_prompt(grouped, key, value, sinks, scale, softcap)
        elif num_queries > MAX_SPARSE_QUERIES or self.shared.plan.attends_all():
            allowed = self.shared.plan.allowed_all(num_queries, query.device)
            result = self._attend_masked(grouped, allowed, sinks, scale, softcap)
        else:
            parts = [
                self._attend_selected(grouped[:, :, :, i : i + 1], sequences.start + i, sinks, scale, softcap)
                for i in range(num_queries)
            ]
            result = torch.cat(parts, 3)
        out.copy_(result.flatten(1, 2).transpose(1, 2))

    def append(self, key: Tensor, value: Tensor, new_valid: Tensor | None) -> None:
        """Store new tokens and index the pages they complete.

        Args:
            key, value: [B, H, n, Dk] and [B, H, n, Dv].
            new_valid: [B, n], bool, False for padding; None for all valid.
        """
        sequences = self.shared.sequences
        if self is self.shared.layers[0]:
            self._begin(key.shape[0], key.shape[2], new_valid)
        if self.store is None:
            self.lazy_initialization(key, value)
        store = self.store
        assert store is not None
        if store.length != sequences.start or sequences.length - sequences.start != key.shape[2]:
            raise CacheStateError(
                f"layer {self.layer_idx} holds {store.length} tokens and got {key.shape[2]} more, the cache's step goes "
                f"from {sequences.start} to {sequences.length}; call cache.reset()"
            )
        store.append(key, value)
        self.index(sequences.start // store.page_size, sequences.length // store.page_size)

    def index(self, first: int, stop: int) -> None:
        """Summarise the complete pages [first, stop) of all sequences."""
        store, valid = self.store, self.shared.sequences.mask.valid
        if store is None:
            return
        for start in range(first, stop, _INDEX_PAGES):
            end = min(start + _INDEX_PAGES, stop)
            keys, _, rows = store.pages(start, end)
            tokens = slice(start * store.page_size, end * store.page_size)
            flat = keys.new_ones((keys.shape[0], (end - start) * store.page_size), dtype=torch.bool)
            if valid is not None:
                flat = valid[:, tokens].to(keys.device)
            summaries = self.shared.method.index(keys, flat.view(keys.shape[0], 1, end - start, store.page_size))
            for name, vectors in summaries.items():
                store.summaries[name].put(rows, vectors)

    def check_integrity(self) -> None:
        """Raise CacheStateError where this layer's tiers differ or a summary is not what its page gives."""
        store, sequences = self.store, self.shared.sequences
        if store is None or not sequences.length:
            return
        store.check_integrity()
        complete = sequences.length // store.page_size
        keys, _, rows = store.pages(0, complete)
        valid = sequences.mask.valid
        flat = keys.new_ones((keys.shape[0], complete * store.page_size), dtype=torch.bool)
        if valid is not None:
            flat = valid[:, : complete * store.page_size].to(keys.device)
        expected = self.shared.method.index(keys, flat.view(keys.shape[0], 1, complete, store.page_size))
        for name, vectors in expected.items():
            if not torch.equal(store.summaries[name].take(rows), vectors):
                raise CacheStateError(
                    f"integrity: layer {self.layer_idx} has a stale summary {name!r}; please report this as a bug"
                )

    def _begin(self, batch_size: int, num_tokens: int, new_valid: Tensor | None) -> None:
        """Start a step, after undoing what an interrupted forward left behind."""
        shared, sequences = self.shared, self.shared.sequences
        if sequences.length and any(layer.store is None or layer.store.length != sequences.length for layer in shared.layers):
            if shared.has_unpaged_layers or shared.layers[-1].store is None:
                raise CacheStateError(
                    f"the last forward of {shared.model_name} did not reach all layers of the cache (it was interrupted, or "
                    "the model does not cache some layer); call cache.reset(), or use a DynamicCache for this model"
                )
            sequences.truncate(shared.committed_length())
        sequences.begin(batch_size, num_tokens, new_valid)

    def _attend_prompt(
        self, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, scale: float, softcap: float | None
    ) -> Tensor:
        """A prompt on an empty cache: dense and causal, on the states at hand."""
        allowed = None if self.shared.sequences.mask.valid is None else self.shared.plan.allowed_all(query.shape[3], query.device)
        if softcap is None and sinks is None:
            return kernels.dense_attention(query.flatten(1, 2), key, value, allowed, scale).view(*query.shape[:4], -1)
        if allowed is None:
            allowed = self.shared.plan.allowed_all(query.shape[3], query.device)
        return _with_sinks(kernels.attend(query, key, value, allowed.unsqueeze(1), scale, softcap), sinks)

    def _attend_masked(
        self, query: Tensor, mask: Tensor, sinks: Tensor | None, scale: float, softcap: float | None
    ) -> Tensor:
        """All tokens held, by a mask [B, 1 or heads, Q, tokens]: prefill on a filled cache, dense steps, special masks."""
        store, sequences = self._store(), self.shared.sequences
        batch_size, num_heads, group = query.shape[:3]
        if mask.shape[-1] != sequences.length or mask.shape[-2] not in (1, query.shape[3]):
            raise AttentionError(
                f"expected a mask over {query.shape[3]} queries and {sequences.length} tokens, got {tuple(mask.shape)}; "
                "pass a 2-D padding mask, or a 4-D mask over all tokens"
            )
        pages = torch.arange(sequences.num_pages, device=query.device).expand(batch_size, num_heads, -1)
        padding = sequences.num_pages * store.page_size - sequences.length
        parts = []
        for part, keys, values in store.read(pages):
            if store.frames is None and softcap is None and sinks is None:
                keys, values = keys[:, :, : sequences.length], values[:, :, : sequences.length]
                mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
                return kernels.dense_attention(query.flatten(1, 2), keys, values, mask, scale).view(*query.shape[:4], -1)
            if not parts:
                fill = 0.0 if mask.dtype == torch.bool else float("-inf")
                mask = torch.nn.functional.pad(mask, (0, padding), value=fill)
                mask = mask.unflatten(1, (num_heads, group) if mask.shape[1] > 1 else (1, 1))
            tokens = slice(part.start * store.page_size, part.stop * store.page_size)
            parts.append(kernels.attend(query, keys, values, mask[..., tokens], scale, softcap))
        return _with_sinks(kernels.merge_attention(parts), sinks)

    def _attend_selected(
        self, query: Tensor, position: int, sinks: Tensor | None, scale: float, softcap: float | None
    ) -> Tensor:
        """One query [B, H, G, 1, Dk] per sequence: sinks, recent window and what the method selects."""
        store, plan = self._store(), self.shared.plan.query(position, query.device)
        num_heads = query.shape[1]
        num_pages = plan.candidates.shape[1]
        asked = Query(query.squeeze(3).float(), plan.candidates, plan.budget_tokens, store.page_size, scale)
        selected = self.shared.method.select(asked, lambda name: store.summary(name)[:, :, :num_pages])
        pages = torch.cat([plan.fixed.unsqueeze(1).expand(-1, num_heads, -1), selected], 2)
        allowed = self.shared.plan.allowed(pages, position)
        self._warn_of_waves(pages.shape[2])
        parts = []
        for part, keys, values in store.read(pages):
            tokens = slice(part.start * store.page_size, part.stop * store.page_size)
            mask = allowed[..., tokens][:, :, None, None]
            parts.append(kernels.attend(query, keys, values, mask, scale, softcap))
        self.attended_tokens += int(allowed.sum())
        self.attended_queries += allowed.shape[0] * num_heads
        return _with_sinks(kernels.merge_attention(parts), sinks)

    def _warn_of_waves(self, num_pages: int) -> None:
        frames = self._store().frames
        if frames is not None and num_pages > frames.num_slots and not self.shared.warned_waves:
            self.shared.warned_waves = True
            logger.warning(
                "gpu_memory holds %d of the %d pages that a step reads per KV head, so all of them are loaded again at every "
                "step; raise gpu_memory or lower budget",
                frames.num_slots,
                num_pages,
            )

    def _store(self) -> PageStore:
        if self.store is None:
            raise CacheStateError(f"layer {self.layer_idx} is attended to before it was updated; call update first")
        return self.store

    def _dense(self) -> tuple[Tensor | None, Tensor | None]:
        if self.store is None or not self.shared.committed_length():
            return None, None
        keys, values, _ = self.store.pages(0, self.shared.sequences.num_pages)
        length = self.shared.committed_length()
        return keys.flatten(2, 3)[:, :, :length], values.flatten(2, 3)[:, :, :length]

    def __deepcopy__(self, memo: dict[int, Any]) -> SpinLayer:
        from copy import deepcopy

        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, attribute in self.__dict__.items():
            setattr(twin, name, deepcopy(attribute, memo))
        twin.handle = register_layer(twin)
        return twin


_LOST_TAG = (
    "{model}: layer {layer} got its keys back from SpinCache.update but did not pass them to the attention function "
    '"spin": the model changes them in between, or calls another attention implementation; expected '
    'config._attn_implementation == "spin" and keys handed on as they are; use a DynamicCache for this model'
)


def _with_sinks(attention: tuple[Tensor, Tensor], sinks: Tensor | None) -> Tensor:
    out, lse = attention
    return out if sinks is None else kernels.apply_attention_sinks(out, lse, sinks)
