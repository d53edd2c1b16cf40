"""One forward of a model over the paged layers: where it begins, and that it happens whole or not at all.

    eager      update(0) run(0)  update(1) run(1)  ...  update(n) run(n)
               begin                                    commit

    captured   prepare   update(0) run(0)  ...  update(n) run(n)   finish
               the host's part, once       launches only

What fails is rolled back. This file alone writes `CacheState.phase`, whose states are drawn in `state.py`; what a forward
changes in layers that are not paged is in `forward_log.py`, operations between two forwards are in `transaction.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .backends.kernel_set import KernelSet
from .backends.triton_indexing import index_completed
from .backends.zones import StepPlan
from .errors import AttentionError, CacheStateError
from .indexing import cluster, padding_change, summarize
from .inference_mode import outside_inference_mode
from .kernels.descriptor_fields import MAX_QUERIES, StepField
from .memory.admission import check_first_batch
from .memory.gpu_memory import GpuMemory
from .state import CacheState, Phase
from .transaction import finished


class ForwardPass:
    """The forwards of one cache.

    Args:
        state: of the cache.
    """

    def __init__(self, state: CacheState) -> None:
        self.state = state
        self.plan = StepPlan(state.options, state.sequences)
        self.kernels = KernelSet(state)
        self.gpu = GpuMemory(state, state.options.gpu_memory)
        self.commits_with_last_paged = True
        """Whether no layer that reports comes behind the last paged one in the present forward."""
        self._prepared_for: Any = None
        """The kernels, and the layout of pages, that the layers' descriptors were last written for."""

    # ------------------------------------------------------------------------------------------------------ a forward

    def admit(self, num_tokens: int, batch_size: int, mask: Tensor | None) -> None:
        """The first tokens of a batch come: refuse them if the caps do not hold them, else take their padding.

        Args:
            num_tokens: of each sequence.
            batch_size, mask: as for `padding_change.accept`.
        Raises:
            BudgetError, CapacityError: nothing has changed.
        """
        check_first_batch(self.state, self.gpu, num_tokens, batch_size)
        padding_change.accept(self.state, batch_size, mask)

    def begin(self, batch_size: int, num_tokens: int, new_valid: Tensor | None) -> None:
        """Start a step.

        Args:
            new_valid: [batch_size, num_tokens], bool, False for padding; None for all valid.
        Raises:
            BatchSizeError, BudgetError, CapacityError: nothing has changed.
            CacheStateError: an earlier forward never reached the last paged layer and cannot be taken back.
        """
        state, sequences = self.state, self.state.sequences
        if sequences.length != state.committed:
            if num_tokens == 1 and not state.committed:
                raise CacheStateError(
                    f"no forward of {state.model_name} has reached the last layer of the cache yet, expected every "
                    "layer to be updated; call cache.reset() if one was interrupted, or use a DynamicCache"
                )
            self.roll_back()
        self.gpu.before_step(batch_size, num_tokens)
        chooses = num_tokens <= MAX_QUERIES  # more attend to everything, and need neither clusters nor summaries
        if chooses:
            cluster.cluster_new_tokens(state)
        sequences.begin(batch_size, num_tokens, new_valid)
        state.phase = Phase.APPENDING
        if chooses:
            summarize.summarize_stale(state)  # pages may have taken another form

    @outside_inference_mode
    def prepare(self, batch_size: int, num_tokens: int, new_valid: Tensor | None) -> None:
        """Start a step for all layers at once: after it they only launch, and `finish` ends it.

        Raises:
            as `begin`.
        """
        sequences = self.state.sequences
        self.begin(batch_size, num_tokens, new_valid)
        in_use = self.kernels.in_use()
        for step in in_use:
            step.begin_step()
        for step in in_use:
            step.make_room()
        prepared_for = (
            in_use,
            [step.fits for step in in_use],
            sequences.memory_version,
            sequences.mask.valid is not None,
        )
        if self._prepared_for != prepared_for:
            for layer in self.state.layers:
                kernels = self.kernels.of(layer)
                assert kernels is not None
                kernels.prepare(layer)
            self._prepared_for = prepared_for
        self.state.phase = Phase.PREPARED

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """While a graph is captured, lengths are tensors on the device."""
        self.state.captured_length = self.kernels.in_use()[0].step[StepField.POSITION]
        try:
            yield
        finally:
            self.state.captured_length = None

    @outside_inference_mode
    def finish(self, foresee: bool = False) -> None:
        """The step that was prepared has been launched: its tokens count. Where that fails, it can be done again.

        Args:
            foresee: whether to prepare what can be of a step like it, behind it.
        """
        state, sequences = self.state, self.state.sequences
        if sequences.length % sequences.page_size == 0:
            for step in self.kernels.in_use():
                index_completed(step, state.layers)
        if foresee:
            for step in self.kernels.in_use():
                step.foresee()
        state.pending = None  # from here on nothing can fail
        for layer in state.layers:
            assert layer.store is not None
            layer.store.length = sequences.length
        self.commit()
        state.visible_length.fill_(state.committed)

    def commit(self) -> None:
        """The forward has reached the last layer: what was appended counts."""
        self.state.committed = self.state.sequences.length
        if not self.state.failed:
            self.state.phase = Phase.IDLE

    def fail(self) -> None:
        """The forward will not come to its end."""
        self.state.phase = Phase.FAILED

    def forget_failure(self) -> None:
        """What the forward changed has been taken back."""
        if self.state.failed:
            self.state.phase = Phase.IDLE

    @outside_inference_mode
    def roll_back(self, held: int | None = None) -> None:
        """Forget what an interrupted forward appended, and the room that was made for it.

        Args:
            held: tokens before the forward, where it may have been committed; None for the tokens committed.
        """
        if held is not None:
            self.state.committed = held
        finished(self.state, self._roll_back)

    def _roll_back(self) -> None:
        state, sequences = self.state, self.state.sequences
        self._end()
        if sequences.length != state.committed:
            cluster.restore(state, sequences.mask.valid, state.committed)
        sequences.roll_back(state.committed)
        self.plan.forget()
        state.visible_length.fill_(state.committed)
        if not state.committed and not sequences.refcounts:
            self.forget_stores()

    def _end(self) -> None:
        self.state.pending, self.state.phase = None, Phase.IDLE

    # -------------------------------------------------------------------------------------------- between two forwards

    def clear(self) -> None:
        """Forget all sequences. May be repeated."""
        state = self.state
        state.sequences.clear()
        state.visible_length.zero_()
        self._end()
        state.committed = 0
        for layer in state.layers:
            layer.stale_pages, layer.observation_queries, layer.clustered_pages = None, None, 0

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        state = self.state
        state.sequences.truncate(length, cluster.in_order(state, state.sequences.mask.valid, length))
        cluster.forget_clustered(state)
        state.visible_length.fill_(length)
        state.committed = state.sequences.length

    def select_sequences(self, rows: list[int]) -> None:
        """Sequence i becomes what sequence rows[i] was.

        Raises:
            BudgetError, CapacityError: the new batch does not fit; nothing has changed.
        """
        state = self.state
        if state.sequences.batch_size:
            observed = [
                None if layer.observation_queries is None else layer.observation_queries[rows] for layer in state.layers
            ]
            state.sequences.select(rows)
            for layer, queries in zip(state.layers, observed, strict=True):
                layer.observation_queries = queries

    def forget_stores(self) -> None:
        """As before the first step, which has failed: what was settled by it is settled anew."""
        state = self.state
        state.sequences.stores.clear()
        for layer in state.layers:
            layer.store, layer.stale_pages, layer.observation_queries, layer.clustered_pages = None, None, None, 0
        self.kernels.forget()
        self._prepared_for = None
        self.gpu = GpuMemory(state, state.options.gpu_memory)

    def dispose(self) -> None:
        """Let go of layers and storage, which refer to each other; the cache is gone."""
        self.kernels.forget()
        self._prepared_for = self.state.pending = None
        self.state.layers.clear()
        self.state.sequences.stores.clear()

    # --------------------------------------------------------------------------------------------------------- checks

    def check_nothing_pending(self) -> None:
        """Raise AttentionError where a layer was updated and its keys never came to the attention function."""
        lost, self.state.pending = self.state.pending, None
        if lost is not None:
            raise AttentionError(
                f"{self.state.model_name}: layer {lost.layer_idx} got its keys back from SpinCache.update but did not pass "
                'them to the attention function "spin": the model changes them in between, or calls another attention '
                'implementation; expected config._attn_implementation == "spin" and keys handed on as they are; use a '
                "DynamicCache for this model. To fill a cache without a model, update a DynamicCache and take it over with "
                "SpinCache.from_cache"
            )

    def check_layer(self, index: int, num_layers: int) -> None:
        """Raise CacheStateError where a model has a layer that the cache has not. What its forward has appended is taken back.

        Args:
            index: of the layer that comes.
            num_layers: of the cache.
        """
        if index < num_layers:
            return
        state = self.state
        if state.committed == state.sequences.length:
            self.roll_back(state.sequences.start)  # the last layer of the cache was not the model's last
        raise CacheStateError(
            f"the cache has {num_layers} layers, as {state.model_name} has, got layer {index} of a model that has more; make "
            "a SpinCache of the model that uses it"
        )
