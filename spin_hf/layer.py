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
from .attention.methods.clustering import Regrouping, last_queries
from .backends import attention_weights, gradients
from .backends.reference import Call, attend_masked, attend_pages, attend_prompt, estimate_rest, select_pages
from .backends.state_checks import check_states
from .backends.triton_step import StepKernels
from .errors import CacheStateError
from .indexing.summarize import check_summaries, index_pages
from .inference_mode import lasting
from .kernels.descriptor_fields import MAX_QUERIES
from .layer_inspection import Inspected
from .memory.admission import admit
from .memory.layer_budget import LayerShape
from .state import SharedState
from .storage.page_store import PageStore

logger = logging.getLogger("spin_hf")


class SpinLayer(Inspected, CacheLayerMixin):
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
        self.arranged = 0
        """Pages of the stretches that are arranged in this layer; fewer than there are where memory ran out under way."""
        self.stale: tuple[int, int] | None = None
        """Pages whose summaries have to be made anew before the next step."""
        self.asked: Tensor | None = None
        """What the last tokens of a prompt asked [B, H, G, n, D], until the step behind it (`regroup.catch_up`)."""
        self.number = len(shared.layers)
        """Its place among the paged layers."""
        self.handle = register_layer(self)
        shared.layers.append(self)

    # ------------------------------------------------------------------------------------ what transformers asks for

    @property
    def is_initialized(self) -> bool:
        """Whether the layer has seen tokens."""
        return self.store is not None

    is_compileable = False
    """`generate` compiles nothing by itself: decode steps are captured (`graph/runner.py`)."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Build the layer's storage for states like these [B, H, n, D]. Called by the first step."""
        shared, method, device = self.shared, self.shared.method, key_states.device
        shape = LayerShape(key_states.shape[1], key_states.shape[3], value_states.shape[3])
        budget = shared.tier_budget(shape, key_states.dtype, device, shared.sequences.room)
        store = PageStore(
            shared.sequences, shape.num_heads, shape.key_dim, shape.value_dim,
            method.summary_shapes(shape.key_dim, shape.value_dim), shared.options.quantizes(key_states.element_size()),
            budget, key_states.dtype, device,
            several_pages=method.several_pages if isinstance(method, Regrouping) else None,
            summary_dtypes=method.summary_dtypes(), host_int8=shared.options.host_int8,
        )  # fmt: skip
        store.ask_for_more, store.fell_short, store.renew = shared.gpu.raise_caps, shared.gpu.fell_short, self.renew
        shared.sequences.attach(store)
        self.store = store

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Tag new keys [B, H, n, Dk] and values with this layer; attention will append them. Nothing is stored yet."""
        shared, traced = self.shared, torch.compiler.is_compiling()
        if not traced:
            shared.check_nothing_pending()
        if self is shared.layers[-1] and not shared.prepared:  # layers before may still ask how many tokens there were
            shared.visible_length.add_(key_states.shape[-2])
        shared.pending = self
        return hand_out(self, key_states, value_states)

    def take_pending(self) -> bool:
        """Whether `update` was called since the last attention: then its tokens are to be appended."""
        pending = self.shared.pending is self
        self.shared.pending = None
        return pending

    def check_positions(self, position_ids: Tensor | None, mask: Tensor | None) -> None:
        """Raise AttentionError where a method counts on positions that the model does not rotate by.

        While a graph is captured nothing is looked at: `graph/runner.py` looks before or behind each replay.

        Args:
            position_ids: [..., Q] of the new tokens, if the model hands them on.
            mask: as for `run`.
        """
        shared = self.shared
        if shared.captured_length is not None:
            return
        if position_ids is not None and self._is_first and shared.method.uses_positions:
            shared.check_positions(position_ids, new_validity(mask, shared.noted))

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override, unused-ignore]
        """Tokens held; a tensor while Dynamo traces or a graph is captured, so that no length is compiled in."""
        if torch.compiler.is_compiling():
            return self.shared.visible_length
        if self.shared.captured_length is not None:
            return self.shared.captured_length  # type: ignore[no-any-return, unused-ignore]
        self.shared.settle()
        return self.shared.committed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int | Tensor]:  # type: ignore[override, unused-ignore]
        """Length and offset of the mask, which lead the mask function to this cache (see `attention/interface.py`).

        Raises:
            BudgetError, CapacityError: there is no room for the tokens to come; nothing has changed.
        """
        shared = self.shared
        if torch.compiler.is_compiling():
            return query_length, shared.visible_length
        if shared.captured_length is not None:
            return MaskedLength.of(query_length, None), 0
        length = shared.committed
        if not length:
            return MaskedLength.of(query_length, partial(admit, shared, query_length)), 0
        shared.sequences.check_room(length, query_length)
        return MaskedLength.of(length + query_length, shared.reconcile), 0

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
        append: bool, scale: float, softcap: float | None, weights: attention_weights.AttentionWeights | None = None,
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
        if self.shared.prepared:
            self._launch(call, key, value, append, out)
            return
        self.shared.settle()
        result = self._run(call, key, value, mask, append, out)
        if result is not None:
            out.copy_(result.flatten(1, 2).transpose(1, 2))
        if append and self is self.shared.layers[-1] and self.shared.commits_with_last_paged:
            self.shared.commit()

    run_for_weights, with_gradients = attention_weights.run, gradients.with_gradients

    @lasting
    def _run(
        self, call: Call, key: Tensor, value: Tensor, mask: Tensor | None, append: bool, out: Tensor
    ) -> Tensor | None:
        """As `run`; returns [B, H, G, Q, Dv], or None where kernels wrote `out`."""
        shared, sequences, num_new, num_queries = self.shared, self.shared.sequences, key.shape[2], call.query.shape[3]
        new_valid = new_validity(mask, shared.noted) if append else None
        if mask is not None:
            num_tokens = sequences.length + (num_new if append and self._is_first else 0)
            num_heads = call.query.shape[1] * call.query.shape[2]
            mask = None if is_own(mask) else over_tokens(mask, len(key), num_heads, num_queries, num_tokens)
        if append:
            self.append(key, value, new_valid)
            if num_new > MAX_QUERIES and isinstance(shared.method, Regrouping) and shared.method.num_asked:
                self.asked = last_queries(call.query, shared.method.num_asked) * call.scale
        store, kernels = self._store(), self.kernels()
        if kernels is not None:
            kernels.fit(call.query.shape[2], store.key_dim, store.value_dim, store.dtype)
        if mask is not None:
            return attend_masked(call, store.by_place(mask, call.query.shape[2]), store)
        if sequences.start == 0 and num_new > 1:
            return attend_prompt(call, key, value, shared.plan)
        if num_queries == num_new <= MAX_QUERIES and kernels is not None and call.weights is None:
            self._launch(call, key, value, False, out)
            return None
        if num_new > MAX_QUERIES or shared.plan.attends_all():
            return attend_masked(call, shared.plan.allowed_all(num_queries, key.device), store)
        first = sequences.length - num_queries
        return torch.cat([self._attend_selected(call.token(i), first + i) for i in range(num_queries)], 3)

    def _launch(self, call: Call, key: Tensor, value: Tensor, append: bool, out: Tensor) -> None:
        """The kernels of a step that has begun; nothing happens on the host."""
        step = self.kernels()
        assert step is not None
        step.attend(self, call, out, (key, value) if append else None)

    def prepare(self) -> None:
        """What this layer's kernels need of the host for the step that has begun."""
        step = self.kernels()
        assert step is not None
        step.begin(self)
        step.selection.place(self)

    def advance(self) -> None:
        """The step's tokens are in this layer's pages."""
        self._store().length = self.shared.sequences.length

    def _attend_selected(self, call: Call, position: int) -> Tensor:
        """One query of every sequence, at `position`."""
        shared, store = self.shared, self._store()
        pages = select_pages(call, position, store, shared.plan, shared.method, self.number)
        allowed = shared.plan.allowed(pages, position)
        self.attended_tokens += int(allowed.sum())
        self.attended_queries += allowed.shape[0] * allowed.shape[1]
        if store.frames is not None and pages.shape[2] > store.frames.num_slots and not shared.warned_waves:
            shared.warned_waves = True
            logger.warning(_WAVES, store.frames.num_slots, pages.shape[2])
        rest = estimate_rest(call, position, store, shared.plan, shared.method, self.number, pages)
        return attend_pages(call, pages, allowed, store, rest)

    def append(self, key: Tensor, value: Tensor, new_valid: Tensor | None) -> None:
        """Store new tokens and index the pages they complete.

        Args:
            key, value: [B, H, n, Dk] and [B, H, n, Dv].
            new_valid: [B, n], bool, False for padding; None for all valid.
        """
        sequences = self.shared.sequences
        check_states(self.shared, self.number, self.layer_idx, key, value)
        if self._is_first:
            self.shared.begin(key.shape[0], key.shape[2], new_valid)
        if self.store is None:
            self.lazy_initialization(key, value)
        store = self.store
        assert store is not None
        if store.length != sequences.start or sequences.length - sequences.start != key.shape[2]:
            raise CacheStateError(
                f"layer {self.layer_idx} holds {store.length} tokens and got {key.shape[2]} more, the cache's step "
                f"goes from {sequences.start} to {sequences.length}; call cache.reset()"
            )
        kernels = self.kernels()
        if kernels is not None:
            kernels.append(self, key, value)
            self.advance()
            if kernels.recipe.summarised_by_append:
                return
        else:
            store.append(key, value)
        first, stop = sequences.start // store.page_size, sequences.length // store.page_size
        if key.shape[2] > MAX_QUERIES:  # attends to everything, and so needs no summaries yet
            self.renew(first, stop)
        else:
            index_pages([store], self.shared.method, self.number, first, stop)

    def renew(self, first: int, stop: int) -> None:
        """Pages [first, stop) have changed: their summaries are stale until the next step (`indexing.refresh`)."""
        held, self.shared.any_stale = self.stale or (first, stop), True
        self.stale = min(first, held[0]), max(stop, held[1])

    def renewed(self, first: int, stop: int) -> None:
        """Pages [first, stop) have been summarised."""
        if self.stale is not None:
            start, end = self.stale
            start, end = (max(start, stop) if first <= start else start), (min(end, first) if stop >= end else end)
            self.stale = (start, end) if start < end else None

    def check_integrity(self) -> None:
        """Raise CacheStateError where this layer's tiers differ or a summary is not what its page gives."""
        store, sequences = self.store, self.shared.sequences
        if store is None or not sequences.length:
            return
        store.check_integrity()
        if store.length < sequences.length:  # forwards left the layer out: what it lacks has no summaries
            return
        method = self.shared.method
        exact = not (self.has_kernels or method.index_rounds)
        check_summaries(store, method, self.number, self.layer_idx, exact)

    def kernels(self) -> StepKernels | None:
        """The kernels of the present batch, or None where the reference serves it."""
        store = self._store()
        return self.shared.step_kernels(store.device, store.num_heads)

    @property
    def has_kernels(self) -> bool:
        """Whether kernels serve this layer."""
        return self.kernels() is not None

    @property
    def _is_first(self) -> bool:
        return self is self.shared.layers[0]

    def _store(self) -> PageStore:
        if self.store is None:
            raise CacheStateError(f"layer {self.layer_idx} is attended to before it was updated; call update first")
        return self.store

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
