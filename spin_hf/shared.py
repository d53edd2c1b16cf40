"""What the paged layers of a cache have in common: options, method, sequences, and the state of the present forward.

    forward:   update(0) run(0)  update(1) run(1)  ...  update(n) run(n)
               begins the step                          commits it: `committed` tokens are what every layer holds

See `forward.py` for a forward that does not reach the last layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import kernels
from .attention.partition import Method
from .attention.shadowkv import ShadowKV
from .config import SpinOptions
from .decode import StepKernels
from .errors import AttentionError, BatchSizeError, CacheStateError
from .kernels.fields import Counter, StepField
from .plan import StepPlan
from .storage.budget import auto_gpu_memory
from .storage.sequences import Sequences

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
    """

    options: SpinOptions
    method: Method
    sequences: Sequences
    plan: StepPlan
    model_name: str
    layers: list[SpinLayer] = field(default_factory=list)
    visible_length: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    pending: SpinLayer | None = None
    committed: int = 0
    commits_with_last_paged: bool = True
    prepared: bool = False
    captured_length: Tensor | None = None
    warned_waves: bool = False
    _step_kernels: dict[tuple[torch.device, int], StepKernels | None] = field(default_factory=dict)
    _in_use: tuple[tuple[int, int], list[StepKernels]] | None = None
    _begun: tuple[list[StepKernels], int] | None = None
    _auto_memory: dict[torch.device, int | None] = field(default_factory=dict)

    def gpu_memory(self, device: torch.device) -> int | None:
        """The cap on the compute tier in bytes; what "auto" means is settled at the first step."""
        if self.options.gpu_memory is not None:
            return self.options.gpu_memory
        if device not in self._auto_memory:
            self._auto_memory[device] = auto_gpu_memory(device)
        return self._auto_memory[device]

    def step_kernels(self, device: torch.device, num_heads: int) -> StepKernels | None:
        """The kernels for the present batch on a device; None where the reference operations serve it."""
        launch = kernels.launchers(device)
        if launch is None or type(self.method) is not ShadowKV:
            return None
        key, batch_size = (device, num_heads), self.sequences.batch_size
        found = self._step_kernels.get(key)
        if found is None or found.batch_size != batch_size:
            found = self._step_kernels[key] = StepKernels(self, launch, device, batch_size, num_heads)
            self._in_use = None
        return found

    def counted(self) -> dict[str, int]:
        """What the kernels counted so far, by the names of `Counter`; reads the device."""
        counted = [layer.counters.tolist() for layer in self.layers if layer.counters is not None]
        return {counter.name: sum(counts[counter] for counts in counted) for counter in Counter}

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
        self.sequences.begin(batch_size, num_tokens, new_valid)

    def prepare(self, batch_size: int, num_tokens: int, new_valid: Tensor | None) -> None:
        """Start a step for all layers at once: after it they only launch, and `finish` ends it.

        Raises:
            as `begin`.
        """
        self.begin(batch_size, num_tokens, new_valid)
        in_use = self.kernels_in_use()
        for step in in_use:
            step.begin_step()
        if self._begun != (in_use, self.sequences.layout):
            for layer in self.layers:
                layer.prepare()
            self._begun = (in_use, self.sequences.layout)
        for step in in_use:
            step.make_room()
        self.prepared = True

    def finish(self) -> None:
        """The step that was prepared has been launched: its tokens count."""
        self.prepared, self.pending = False, None
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
                "DynamicCache for this model"
            )

    def commit(self) -> None:
        """The forward has reached the last layer: what was appended counts."""
        self.committed = self.sequences.length

    def roll_back(self) -> None:
        """Forget what an interrupted forward appended."""
        self.pending, self.prepared = None, False
        if self.sequences.length != self.committed:
            self.truncate(self.committed)

    def clear(self) -> None:
        """Forget all sequences."""
        self.sequences.clear()
        self.visible_length.zero_()
        self.pending, self.committed = None, 0

    def forget_kernels(self) -> None:
        """After a copy: its kernels have descriptors of their own."""
        self._step_kernels.clear()
        self._in_use = self._begun = None

    def dispose(self) -> None:
        """Let go of layers and storage, which refer to each other; the cache is gone."""
        self.layers.clear()
        self.sequences.stores.clear()
        self.forget_kernels()
        self.pending = None

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self.sequences.truncate(length)
        self.visible_length.fill_(length)
        self.committed = self.sequences.length

    def select(self, rows: list[int]) -> None:
        """Sequence i becomes what sequence rows[i] was.

        Raises:
            BudgetError, CapacityError: the new batch does not fit; nothing has changed.
        """
        if self.sequences.batch_size:
            self.sequences.select(rows)

    def reconcile(self, batch_size: int, mask: Tensor | None) -> None:
        """Take the padding mask of a batch: tokens held may have become padding, or real again.

        Args:
            batch_size: of the forward to come.
            mask: [B, tokens held and new], bool, False for padding; None for none.
        """
        sequences, length = self.sequences, self.committed
        if length:
            check_batch(sequences.batch_size, batch_size)
        changed = sequences.mask.changed_tokens(mask, length) if length else None
        if changed is None:
            return
        tokens = changed.any(0).nonzero()
        pages = range(int(tokens.min()) // sequences.page_size, int(tokens.max()) // sequences.page_size + 1)
        for row in changed.any(1).nonzero().flatten().tolist():
            sequences.unshare(row, pages)
        sequences.mask.replace(mask, length)
        sequences.events += 1
        for layer in self.layers:
            layer.index(pages.start, min(pages.stop, length // sequences.page_size))


def check_batch(held: int, batch_size: int) -> None:
    """Raise BatchSizeError where a batch is not the one that the cache holds."""
    if held != batch_size:
        raise BatchSizeError(
            f"the cache holds {held} sequences, got a batch of {batch_size}; call cache.reset(), "
            "batch_select_indices(...) or batch_repeat_interleave(...), or use a new SpinCache"
        )
