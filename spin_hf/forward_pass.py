"""One forward of a model over the paged layers. It is atomic: all of its tokens count, or none.

    eager      update(0) run(0)  update(1) run(1)  ...  update(n) run(n)
               begin                                    commit

    captured   prepare   update(0) run(0)  ...  update(n) run(n)   finish
               host work for all layers    launches only

A forward that fails is rolled back. Only this file writes `CacheState.phase` (state diagram in `state.py`).
`forward_log.py` covers the unpaged layers, `transaction.py` the operations between two forwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from .backends.backend_set import BackendSet
from .backends.triton_indexing import index_completed
from .backends.zones import StepPlan
from .errors import AttentionError, CacheStateError
from .indexing import cluster, padding_change, summarize
from .indexing.fit import selected_fits
from .indexing.span_runs import waits_a_step
from .inference_mode import outside_inference_mode
from .integration.rank_agreement import meeting
from .kernels.descriptor_fields import StepField
from .memory import rank_budgets, watermarks
from .memory.admission import check_first_batch
from .memory.gpu_memory import GpuMemory
from .state import CacheState, Phase
from .storage.page_table import PageTable
from .storage.token_log import TokenLog
from .transaction import finished


class ForwardPass:
    """The forwards of one cache.

    Args:
        state: the cache's state.
    """

    def __init__(self, state: CacheState) -> None:
        self.state = state
        self.zones = StepPlan(state.options, state.sequences)
        self.backends = BackendSet(state, self.zones)
        self.gpu = GpuMemory(state, state.options.gpu_memory)
        state.free_memory = lambda device: watermarks.free_gpu_memory(device)
        self.commits_with_last_paged = True
        """Whether the last paged layer commits the current forward; False if an unpaged layer after it does."""
        self.meets = False
        """Whether the ranks of a tensor-parallel model meet in the current step."""
        self._steps_alone = 0
        self._prepared_for: Any = None
        self._fits: list[Any] = []
        """What the layers' descriptors were last written for: kernels, bindings, buffer sizes, memory version, padding."""

    # ------------------------------------------------------------------------------------------------------ a forward

    def admit(self, num_tokens: int, batch_size: int, mask: Tensor | None) -> None:
        """Check that a new batch fits the memory caps, then record its padding.

        Args:
            num_tokens: per sequence.
            batch_size, mask: as for `padding_change.accept`.
        Raises:
            BudgetError, CapacityError: the batch does not fit. Nothing has changed.
        """
        padding = 0 if mask is None or self.state.ranks is None else int((~mask).sum())
        with meeting(self.state.ranks, "read a new batch", batch_size, num_tokens, padding):
            check_first_batch(self.state, self.gpu, num_tokens, batch_size)
            padding_change.accept(self.state, batch_size, mask)

    def begin(self, batch_size: int, num_tokens: int, new_valid: Tensor | None, reads_all: bool | None = None) -> None:
        """Start a step.

        Args:
            new_valid: [batch_size, num_tokens], bool, False for padding; None for all valid.
            reads_all: of a step of one token, whether it attends to all tokens, if kernels of others than this cache's decide
                that; else None.
        Raises:
            BatchSizeError, BudgetError, CapacityError: nothing has changed.
            CacheStateError: the first forward never reached the last paged layer.
        """
        state, sequences = self.state, self.state.sequences
        if sequences.length != state.committed:
            if num_tokens == 1 and not state.committed:
                raise CacheStateError(
                    f"no forward of {state.model_name} has reached the last layer of the cache yet, expected every "
                    "layer to be updated; call cache.reset() if one was interrupted, or use a DynamicCache"
                )
            self.roll_back()
        self._before_step(batch_size, num_tokens)
        with self.meeting("begin a step", batch_size, num_tokens, sequences.length):
            self._begin(batch_size, num_tokens, new_valid, reads_all)

    def _before_step(self, batch_size: int, num_tokens: int) -> None:
        """Size the frames. Ranks do so together, when memory grows or was not checked for long."""
        state, sequences = self.state, self.state.sequences
        expected = max(num_tokens, sequences.expected_tokens - sequences.length)
        if state.ranks is None:
            self.gpu.before_step(batch_size, expected)
            return
        selects, self._steps_alone = state.selects(num_tokens), self._steps_alone + 1
        interval = state.options.tuning.check_interval_steps
        pages = sequences.length // sequences.page_size, -(-(sequences.length + num_tokens) // sequences.page_size)
        self.meets = not selects or self._steps_alone >= interval or not sequences.owns(*pages)
        checks = self._steps_alone >= interval
        if self.meets:
            self._steps_alone = 0 if selects else interval  # the first step behind a prompt allocates too
            with self.meeting("size page frames"):
                self.gpu.before_step(batch_size, expected, checks)
                rank_budgets.agree(self.gpu, state.ranks)

    def meeting(self, what: str, *facts: int) -> AbstractContextManager[None]:
        """A meeting of the ranks, if they meet in the current step: it may allocate. See `integration/rank_agreement.py`."""
        return meeting(self.state.ranks if self.meets else None, what, *facts)

    def _begin(self, batch_size: int, num_tokens: int, new_valid: Tensor | None, reads_all: bool | None) -> None:
        state, sequences = self.state, self.state.sequences
        selects, length = state.selects(num_tokens), sequences.length + num_tokens
        one, state.reads_all = selects and num_tokens == 1, False

        def reads() -> bool:
            return one and (self.backends.read_all(length) if reads_all is None else reads_all)

        if selects and not reads():  # others need neither clusters nor summaries
            if reads_all is None:
                self.backends.wait_for_compiles()
            if num_tokens > 1 or not waits_a_step(sequences.start, sequences.length, sequences.page_size):
                cluster.cluster_new_tokens(state)
        if selects:
            self.gpu.size_frames()
        sequences.begin(batch_size, num_tokens, new_valid)
        state.phase, state.reads_all = Phase.APPENDING, reads()
        first_prompt = sequences.start == 0 and num_tokens > 1
        state.is_sparse = selects and not (state.reads_all or first_prompt or self.zones.attends_all())
        if selects and not state.reads_all:
            summarize.summarize_stale(state)  # after sequences.begin, which may have changed the pages' layout

    @contextmanager
    def reading(self, num_tokens: int, here: bool = True) -> Iterator[None]:
        """Within this context a prompt is read that will have `num_tokens` tokens, with those held before.

        Memory for all is reserved with its first forward. `here`: whether forwards are chunks that this package makes.
        """
        state, before = self.state, self.state.sequences.expected_tokens
        state.reads_prompt, state.sequences.expected_tokens = here, max(before, num_tokens)
        try:
            yield
        finally:
            state.reads_prompt, state.sequences.expected_tokens = False, before
            for layer in state.layers if not before else ():
                layer.key_means = None

    @outside_inference_mode
    def prepare(self, batch_size: int, num_tokens: int, new_valid: Tensor | None) -> None:
        """Start a step and do the host work of all layers. The layers then only launch; `finish` ends the step.

        Raises:
            As `begin`.
        """
        self.begin(batch_size, num_tokens, new_valid)
        with self.meeting("prepare a step"):
            self._prepare()
        self.state.phase = Phase.PREPARED

    def _prepare(self) -> None:
        sequences, in_use = self.state.sequences, self.backends.in_use()
        for step in in_use:
            step.begin_step()
        for step in in_use:
            step.make_room()
        padded, bound = sequences.mask.valid is not None, [(step.binding, step.fits) for step in in_use]
        fits = [layer.fitted for layer in self.state.layers]
        prepared_for = in_use, bound, sequences.memory_version, padded, [id(held) for held in fits]
        if self._prepared_for != prepared_for:
            for layer in self.state.layers:
                kernels = self.backends.kernels_of(layer)
                assert kernels is not None
                kernels.prepare(layer)
            self._prepared_for, self._fits = prepared_for, fits  # while held, no other object has their ids

    @outside_inference_mode
    def prepare_row(self, reads_all: bool) -> None:
        """Start a step of one token of the only sequence, whose layers kernels of a batch of rows launch (`row_kernels.py`).

        Args:
            reads_all: whether its launches attend to whole segments. Others select all pages of a sequence that the budget
                covers, so they read neither clusters nor summaries of it.
        Raises:
            As `begin`.
        """
        self.begin(1, 1, None, reads_all or self.zones.covers(self.state.sequences.length + 1))
        self.state.phase = Phase.PREPARED

    @outside_inference_mode
    def select_after_all(self) -> None:
        """Let a step that has begun select pages, though it was to attend to all tokens."""
        if self.zones.attends_all():
            return
        self.state.reads_all, self.state.is_sparse = False, True
        summarize.summarize_stale(self.state)

    @contextmanager
    def capturing(self, device: torch.device) -> Iterator[None]:
        """Within this context the cache's length is a tensor, which a captured graph can read, on the device of the inputs."""
        lengths = [step.step[StepField.POSITION] for step in self.backends.in_use()]
        near = next((length for length in lengths if length.device == device), None)
        self.state.captured_length = lengths[0].to(device) if near is None else near
        try:
            yield
        finally:
            self.state.captured_length = None

    @outside_inference_mode
    def finish(self, upload_next: bool = False) -> None:
        """Commit a prepared step after its launches. May be called again if it fails.

        Args:
            upload_next: whether to upload the descriptors of the next one-token step now.
        """
        state, sequences = self.state, self.state.sequences
        if sequences.length % sequences.page_size == 0 and not state.reads_all:
            for step in self.backends.in_use():
                index_completed(step, state.layers)
        if upload_next:
            for step in self.backends.in_use():
                step.upload_next()
        self.finish_row()

    def finish_row(self) -> None:
        """Commit a prepared step whose completed page has been summarised, if it selects pages. Cannot fail."""
        state, sequences = self.state, self.state.sequences
        state.pending = None
        if sequences.length % sequences.page_size == 0 and state.reads_all:
            for layer in state.layers:
                layer.invalidate(sequences.num_pages - 1, sequences.num_pages)
        for layer in state.layers:
            assert layer.store is not None
            layer.store.length = sequences.length
        self.commit()
        state.visible_length.fill_(state.committed)

    def commit(self) -> None:
        """Count the appended tokens. The forward has reached the last layer."""
        self.state.committed = self.state.sequences.length
        if not self.state.is_sparse:
            self.state.exact = self.state.committed
        if not self.state.failed:
            self.state.phase = Phase.IDLE

    def fail(self) -> None:
        """Mark the current forward as failed."""
        self.state.phase = Phase.FAILED

    def forget_failure(self) -> None:
        """Return to IDLE after a failed forward has been rolled back."""
        if self.state.failed:
            self.state.phase = Phase.IDLE

    @outside_inference_mode
    def roll_back(self, held: int | None = None) -> None:
        """Remove the tokens of an interrupted forward and the pages allocated for them.

        Args:
            held: tokens before the forward, if it may have been committed already; None for `committed`.
        """
        if held is not None:
            self.state.committed = held
        finished(self.state, self._roll_back)

    def _roll_back(self) -> None:
        state, sequences = self.state, self.state.sequences
        state.exact = min(state.exact, state.committed)
        self._end()
        if sequences.length != state.committed:
            cluster.restore(state, sequences.mask.valid, state.committed)
            summarize.invalidate_last_unit(state, state.committed)
        sequences.roll_back(state.committed)
        self.zones.forget()
        state.visible_length.fill_(state.committed)
        if not state.committed:
            cluster.forget_clustered(state)
        if not state.committed and not sequences.refcounts:
            self.forget_stores()

    def _end(self) -> None:
        self.state.pending, self.state.phase = None, Phase.IDLE

    # -------------------------------------------------------------------------------------------- between two forwards

    def clear(self) -> None:
        """Remove all sequences. May be repeated."""
        state = self.state
        state.sequences.clear()
        state.visible_length.zero_()
        self._end()
        state.committed, state.exact, state.tokens, state.reused_tokens = 0, 0, TokenLog(), 0
        for layer in state.layers:
            layer.stale_pages, layer.observation_queries, layer.clustered_pages, layer.fitted = None, None, 0, None

    def truncate(self, length: int) -> None:
        """Remove the tokens from `length` on."""
        state = self.state
        left = cluster.in_order(state, state.sequences.mask.valid, length)
        summarize.invalidate_last_unit(state, length)
        state.sequences.truncate(length, left)
        cluster.forget_clustered(state)
        state.visible_length.fill_(length)
        state.committed, state.tokens = state.sequences.length, state.tokens.truncated(length)
        state.exact = min(state.exact, state.committed)

    def select_sequences(self, rows: list[int]) -> None:
        """Sequence i becomes a copy of sequence rows[i].

        Raises:
            BudgetError, CapacityError: the new batch does not fit; nothing has changed.
        """
        state = self.state
        if state.sequences.batch_size:
            selected = [
                None if layer.observation_queries is None else layer.observation_queries[rows] for layer in state.layers
            ]
            fitted = [selected_fits(layer, rows) for layer in state.layers]
            state.sequences.select(rows)
            state.tokens = state.tokens.selected(rows)
            for layer, queries, of_rows in zip(state.layers, selected, fitted, strict=True):
                layer.observation_queries, layer.fitted = queries, of_rows

    def fork(self) -> dict[int, Any]:
        """Prepare the cache for forks, and begin one: a memo with which `deepcopy` shares pages instead of copying them.

        Clusters and summarizes first what a step would, as each side would otherwise copy the pages for that.

        Raises:
            CacheStateError: the method returned invalid clusters.
        """
        state, memo = self.state, dict[int, Any]()
        cluster.cluster_new_tokens(state)
        twin = state.sequences.fork(memo)
        memo[id(self.zones)] = StepPlan(state.options, twin)
        immutable = (
            state.options, state.tokens, twin.mask.valid, twin.mask.positions, twin.spans.clustered, state.new_token_validity,
        )  # fmt: skip
        fitted = [layer.fitted for layer in state.layers]
        memo.update((id(each), each) for each in (*immutable, *fitted))
        return memo

    def attach(self, forked: PageTable, memo: dict[int, Any]) -> None:
        """Give the page table of a fork its stores, the copies of those of `forked` that `memo` lists."""
        self.state.sequences.stores = [memo[id(store)] for store in forked.stores]

    def forget_stores(self) -> None:
        """Drop storage, kernels and memory plan, as before the first step. The next step makes them again."""
        state = self.state
        state.sequences.forget_stores()
        for layer in state.layers:
            layer.store, layer.stale_pages, layer.observation_queries, layer.clustered_pages = None, None, None, 0
            layer.fitted = None
        self.backends.forget()
        self._prepared_for = None
        self.gpu = GpuMemory(state, state.options.gpu_memory)

    def dispose(self) -> None:
        """Break the reference cycles between layers and storage once the cache has been deleted."""
        self.backends.forget()
        self._prepared_for = self.state.pending = None
        for layer in self.state.layers:
            if layer.store is not None:
                layer.store.invalidate = None  # it belongs to the layer's state, which refers to the store
        self.state.layers.clear()
        self.state.sequences.forget_stores()

    # --------------------------------------------------------------------------------------------------------- checks

    def check_nothing_pending(self) -> None:
        """Fail the forward and raise AttentionError if a layer's new keys never reached the attention function."""
        lost, self.state.pending = self.state.pending, None
        if lost is not None:
            self.fail()
            raise never_attended(self.state.model_name, lost.layer_idx)


def never_attended(model_name: str, layer_idx: int) -> AttentionError:
    """The error about a layer's new keys that never reached the attention function."""
    return AttentionError(
        f"{model_name}: layer {layer_idx} got its keys back from SpinCache.update but did not pass "
        'them to the attention function "spin": the model changes them in between, or calls another attention '
        'implementation; expected config._attn_implementation == "spin" and keys handed on as they are; use a '
        "DynamicCache for this model. To fill a cache without a model, update a DynamicCache and take it over with "
        "SpinCache.from_cache"
    )
