"""One full-attention layer of the cache: the five operations of SPIN on its pages.

    index     method     summarise the pages that this step completed
    offload   store      append tokens to their pages, in either tier
    select    method     choose pages for the query, in addition to sinks and recent window
    retrieve  store      load missing pages into page frames
    attend    kernels    exact softmax over the retrieved tokens

A forward calls a layer twice: `update` (by the model) tags the new keys, `run` (by the attention function) does the work.

Tokens that a query attends to:
    first call on an empty cache, or more than `MAX_QUERIES` tokens (prefill)    all tokens
    a mask with more than padding                                                all tokens, by that mask
    otherwise (decode, verification)                                             a selection for each query
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .attention.handed_states import hand_out
from .attention.interface import MaskedLength, register_layer
from .attention.masks import is_internal, new_validity, over_tokens
from .attention.methods.clustering import ClusteringMethod, last_queries
from .backends import gradients, sparse_prompt
from .backends.attention_weights import AttentionWeights, warn_of_memory
from .backends.base import AttentionBackend, Call
from .backends.dense import attend_all
from .backends.position_check import check_positions
from .backends.state_checks import can_take
from .errors import CacheStateError
from .forward_pass import ForwardPass
from .indexing import padding_change
from .indexing.summarize import check_summaries, index_pages
from .inference_mode import outside_inference_mode
from .integration.layer_views import LayerViews
from .integration.rank_agreement import meeting
from .integration.tensor_parallel import check_states
from .memory.layer_budget import LayerShape
from .memory.prefill_peak import piece_bytes, pool_of
from .memory.rank_budgets import tier_budget
from .state import CacheState, LayerState
from .storage.copied import copied
from .storage.page_store import PageStore
from .transaction import finished


class SpinLayer(LayerViews, CacheLayerMixin):
    """Pages, summaries and attention of one layer.

    Args:
        layer_idx: index in the model.
        forward: the cache's `ForwardPass`. The constructor adds the layer's state to it.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    """False, so `generate` does not compile the model. Decode steps are captured instead (`graph/runner.py`)."""

    def __init__(self, layer_idx: int, forward: ForwardPass) -> None:
        self.layer_idx = layer_idx
        self.forward = forward
        self.cache_state: CacheState = forward.state
        self.state = LayerState(layer_idx, len(forward.state.layers))
        self.handle = register_layer(self)
        forward.state.layers.append(self.state)

    # -------------------------------------------------------------------------------------------- called by transformers

    @property
    def is_initialized(self) -> bool:
        """Whether the layer has storage."""
        return self.state.store is not None

    @property
    def store(self) -> PageStore | None:
        """The layer's pages; None before the first token."""
        return self.state.store

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the layer's storage for keys and values of these shapes [B, H, n, D]. Called by the first step."""
        state, device = self.cache_state, key_states.device
        shape = LayerShape(key_states.shape[1], key_states.shape[3], value_states.shape[3])
        check_states(key_states, state.model_name)
        before = self._alike(shape, key_states.dtype, device)
        store = self._new_store(shape, key_states.dtype, device) if before is None else before.new_empty()
        store.invalidate = self.state.invalidate
        with meeting(state.ranks, "allocate pages of a layer", self.layer_idx, store.num_heads):
            state.sequences.attach(store)
            self.state.store = store

    def _alike(self, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> PageStore | None:
        """The storage of the layer before, if this layer has the same sizes, and that one all frames of its cap."""
        before = self.cache_state.layers[self.state.number - 1].store if self.state.number else None
        if before is None or before.budget.most_frames != self.forward.gpu.most_frames:
            return None
        sizes = LayerShape(before.num_heads, before.key_dim, before.value_dim), before.dtype, before.device
        return before if sizes == (shape, dtype, device) else None

    def _new_store(self, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> PageStore:
        """Storage for a layer that differs from the one before it."""
        state, gpu = self.cache_state, self.forward.gpu
        method, options = state.method, state.options
        budget = tier_budget(gpu, state.ranks, shape, dtype, device, state.sequences.room)
        stores = [layer.store for layer in state.layers if layer.store is not None]
        piece = next((store.piece_bytes for store in stores if store.device == device), None)
        if piece is None:  # free memory is asked for once a device
            piece = piece_bytes(options.tuning, pool_of(gpu, device))
        store = PageStore(
            state.sequences, shape.num_heads, shape.key_dim, shape.value_dim,
            method.summary_shapes(shape.key_dim, shape.value_dim), options.quantizes(dtype.itemsize),
            budget, replace(options.tuning, piece_bytes=piece), dtype, device,
            multi_page_clusters=method.multi_page_clusters if isinstance(method, ClusteringMethod) else None,
            summary_dtypes=method.summary_dtypes(), host_int8=options.host_int8,
            pages_per_row=method.pages_per_row,
        )  # fmt: skip
        store.ask_for_more, store.short_of_frames = gpu.raise_caps, gpu.short_of_frames
        return store

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Tag new keys [B, H, n, Dk] and values with this layer. Nothing is stored until attention appends them."""
        state, traced = self.cache_state, torch.compiler.is_compiling()
        if not traced:
            self.forward.check_nothing_pending()
        if self._is_last and not state.prepared:  # earlier layers may still read the old length
            state.visible_length.add_(key_states.shape[-2])
        state.pending = self
        return hand_out(self, key_states, value_states)

    def take_pending(self) -> bool:
        """Whether `update` was called since the last attention, so that its tokens must be appended. Clears the flag."""
        pending = self.cache_state.pending is self
        self.cache_state.pending = None
        return pending

    def check_positions(self, position_ids: Tensor | None, mask: Tensor | None) -> None:
        """Raise AttentionError if the method uses positions and the model's position ids differ from them.

        Skipped during graph capture: `graph/runner.py` checks positions at every replay.

        Args:
            position_ids: [..., Q] of the new tokens; None if the model does not pass them to attention.
            mask: as for `run`.
        """
        state = self.cache_state
        if state.captured_length is not None:
            return
        if position_ids is not None and self._is_first and state.method.uses_positions:
            check_positions(state, position_ids, new_validity(mask, state.new_token_validity))

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override, unused-ignore]
        """Tokens held. A tensor during Dynamo tracing and graph capture, so that no length becomes a constant."""
        if torch.compiler.is_compiling():
            return self.cache_state.visible_length
        if self.cache_state.captured_length is not None:
            return self.cache_state.captured_length  # type: ignore[no-any-return, unused-ignore]
        self.cache_state.settle()
        return self.cache_state.committed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int | Tensor]:  # type: ignore[override, unused-ignore]
        """Length and offset of the mask. The length carries a callback to this cache (see `attention/interface.py`).

        Raises:
            BudgetError, CapacityError: the new tokens do not fit. Nothing has changed.
        """
        state = self.cache_state
        if torch.compiler.is_compiling():
            return query_length, state.visible_length
        if state.captured_length is not None:
            return MaskedLength.of(query_length, None), 0
        length = state.committed
        if not length:
            return MaskedLength.of(query_length, partial(self.forward.admit, query_length)), 0
        if state.ranks is None:  # else all ranks check together, as the step begins
            state.sequences.check_room(length, query_length)
        return MaskedLength.of(length + query_length, partial(padding_change.accept, state)), 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Not available on a layer: all layers of a cache change together."""
        raise CacheStateError("expected a call on the cache, got one on a layer; call the cache's own method")

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = offload = prefetch = reset

    # ---------------------------------------------------------------------------------------------- the five operations

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, out: Tensor,
        append: bool, scale: float, softcap: float | None, weights: AttentionWeights | None = None,
    ) -> None:  # fmt: skip
        """Append the new tokens and attend.

        Args:
            query: [B, heads, Q, Dk], of the last Q of the n new tokens.
            key, value: [B, H, n, Dk] and [B, H, n, Dv].
            mask: None, a marker or validity mask, or a given mask (`attention/masks.py`).
            sinks: [heads], learned logits in the softmax's denominator, or None.
            out: [B, Q, heads, Dv]; written.
            append: False if a layer that shares these keys and values has already appended them.
            weights: collects attention weights; the call then uses the reference backend.
        Raises:
            BatchSizeError, BudgetError, CapacityError, AttentionError: the cache is as before the forward.
        """
        call = Call(query.unflatten(1, (key.shape[1], -1)), scale, softcap, sinks, weights)
        if self.cache_state.prepared:
            self.backend.attend(self.state, call, out, (key, value) if append else None)
            return
        self.cache_state.settle()
        self._run(call, key, value, mask, append, out)
        if append and self._is_last and self.forward.commits_with_last_paged:
            self.forward.commit()

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def run_for_weights(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, out: Tensor,
        append: bool, scale: float, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """As `run`; returns the weights [B, heads, Q, tokens held] in the query's dtype, without gradients.

        Compiled code has a graph break here, because the width grows with every token. `fullgraph=True` therefore fails.
        """
        warn_of_memory()
        collected = AttentionWeights()
        with torch.no_grad():
            states = (query.detach(), key.detach(), value.detach())
            self.run(*states, mask, sinks, out, append, scale, softcap, collected)
            return collected.result(self._store(), query.dtype)

    def with_gradients(self, out: Tensor, *arguments: Any) -> Tensor:
        """`out` with a backward pass. `run` has just written `out` for the same arguments."""
        attends_all = self.cache_state.reads_all or self.forward.zones.attends_all()
        return gradients.with_gradients(self.cache_state, self.state, attends_all, out, *arguments)

    def fail(self) -> None:
        """Mark the forward as failed."""
        self.forward.fail()

    @outside_inference_mode
    def _run(self, call: Call, key: Tensor, value: Tensor, mask: Tensor | None, append: bool, out: Tensor) -> None:
        """As `run`, for a step that is not prepared."""
        state, sequences = self.cache_state, self.cache_state.sequences
        num_new, num_queries = key.shape[2], call.query.shape[3]
        new_valid = new_validity(mask, state.new_token_validity) if append else None
        if mask is not None:
            num_tokens = sequences.length + (num_new if append and self._is_first else 0)
            num_heads = call.query.shape[1] * call.query.shape[2]
            mask = None if is_internal(mask) else over_tokens(mask, len(key), num_heads, num_queries, num_tokens)
        if append:
            self.append(key, value, new_valid)
            self._observe(call)
        store, backend = self._store(), self.backend
        if self._is_first and append:
            with self.forward.meeting("allocate buffers"):
                backend.plan(self.state, call)
                if state.ranks is not None and state.selects(num_new):
                    self.forward.backends.make_room()
        else:
            backend.plan(self.state, call)
        if num_new > 1 and backend.capturable:
            self.forward.backends.compile_early(self.state, call)
        # Kernels serve neither fewer queries than tokens nor attention weights.
        by_kernels = num_queries == num_new and call.weights is None
        attends_all = not state.selects(num_new) or (sequences.start == 0 and num_new > 1)
        if mask is not None or attends_all or (state.reads_all and not by_kernels):
            if mask is None and sparse_prompt.serves(state, call, key):
                sparse_prompt.attend(state, self.state, call, key, value, out)
            else:
                attend_all(call, key, value, mask, store, self.forward.zones, out)
        elif by_kernels:
            backend.attend(self.state, call, out)
        else:
            self.forward.backends.reference.attend(self.state, call, out)

    def _observe(self, call: Call) -> None:
        """Keep the last queries of a prompt for methods that cluster by them."""
        state, method = self.cache_state, self.cache_state.method
        if (
            not state.selects(call.query.shape[3])
            and isinstance(method, ClusteringMethod)
            and method.num_observation_queries
        ):
            self.state.observation_queries = last_queries(call.query, method.num_observation_queries) * call.scale

    def append(self, key: Tensor, value: Tensor, new_valid: Tensor | None) -> None:
        """Append new tokens and index the pages they complete.

        Args:
            key, value: [B, H, n, Dk] and [B, H, n, Dv].
            new_valid: [B, n], bool, False for padding; None for all valid.
        """
        sequences = self.cache_state.sequences
        if not can_take(self.cache_state, self.state, key, value):
            finished(self.cache_state, self.forward.forget_stores)
        if self._is_first:
            self.forward.begin(key.shape[0], key.shape[2], new_valid)
        if self.state.store is None:
            self.lazy_initialization(key, value)
        store = self.state.store
        assert store is not None
        if store.length != sequences.start or sequences.length - sequences.start != key.shape[2]:
            raise CacheStateError(
                f"layer {self.layer_idx} holds {store.length} tokens and got {key.shape[2]} more, the cache's step "
                f"goes from {sequences.start} to {sequences.length}; call cache.reset()"
            )
        summarized = self.backend.append(self.state, key, value)
        store.length = sequences.length
        first, stop = sequences.start // store.page_size, sequences.length // store.page_size
        needs_summaries = self.cache_state.selects(key.shape[2]) and not self.cache_state.reads_all
        if not summarized and needs_summaries:
            index_pages([self.state], self.cache_state.method, first, stop)
        elif not summarized:  # the forward attends to all tokens, and clustering may move its tokens first
            self.state.invalidate(first, stop)

    def check_integrity(self) -> None:
        """Raise CacheStateError if this layer's tiers differ or a summary does not match its page."""
        store, sequences = self.state.store, self.cache_state.sequences
        if store is None or not sequences.length:
            return
        store.check_integrity()
        if store.length < sequences.length:  # forwards skipped this layer: its missing tokens have no summaries
            return
        method = self.cache_state.method
        exact = not (self.backend.capturable or method.index_rounds)
        check_summaries(self.state, method, exact)

    @property
    def backend(self) -> AttentionBackend:
        """The backend of the current batch."""
        self._store()
        return self.forward.backends.of(self.state)

    @property
    def _is_first(self) -> bool:
        return self.state.number == 0

    @property
    def _is_last(self) -> bool:
        return self.state is self.cache_state.layers[-1]

    def _store(self) -> PageStore:
        if self.state.store is None:
            raise CacheStateError(f"layer {self.layer_idx} is attended to before it was updated; call update first")
        return self.state.store

    def __deepcopy__(self, memo: dict[int, Any]) -> SpinLayer:
        twin = copied(self, memo, "forward", "cache_state", "state")
        twin.handle = register_layer(twin)
        return twin
