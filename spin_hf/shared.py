"""What the paged layers of a cache have in common: options, method, sequences, and the state of the present forward.

    forward:   update(0) run(0)  update(1) run(1)  ...  update(n) run(n)
               begins the step                          commits it: `committed_length` is what the last layer holds

A forward that is interrupted leaves earlier layers with more tokens than the last one; the next `begin` takes them
back, so the cache is as it was before the call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .attention.partition import Method
from .config import SpinOptions
from .errors import BatchSizeError, CacheStateError
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
        has_unpaged_layers: whether other layers of the cache change with every forward (windows, linear attention).
        visible_length: tokens held, for code that Dynamo traces: advanced by `update`, never read by the custom op.
        pending: the layer that was updated and has not attended yet.
        failed: whether a step raised.
    """

    options: SpinOptions
    method: Method
    sequences: Sequences
    plan: StepPlan
    model_name: str
    layers: list[SpinLayer] = field(default_factory=list)
    has_unpaged_layers: bool = False
    visible_length: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    pending: SpinLayer | None = None
    failed: bool = False
    warned_waves: bool = False
    _auto_memory: dict[torch.device, int | None] = field(default_factory=dict)

    def gpu_memory(self, device: torch.device) -> int | None:
        """The cap on the compute tier in bytes; what "auto" means is settled at the first step."""
        if self.options.gpu_memory is not None:
            return self.options.gpu_memory
        if device not in self._auto_memory:
            self._auto_memory[device] = auto_gpu_memory(device)
        return self._auto_memory[device]

    def committed_length(self) -> int:
        """Tokens that every layer holds."""
        store = self.layers[-1].store if self.layers else None
        return min(self.sequences.length, store.length) if store is not None else 0

    def begin(self, batch_size: int, num_tokens: int, new_valid: Tensor | None) -> None:
        """Start a step, after undoing what an interrupted forward left behind.

        Args:
            new_valid: [batch_size, num_tokens], bool, False for padding; None for all valid.
        Raises:
            BatchSizeError, BudgetError, CapacityError: nothing has changed.
            CacheStateError: an interrupted forward cannot be undone.
        """
        sequences, last = self.sequences, self.layers[-1].store
        behind = any(layer.store is None or layer.store.length != sequences.length for layer in self.layers)
        interrupted = self.failed or (sequences.length > 0 and behind)
        if interrupted and (self.has_unpaged_layers or (last is None and num_tokens == 1)):
            raise CacheStateError(
                f"the last forward of {self.model_name} did not reach all layers of the cache (it was interrupted, "
                "or the model does not cache some layer); call cache.reset(), or use a DynamicCache for this model"
            )
        if interrupted:
            sequences.truncate(self.committed_length())
        self.failed = False
        sequences.begin(batch_size, num_tokens, new_valid)

    def clear(self) -> None:
        """Forget all sequences."""
        self.sequences.clear()
        self.visible_length.zero_()
        self.pending, self.failed = None, False

    def dispose(self) -> None:
        """Let go of layers and storage, which refer to each other; the cache is gone."""
        self.layers.clear()
        self.sequences.stores.clear()
        self.pending = None

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self.sequences.truncate(length)
        self.visible_length.fill_(length)

    def select(self, rows: list[int]) -> None:
        """Sequence i becomes what sequence rows[i] was."""
        if self.committed_length() != self.sequences.length:
            self.truncate(self.committed_length())
        if self.sequences.batch_size:
            self.sequences.select(rows)

    def check_batch(self, batch_size: int) -> None:
        """Raise BatchSizeError where a batch is not the one that the cache holds."""
        if self.committed_length() and batch_size != self.sequences.batch_size:
            raise BatchSizeError(
                f"the cache holds {self.sequences.batch_size} sequences, got a batch of {batch_size}; call "
                "cache.reset(), batch_select_indices(...) or batch_repeat_interleave(...), or use a new SpinCache"
            )

    def reconcile(self, mask: Tensor | None) -> None:
        """Take the padding mask of a batch: tokens held may have become padding, or real again.

        Args:
            mask: [B, tokens held and new], bool, False for padding; None for none.
        """
        sequences, length = self.sequences, self.committed_length()
        if mask is not None:
            self.check_batch(mask.shape[0])
        changed = sequences.mask.changed_tokens(mask, length) if length else None
        if changed is None:
            return
        tokens = changed.any(0).nonzero()
        pages = range(int(tokens.min()) // sequences.page_size, int(tokens.max()) // sequences.page_size + 1)
        for row in changed.any(1).nonzero().flatten().tolist():
            sequences.unshare(row, pages)
        sequences.mask.replace(mask, length)
        for layer in self.layers:
            layer.index(pages.start, min(pages.stop, length // sequences.page_size))
