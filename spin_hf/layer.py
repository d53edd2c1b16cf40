"""One full-attention layer of the cache: the five operations of SPIN on its own pages.

    index     method     summaries of the pages that this step completed
    offload   store      tokens to their pages, in whichever tier those are
    select    method     pages that the query needs, beside sinks and recent window
    retrieve  store      page frames of these pages, missing ones loaded
    attend    kernels    exact softmax over the retrieved tokens

A layer is called twice per forward: `update` (by the model) tags the new keys, `run` (by the custom op) does the work.

Which queries attend to what:
    first call on an empty cache, or more than `MAX_QUERIES` tokens (prefill)    all tokens
    a mask that is more than padding                                                    all tokens, by that mask
    otherwise (decode, verification)                                                    each query its own selection
"""

from __future__ import annotations

import logging
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .attention.handed_states import hand_out
from .attention.interface import MaskedLength, register_layer
from .attention.masks import is_own, new_validity, over_tokens
from .attention.methods.clustering import ClusteringMethod, last_queries
from .backends import gradients
from .backends.attention_weights import AttentionWeights, warn_of_memory
from .backends.position_check import check_positions
from .backends.reference import (
    Call,
    attend_masked,
    attend_pages,
    attend_prompt,
    estimate_rest,
    select_pages,
)
from .backends.state_checks import can_take
from .backends.triton_step import StepKernels
from .errors import CacheStateError
from .forward_pass import ForwardPass
from .indexing import padding_change
from .indexing.summarize import check_summaries, index_pages
from .inference_mode import outside_inference_mode
from .integration.compile_bar import show_compiles
from .integration.layer_views import LayerViews
from .kernels.compile_progress import report_by
from .kernels.descriptor_fields import MAX_QUERIES
from .memory.layer_budget import LayerShape
from .state import CacheState, LayerState
from .storage.page_store import PageStore
from .transaction import finished

logger = logging.getLogger("spin_hf")
report_by(show_compiles)


