"""What a cache holds between two forwards, and how far the present one has come: data, no behaviour.

    CacheState     one for a cache     options, method, sequences (page table and padding), tokens committed, phase
     └── LayerState  one for a paged layer     pages, stale summaries, observation queries, counters

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

from .attention.methods.base import Method
from .config import SpinOptions
from .inference_mode import outside_inference_mode
from .storage.page_store import PageStore
from .storage.page_table import PageTable


class Phase(enum.Enum):
    """Where the present forward is; see the module's head."""

    IDLE = enum.auto()
    """Every layer holds `committed` tokens."""
    APPENDING = enum.auto()
    """Layers append and attend, one after the other."""
    PREPARED = enum.auto()
    """The host has done its part for all layers, which only launch."""
    FAILED = enum.auto()
    """The forward will not come to its end: it is rolled back before the cache is used."""


@dataclass(eq=False)
class LayerState:
    """What one paged layer holds.

    Attributes:
        layer_idx: its number in the model.
        number: its place among the paged layers.
        store: its pages and summaries; None before the first token.
        attended_tokens, attended_queries: what sparse queries of the reference attended to so far.
        clustered_pages: pages of the spans that are clustered_pages in this layer; fewer than there are where memory ran out
            under way.
        stale_pages: pages [first, stop) whose summaries are made anew before the next step; None for none.
        observation_queries: queries of the last tokens of a prompt [B, H, G, n, D], until the step behind it
            (`indexing/cluster.py`).
    """

    layer_idx: int
    number: int
    store: PageStore | None = None
    attended_tokens: int = 0
    attended_queries: int = 0
    clustered_pages: int = 0
    stale_pages: tuple[int, int] | None = None
    observation_queries: Tensor | None = None

    def invalidate(self, first: int, stop: int) -> None:
        """Pages [first, stop) have changed: their summaries are stale until the next step (`indexing/summarize.py`)."""
        held = self.stale_pages or (first, stop)
        self.stale_pages = min(first, held[0]), max(stop, held[1])

    def mark_summarized(self, first: int, stop: int) -> None:
        """Pages [first, stop) have been summarised."""
        if self.stale_pages is not None:
            start, end = self.stale_pages
            start, end = (max(start, stop) if first <= start else start), (min(end, first) if stop >= end else end)
            self.stale_pages = (start, end) if start < end else None


@dataclass(eq=False)
class CacheState:
    """What the paged layers of a cache have in common.

    Attributes:
        model_name: what to call the model in messages.
        served: the model or config that the cache was made with, by which a first batch is judged before it computes.
        layers: the paged layers.
        visible_length: tokens held, for code that Dynamo traces: advanced by `update`, never read by the custom op.
        captured_length: tokens held before the step, on the device, while a graph is captured; else None.
        committed: tokens that every layer holds.
        phase: of the present forward.
        pending: the cache layer that was updated and has not attended yet.
        noted: validity [B, Q] of the tokens that the latest padding mask was made for; None if it was no mask.
        unfinished: what has to be done before the cache is used, as an operation was interrupted (`transaction.py`).
    """

    options: SpinOptions
    method: Method
    sequences: PageTable
    model_name: str
    served: weakref.ref[Any] | None = None
    layers: list[LayerState] = field(default_factory=list)
    visible_length: Tensor = field(default_factory=outside_inference_mode(lambda: torch.zeros((), dtype=torch.int64)))
    captured_length: Tensor | None = None
    committed: int = 0
    phase: Phase = Phase.IDLE
    pending: Any = None
    noted: Tensor | None = None
    unfinished: Callable[[], None] | None = None
    warned_waves: bool = False
    warned_clustering: bool = False

    @property
    def prepared(self) -> bool:
        """Whether layers only launch."""
        return self.phase is Phase.PREPARED

    @property
    def failed(self) -> bool:
        """Whether the present forward has to be rolled back."""
        return self.phase is Phase.FAILED

    def settle(self) -> None:
        """Finish or undo an operation that was interrupted, if one was."""
        if self.unfinished is not None:
            self.unfinished()
            self.unfinished = None
