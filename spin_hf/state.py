"""State of a cache between two forwards, and the phase of the current one. Data only.

    CacheState       one per cache          options, method, page table, padding, committed tokens, phase
     └── LayerState  one per paged layer    pages, stale summaries, observation queries, counters

`forward_pass.py` writes the phase:

                begin                      commit
         ┌──────────────> APPENDING ──────────────────┐
         │                    │                       v
       IDLE                   │ fail                 IDLE
         │                    v                       ^
         │                 FAILED ──── roll_back ─────┤
         │                    ^                       │
         │                    │ fail                  │
         └──────────────> PREPARED ───────────────────┘
                prepare                    finish
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .attention.methods.base import FittedTensors, Method
from .config import SpinOptions
from .inference_mode import outside_inference_mode
from .integration.rank_agreement import Ranks
from .kernels.descriptor_fields import MAX_QUERIES
from .storage.copied import copied
from .storage.page_store import PageStore
from .storage.page_table import PageTable
from .storage.token_log import TokenLog


class Phase(enum.Enum):
    """Phase of the current forward. Transitions are drawn at the head of this file."""

    IDLE = enum.auto()
    """Every layer holds `committed` tokens."""
    APPENDING = enum.auto()
    """Layers append and attend, one after the other."""
    PREPARED = enum.auto()
    """The host work of all layers is done. Layers only launch kernels."""
    FAILED = enum.auto()
    """The forward has failed. It is rolled back before the cache is used again."""


@dataclass(eq=False)
class LayerState:
    """State of one paged layer.

    Attributes:
        layer_idx: index in the model.
        number: index among the paged layers.
        store: pages and summaries; None before the first token.
        attended_tokens, attended_queries: totals over the sparse queries that the reference backend served.
        clustered_pages: pages of this layer that are clustered; fewer than the spans have if memory ran out while clustering.
        stale_pages: pages [first, stop) whose summaries are recomputed before the next step that selects pages; None for none.
        fitted: name -> [B, H, ...], tensors that the method fitted to each sequence (`indexing/fit.py`); None before the first
            fit. They are replaced, not written to.
        observation_queries: [B, H, G, n, D], queries of the last tokens of a prompt. The next step that selects pages clusters
            by them and drops them (`indexing/cluster.py`).
        key_means: of a sparse prompt in progress: mean keys, and the tokens that they cover (`backends/sparse_prompt.py`).
    """

    layer_idx: int
    number: int
    store: PageStore | None = None
    attended_tokens: int = 0
    attended_queries: int = 0
    clustered_pages: int = 0
    stale_pages: tuple[int, int] | None = None
    fitted: FittedTensors | None = None
    observation_queries: Tensor | None = None
    key_means: tuple[Tensor, int] | None = None

    def invalidate(self, first: int, stop: int) -> None:
        """Mark the summaries of pages [first, stop) as stale. The next step that selects pages recomputes them."""
        held = self.stale_pages or (first, stop)
        self.stale_pages = min(first, held[0]), max(stop, held[1])

    def mark_summarized(self, first: int, stop: int) -> None:
        """Mark the summaries of pages [first, stop) as valid."""
        if self.stale_pages is not None:
            start, end = self.stale_pages
            start, end = (max(start, stop) if first <= start else start), (min(end, first) if stop >= end else end)
            self.stale_pages = (start, end) if start < end else None

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerState:
        return copied(self, memo, "store", "fitted", "observation_queries", "key_means")


def _not_known(device: torch.device) -> None:
    return None


@dataclass(eq=False)
class CacheState:
    """State shared by the paged layers of a cache.

    Attributes:
        options: what the user chose.
        method: how pages are selected.
        sequences: page table and padding of the batch.
        model_name: the model's name in messages.
        model_or_config: the model or config that the cache was made with; admission plans the first batch from it.
        layers: the paged layers.
        visible_length: tokens held, for Dynamo-traced code. `update` advances it; the custom op never reads it.
        captured_length: tokens held before the step, on the device, during graph capture; else None.
        committed: tokens that every layer holds.
        exact: the first tokens, as far as they are not to be read again. Keys and values of later ones carry the error of
            sparse steps (`graph/rectifier.py`).
        tokens: their ids, as far as they are known.
        ranks: of a tensor-parallel model, which share its heads; None for a model on one rank.
        store: a `PromptStore` of prompts that were read before; None for none.
        reused_tokens: tokens of the present sequences that came from the store.
        phase: of the current forward.
        reads_prompt: whether the forward is a chunk of a prompt, which attends to all tokens whatever its length.
        is_sparse: whether the current forward attends to a selection of pages.
        reads_all: whether kernels attend to all tokens in the current step. Clusters and summaries may be out of date then.
        pending: the `SpinLayer` that was updated and has not attended yet; else None.
        new_token_validity: [B, Q], validity of the new tokens in the latest padding mask; None without a mask.
        unfinished: completes or undoes an interrupted operation before the cache is used (`transaction.py`); else None.
        warned_waves, warned_clustering: whether the warning has been logged.
        free_memory: free bytes of a device, None if not known. Bounds temporary memory of indexing.
    """

    options: SpinOptions
    method: Method
    sequences: PageTable
    model_name: str
    model_or_config: weakref.ref[Any] | None = None
    layers: list[LayerState] = field(default_factory=list)
    visible_length: Tensor = field(default_factory=outside_inference_mode(lambda: torch.zeros((), dtype=torch.int64)))
    captured_length: Tensor | None = None
    committed: int = 0
    exact: int = 0
    tokens: TokenLog = field(default_factory=TokenLog)
    ranks: Ranks | None = None
    store: Any = None
    reused_tokens: int = 0
    phase: Phase = Phase.IDLE
    reads_prompt: bool = False
    is_sparse: bool = False
    reads_all: bool = False
    pending: Any = None
    new_token_validity: Tensor | None = None
    unfinished: Callable[[], None] | None = None
    warned_waves: bool = False
    warned_clustering: bool = False
    free_memory: Callable[[torch.device], int | None] = _not_known

    @property
    def prepared(self) -> bool:
        """Whether a step is prepared, so that layers only launch kernels."""
        return self.phase is Phase.PREPARED

    @property
    def failed(self) -> bool:
        """Whether the current forward must be rolled back."""
        return self.phase is Phase.FAILED

    def selects(self, num_tokens: int) -> bool:
        """Whether a forward of `num_tokens` tokens selects pages. Longer ones and chunks of prompts attend to all tokens."""
        return num_tokens <= MAX_QUERIES and not self.reads_prompt

    def settle(self) -> None:
        """Complete or undo the interrupted operation, if there is one."""
        if self.unfinished is not None:
            self.unfinished()
            self.unfinished = None