class SpinLayer(LayerViews, CacheLayerMixin):
    """Pages, summaries and attention of one layer.

    Args:
        layer_idx: its number in the model.
        forward: the forwards of the cache it belongs to; the layer enters its state there.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    """`generate` compiles nothing by itself: decode steps are captured (`graph/runner.py`)."""

    def __init__(self, layer_idx: int, forward: ForwardPass) -> None:
        self.layer_idx = layer_idx
        self.forward = forward
        self.cache_state: CacheState = forward.state
        self.state = LayerState(layer_idx, len(forward.state.layers))
        self.handle = register_layer(self)
        forward.state.layers.append(self.state)

    # ------------------------------------------------------------------------------------ what transformers asks for

    @property
    def is_initialized(self) -> bool:
        """Whether the layer has seen tokens."""
        return self.state.store is not None

    @property
    def store(self) -> PageStore | None:
        """The layer's pages; None before the first token."""
        return self.state.store

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Build the layer's storage for states like these [B, H, n, D]. Called by the first step."""
        state, method, device = self.cache_state, self.cache_state.method, key_states.device
        shape = LayerShape(key_states.shape[1], key_states.shape[3], value_states.shape[3])
        budget = self.forward.gpu.tier_budget(shape, key_states.dtype, device, state.sequences.room)
        store = PageStore(
            state.sequences, shape.num_heads, shape.key_dim, shape.value_dim,
            method.summary_shapes(shape.key_dim, shape.value_dim), state.options.quantizes(key_states.element_size()),
            budget, key_states.dtype, device,
            multi_page_clusters=method.multi_page_clusters if isinstance(method, ClusteringMethod) else None,
            summary_dtypes=method.summary_dtypes(), host_int8=state.options.host_int8,
        )  # fmt: skip
        gpu = self.forward.gpu
        store.ask_for_more, store.short_of_frames, store.invalidate = (
            gpu.raise_caps,
            gpu.short_of_frames,
            self.state.invalidate,
        )
        state.sequences.attach(store)
        self.state.store = store

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Tag new keys [B, H, n, Dk] and values with this layer; attention will append them. Nothing is stored yet."""
        state, traced = self.cache_state, torch.compiler.is_compiling()
        if not traced:
            self.forward.check_nothing_pending()
        if self._is_last and not state.prepared:  # layers before may still ask how many tokens there were
            state.visible_length.add_(key_states.shape[-2])
        state.pending = self
        return hand_out(self, key_states, value_states)

    def take_pending(self) -> bool:
        """Whether `update` was called since the last attention: then its tokens are to be appended."""
        pending = self.cache_state.pending is self
        self.cache_state.pending = None
        return pending

    def check_positions(self, position_ids: Tensor | None, mask: Tensor | None) -> None:
        """Raise AttentionError where a method counts on positions that the model does not rotate by.

        While a graph is captured nothing is looked at: `graph/runner.py` looks before or behind each replay.

        Args:
            position_ids: [..., Q] of the new tokens, if the model hands them on.
            mask: as for `run`.
        """
        state = self.cache_state
        if state.captured_length is not None:
            return
        if position_ids is not None and self._is_first and state.method.uses_positions:
            check_positions(state, position_ids, new_validity(mask, state.noted))

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override, unused-ignore]
        """Tokens held; a tensor while Dynamo traces or a graph is captured, so that no length is compiled in."""
        if torch.compiler.is_compiling():
            return self.cache_state.visible_length
        if self.cache_state.captured_length is not None:
            return self.cache_state.captured_length  # type: ignore[no-any-return, unused-ignore]
        self.cache_state.settle()
        return self.cache_state.committed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int | Tensor]:  # type: ignore[override, unused-ignore]
        """Length and offset of the mask, which lead the mask function to this cache (see `attention/interface.py`).

        Raises:
            BudgetError, CapacityError: there is no room for the tokens to come; nothing has changed.
        """
        state = self.cache_state
        if torch.compiler.is_compiling():
            return query_length, state.visible_length
        if state.captured_length is not None:
            return MaskedLength.of(query_length, None), 0
        length = state.committed
        if not length:
            return MaskedLength.of(query_length, partial(self.forward.admit, query_length)), 0
        state.sequences.check_room(length, query_length)
        return MaskedLength.of(length + query_length, partial(padding_change.accept, state)), 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Layers of a cache change together."""
        raise CacheStateError("expected a call on the cache, got one on a layer; call the cache's own method")

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = offload = prefetch = reset

    # ---------------------------------------------------------------------------------------------- the five operations

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, out: Tensor,
        append: bool, scale: float, softcap: float | None, weights: AttentionWeights | None = None,
    ) -> None:  # fmt: skip
        """Append the new tokens (unless a layer that shares them did) and attend.

        Args:
            query: [B, heads, Q, Dk], of the last Q of the n new tokens.
            key, value: [B, H, n, Dk] and [B, H, n, Dv].
            mask: None, an own mask or a given one (`attention/masks.py`).
            sinks: [heads], learned logits in the softmax's denominator, or None.
            out: [B, Q, heads, Dv]; written.
            weights: collects the weights; then the reference operations serve the call.
        Raises:
            BatchSizeError, BudgetError, CapacityError, AttentionError: the cache is as before the forward.
        """
        call = Call(query.unflatten(1, (key.shape[1], -1)), scale, softcap, sinks, weights)
        if self.cache_state.prepared:
            self._launch(call, key, value, append, out)
            return
        self.cache_state.settle()
        result = self._run(call, key, value, mask, append, out)
        if result is not None:
            out.copy_(result.flatten(1, 2).transpose(1, 2))
        if append and self._is_last and self.forward.commits_with_last_paged:
            self.forward.commit()

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def run_for_weights(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, out: Tensor,
        append: bool, scale: float, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """As `run`; returns the weights [B, heads, Q, tokens held] in the query's dtype, without gradients.

        Compiled code breaks its graph here, which `fullgraph=True` does not allow: the width of weights grows with every
        token.
        """
        warn_of_memory()
        collected = AttentionWeights()
        with torch.no_grad():
            states = (query.detach(), key.detach(), value.detach())
            self.run(*states, mask, sinks, out, append, scale, softcap, collected)
            return collected.result(self._store(), query.dtype)

    def with_gradients(self, out: Tensor, *arguments: Any) -> Tensor:
        """`out`, which `run` has just written for the same arguments, with a backward pass."""
        attends_all = self.forward.plan.attends_all()
        return gradients.with_gradients(self.cache_state, self.state, attends_all, out, *arguments)

    def fail(self) -> None:
        """The forward will not come to its end."""
        self.forward.fail()

    @outside_inference_mode
    def _run(
        self, call: Call, key: Tensor, value: Tensor, mask: Tensor | None, append: bool, out: Tensor
    ) -> Tensor | None:
        """As `run`; returns [B, H, G, Q, Dv], or None where kernels wrote `out`."""
        state, sequences, num_new, num_queries = (
            self.cache_state,
            self.cache_state.sequences,
            key.shape[2],
            call.query.shape[3],
        )
        new_valid = new_validity(mask, state.noted) if append else None
        if mask is not None:
            num_tokens = sequences.length + (num_new if append and self._is_first else 0)
            num_heads = call.query.shape[1] * call.query.shape[2]
            mask = None if is_own(mask) else over_tokens(mask, len(key), num_heads, num_queries, num_tokens)
        if append:
            self.append(key, value, new_valid)
            if (
                num_new > MAX_QUERIES
                and isinstance(state.method, ClusteringMethod)
                and state.method.num_observation_queries
            ):
                self.state.observation_queries = (
                    last_queries(call.query, state.method.num_observation_queries) * call.scale
                )
        store, kernels = self._store(), self.kernels()
        if kernels is not None:
            kernels.fit(call.query.shape[2], store.key_dim, store.value_dim, store.dtype)
        if mask is not None:
            return attend_masked(call, store.by_place(mask, call.query.shape[2]), store)
        if sequences.start == 0 and num_new > 1:
            return attend_prompt(call, key, value, self.forward.plan)
        if num_queries == num_new <= MAX_QUERIES and kernels is not None and call.weights is None:
            self._launch(call, key, value, False, out)
            return None
        if num_new > MAX_QUERIES or self.forward.plan.attends_all():
            return attend_masked(call, self.forward.plan.allowed_all(num_queries, key.device), store)
        first = sequences.length - num_queries
        return torch.cat([self._attend_selected(call.token(i), first + i) for i in range(num_queries)], 3)

    def _launch(self, call: Call, key: Tensor, value: Tensor, append: bool, out: Tensor) -> None:
        """The kernels of a step that has begun; nothing happens on the host."""
        step = self.kernels()
        assert step is not None
        step.attend(self.state, call, out, (key, value) if append else None)

    def advance(self) -> None:
        """The step's tokens are in this layer's pages."""
        self._store().length = self.cache_state.sequences.length

    def _attend_selected(self, call: Call, position: int) -> Tensor:
        """One query of every sequence, at `position`."""
        state, store = self.cache_state, self._store()
        pages = select_pages(call, position, store, self.forward.plan, state.method, self.state.number)
        allowed = self.forward.plan.allowed(pages, position)
        self.state.attended_tokens += int(allowed.sum())
        self.state.attended_queries += allowed.shape[0] * allowed.shape[1]
        if store.frames is not None and pages.shape[2] > store.frames.num_slots and not state.warned_waves:
            state.warned_waves = True
            logger.warning(_WAVES, store.frames.num_slots, pages.shape[2])
        rest = estimate_rest(call, position, store, self.forward.plan, state.method, self.state.number, pages)
        return attend_pages(call, pages, allowed, store, rest)

    def append(self, key: Tensor, value: Tensor, new_valid: Tensor | None) -> None:
        """Store new tokens and index the pages they complete.

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
        kernels = self.kernels()
        if kernels is not None:
            kernels.append(self.state, key, value)
            self.advance()
            if kernels.recipe.summarised_by_append:
                return
        else:
            store.append(key, value)
        first, stop = sequences.start // store.page_size, sequences.length // store.page_size
        if key.shape[2] > MAX_QUERIES:  # attends to everything, and so needs no summaries yet
            self.state.invalidate(first, stop)
        else:
            index_pages([store], self.cache_state.method, self.state.number, first, stop)

    def check_integrity(self) -> None:
        """Raise CacheStateError where this layer's tiers differ or a summary is not what its page gives."""
        store, sequences = self.state.store, self.cache_state.sequences
        if store is None or not sequences.length:
            return
        store.check_integrity()
        if store.length < sequences.length:  # forwards left the layer out: what it lacks has no summaries
            return
        method = self.cache_state.method
        exact = not (self.has_kernels or method.index_rounds)
        check_summaries(store, method, self.state.number, self.layer_idx, exact)

    def kernels(self) -> StepKernels | None:
        """The kernels of the present batch, or None where the reference serves it."""
        self._store()
        return self.forward.kernels.of(self.state)

    @property
    def has_kernels(self) -> bool:
        """Whether kernels serve this layer."""
        return self.kernels() is not None

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
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, attribute in self.__dict__.items():
            setattr(twin, name, deepcopy(attribute, memo))
        twin.handle = register_layer(twin)
        return twin


_WAVES = (
    "gpu_memory holds %d of the %d pages that a step reads per KV head, so all are loaded again at every step; "
    "raise gpu_memory or lower budget"
)
