"""What the paged layers of a cache have in common: options, method, sequences, and the state of the present forward.

    forward:   update(0) run(0)  update(1) run(1)  ...  update(n) run(n)
               begins the step                          commits it: `committed` tokens are what every layer holds

    prepared:  prepare   update(0) run(0)  ...  update(n) run(n)   finish
               the host's part, once                               commits it

A prepared step is one that `graph/runner.py` captures or replays: its layers only launch.

See `forward_pass.py` for a forward that does not reach the last layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import kernels
from .attention.methods.base import Method, recipe_of
from .backends import position_check
from .backends.triton_indexing import index_completed
from .backends.triton_step import StepKernels
from .backends.zones import StepPlan
from .config import SpinOptions
from .errors import AttentionError, CacheStateError
from .indexing import cluster, padding_change, summarize
from .inference_mode import lasting
from .kernels.descriptor_fields import MAX_QUERIES, Counter, StepField
from .memory.gpu_memory import GpuMemory
from .memory.layer_budget import LayerShape, tier_budget
from .storage.page_table import Sequences, check_batch
from .storage.tier_budget import TierBudget
from .transaction import finished

if TYPE_CHECKING:
    from .layer import SpinLayer


@dataclass
class SharedState:
    """See the module's head.

    Attributes:
        model_name: what to call the model in messages.
        visible_length: tokens held, for code that Dynamo traces: advanced by `update`, never read by the custom op.
        pending: the layer that was updated and has not attended yet.
        committed: tokens that every layer holds.
        commits_with_last_paged: whether no logged layer comes after the last paged one in the present forward.
        prepared: whether the step has begun for all layers, which then only launch.
        captured_length: tokens held before the step, on the device, while a graph is captured.
        failed: whether the forward in progress is known not to have come to its end.
        unfinished: what has to be done before the cache is used, as an operation was interrupted (`transaction.py`); None for
            nothing.
        any_stale: whether some layer has summaries to make before the next step.
        served: the model or config that the cache was made with, by which a first batch is judged before it computes.
        noted: validity [B, Q] of the tokens that the latest padding mask was made for; None if it was no mask.
    """

    options: SpinOptions
    method: Method
    sequences: Sequences
    plan: StepPlan
    model_name: str
    layers: list[SpinLayer] = field(default_factory=list)
    visible_length: Tensor = field(default_factory=lasting(lambda: torch.zeros((), dtype=torch.int64)))
    pending: SpinLayer | None = None
    committed: int = 0
    commits_with_last_paged: bool = True
    prepared: bool = False
    captured_length: Tensor | None = None
    unfinished: Callable[[], None] | None = None
    failed: bool = False
    served: weakref.ref[Any] | None = None
    noted: Tensor | None = None
    any_stale: bool = False
    warned_waves: bool = False
    warned_regrouping: bool = False
    _step_kernels: dict[tuple[torch.device, int], StepKernels | None] = field(default_factory=dict)
    _in_use: tuple[tuple[int, int], list[StepKernels]] | None = None
    _begun: tuple[list[StepKernels], int, bool] | None = None
    _counted: dict[str, int] = field(default_factory=dict)
    """What kernels counted that are gone."""
    gpu: GpuMemory = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.gpu = GpuMemory(self, self.options.gpu_memory)

    def tier_budget(
        self, shape: LayerShape, dtype: torch.dtype, device: torch.device, room: tuple[int, int, int]
    ) -> TierBudget:  # fmt: skip
        """What a layer with keys and values of this shape and dtype has; `room` as for `GpuMemory.limit`."""
        uncapped = tier_budget(shape, dtype, self.method, self.options, None, len(self.layers), device)
        return self.gpu.limit(uncapped, device, room)

    def step_kernels(self, device: torch.device, num_heads: int) -> StepKernels | None:
        """The kernels for the present batch on a device; None where the reference operations serve it."""
        launch = kernels.launchers(device)
        key, batch_size = (device, num_heads), self.sequences.batch_size
        found = self._step_kernels.get(key)
        if launch is None or (found is None and recipe_of(self.method) is None):
            return None
        if found is None or found.batch_size != batch_size:
            counts = [] if found is None else found.counters.sum(0).tolist()
            made = lasting(StepKernels)(self, launch, device, batch_size, num_heads)
            if found is not None:
                if found.fits:
                    made.fit(*found.fits)
                for counter, count in zip(Counter, counts, strict=True):
                    self._counted[counter.name] = self._counted.get(counter.name, 0) + count
            found = self._step_kernels[key] = made
            self._in_use = None
        return found

    def counted(self) -> dict[str, int]:
        """What the kernels counted so far, by the names of `Counter`; reads the device."""
        counts = [step.counters.sum(0).tolist() for step in self._step_kernels.values() if step is not None]
        return {c.name: self._counted.get(c.name, 0) + sum(count[c] for count in counts) for c in Counter}

    def begin(self, batch_size: int, num_tokens: int, new_valid: Tensor | None) -> None:
        """Start a step.

        Args:
            new_valid: [batch_size, num_tokens], bool, False for padding; None for all valid.
        Raises:
            BatchSizeError, BudgetError, CapacityError: nothing has changed.
            CacheStateError: an earlier forward never reached the last paged layer and cannot be taken back.
        """
        if self.sequences.length != self.committed:
            if num_tokens == 1 and not self.committed:
                raise CacheStateError(
                    f"no forward of {self.model_name} has reached the last layer of the cache yet, expected every "
                    "layer to be updated; call cache.reset() if one was interrupted, or use a DynamicCache"
                )
            self.roll_back()
        self.gpu.before_step(batch_size, num_tokens)
        chooses = num_tokens <= MAX_QUERIES  # more attend to everything, and need neither groups nor summaries
        if chooses:
            cluster.catch_up(self)
        self.sequences.begin(batch_size, num_tokens, new_valid)
        if chooses:
            summarize.refresh(self)  # pages may have taken another form

    @lasting
    def prepare(self, batch_size: int, num_tokens: int, new_valid: Tensor | None) -> None:
        """Start a step for all layers at once: after it they only launch, and `finish` ends it.

        Raises:
            as `begin`.
        """
        self.begin(batch_size, num_tokens, new_valid)
        in_use = self.kernels_in_use()
        for step in in_use:
            step.begin_step()
        padded = self.sequences.mask.valid is not None
        for step in in_use:
            step.make_room()
        if self._begun != (in_use, self.sequences.layout, padded):
            for layer in self.layers:
                layer.prepare()
            self._begun = (in_use, self.sequences.layout, padded)
        self.prepared = True

    @lasting
    def finish(self, foresee: bool = False) -> None:
        """The step that was prepared has been launched: its tokens count. Where that fails, it can be done again.

        Args:
            foresee: whether to prepare what can be of a step like it, behind it.
        """
        if self.sequences.length % self.sequences.page_size == 0:
            for step in self.kernels_in_use():
                index_completed(step, self.layers)
        if foresee:
            for step in self.kernels_in_use():
                step.foresee()
        self._end_step()  # from here on nothing can fail
        for layer in self.layers:
            layer.advance()
        self.commit()
        self.visible_length.fill_(self.committed)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """While a graph is captured, lengths are tensors on the device."""
        self.captured_length = self.kernels_in_use()[0].step[StepField.POSITION]
        try:
            yield
        finally:
            self.captured_length = None

    def forget_recorded(self) -> None:
        """Kernels got other buffers: what graphs hold is not what the next step uses, and so has another handle."""
        self._begun = None

    @lasting
    def settle(self) -> None:
        """Finish or undo what was interrupted, if anything was."""
        if self.unfinished is not None:
            self.unfinished()
            self.unfinished = None

    def kernels_in_use(self) -> list[StepKernels]:
        """The kernels of the present batch, one object for each device and number of heads."""
        found = self._in_use
        if found is None or found[0] != (self.sequences.batch_size, len(self.sequences.stores)):
            steps = list(dict.fromkeys(step for layer in self.layers if (step := layer.kernels()) is not None))
            found = self._in_use = ((self.sequences.batch_size, len(self.sequences.stores)), steps)
        return found[1]

    def check_nothing_pending(self) -> None:
        """Raise AttentionError where a layer was updated and its keys never came to the attention function."""
        lost, self.pending = self.pending, None
        if lost is not None:
            raise AttentionError(
                f"{self.model_name}: layer {lost.layer_idx} got its keys back from SpinCache.update but did not pass them "
                'to the attention function "spin": the model changes them in between, or calls another attention '
                'implementation; expected config._attn_implementation == "spin" and keys handed on as they are; use a '
                "DynamicCache for this model. To fill a cache without a model, update a DynamicCache and take it over with "
                "SpinCache.from_cache"
            )

    def check_positions(self, position_ids: Tensor, new_valid: Tensor | None) -> None:
        """As `position_check.check_positions`."""
        position_check.check_positions(self, position_ids, new_valid)

    def counts_positions(self, position_ids: Tensor | None, new_valid: Tensor | None) -> bool:
        """As `position_check.counts_positions`."""
        return position_check.counts_positions(self, position_ids, new_valid)

    def commit(self) -> None:
        """The forward has reached the last layer: what was appended counts."""
        self.committed = self.sequences.length

    @lasting
    def roll_back(self) -> None:
        """Forget what an interrupted forward appended, and the room that was made for it."""
        finished(self, self._roll_back)

    def _roll_back(self) -> None:
        self._end_step()
        if self.sequences.length != self.committed:
            cluster.restore(self, self.sequences.mask.valid, self.committed)
        self.sequences.roll_back(self.committed)
        self.plan.forget()
        self.visible_length.fill_(self.committed)
        if not self.committed and not self.sequences.refcounts:
            self.forget_stores()

    def forget_stores(self) -> None:
        """As before the first step, which has failed: what was settled by it is settled anew."""
        self.sequences.stores.clear()
        for layer in self.layers:
            layer.store, layer.stale, layer.asked, layer.arranged = None, None, None, 0
        self._give_up_kernels()
        self.gpu = GpuMemory(self, self.options.gpu_memory)

    def _give_up_kernels(self) -> None:
        self._step_kernels.clear()
        self._in_use = self._begun = None

    def _end_step(self) -> None:
        self.pending, self.prepared = None, False

    def clear(self) -> None:
        """Forget all sequences. May be repeated."""
        self.sequences.clear()
        self.visible_length.zero_()
        self._end_step()
        self.committed = 0
        for layer in self.layers:
            layer.stale, layer.asked, layer.arranged = None, None, 0

    def forget_kernels(self, counted: dict[str, int]) -> None:
        """After a copy, whose kernels have descriptors of their own.

        Args:
            counted: what the copied kernels had counted.
        """
        self._counted = counted
        self._step_kernels.clear()
        self._in_use = self._begun = None

    def dispose(self) -> None:
        """Let go of layers and storage, which refer to each other; the cache is gone."""
        self._give_up_kernels()
        self.pending = None
        self.layers.clear()
        self.sequences.stores.clear()

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self.sequences.truncate(length, cluster.in_order(self, self.sequences.mask.valid, length))
        cluster.forget_arranged(self)
        self.visible_length.fill_(length)
        self.committed = self.sequences.length

    def select(self, rows: list[int]) -> None:
        """Sequence i becomes what sequence rows[i] was.

        Raises:
            BudgetError, CapacityError: the new batch does not fit; nothing has changed.
        """
        if self.sequences.batch_size:
            asked = [None if layer.asked is None else layer.asked[rows] for layer in self.layers]
            self.sequences.select(rows)
            for layer, queries in zip(self.layers, asked, strict=True):
                layer.asked = queries

    @lasting
    def reconcile(self, batch_size: int, mask: Tensor | None) -> None:
        """As `padding_change.reconcile`; notes the validity of the new tokens, which are to come.

        Raises:
            BatchSizeError: the batch, or its mask, is of other sequences than those held.
        """
        padding_change.check_mask(batch_size, mask)
        if self.committed:
            check_batch(self.sequences.batch_size, batch_size)
            padding_change.reconcile(self, mask)
        padding_change.note(self, mask)
