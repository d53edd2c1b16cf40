"""Rows of `SpinCache(model)` that hold a batch, or all that host memory takes: reserved at once, filled, then timed.

    reserve    page-locked pages, page frames and summaries for all tokens, in one go
    fill       random keys and values straight into the pages
    settle     the spread of the queries that replays a real model's overlap (`overlap.py`); kernels are compiled here
    time       `generate`: the step is captured, the buffer warmed, then tokens are timed (`timing.py`)

A batch that was filled serves smaller ones: the tokens that were generated are cropped, and the first sequences selected.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.record import RESULTS, Record
from benchmarks.common.shapes import fill_spin, reserve_spin
from benchmarks.common.timing import TIMES, attempt, free, with_memory
from benchmarks.speed.overlap import measure, set_spread
from benchmarks.speed.spin_rows import is_paged, replaying_spread, timed
from spin_hf import SpinCache

METHOD = "shadowkv"
"""Of these rows, and of the plans for them, unless they say otherwise."""
EXTRA = 768
"""Tokens that a row generates at most behind its context, eager steps included: planned for in host memory."""
GUESSES = RESULTS / "decode-llama-8b.json"
OVERLAP_STEPS = 5
"""Eager steps that the overlap of a row is measured over."""
_CLOSE = 0.015
"""Overlap is replayed up to this: 0.75 means 0.735 to 0.765."""


class Filled:
    """A cache that holds `num_tokens` of each of `batch` sequences.

    Args:
        method, options: of SpinCache.
        padding: [batch], how many of the tokens, in front, are padding; None for none.

    Attributes:
        reserve_s, fill_s: seconds that its memory, and its tokens, took.
    """

    def __init__(
        self, model: Any, num_tokens: int, batch: int, padding: Tensor | None = None, method: str = METHOD, **options: Any
    ) -> None:  # fmt: skip
        free()
        device = model.device.type
        self.model, self.num_tokens, self.batch, self.padding = model, num_tokens, batch, padding
        self.cache = SpinCache(model, method, dense_below=0, **options)
        started = _now()
        reserve_spin(self.cache, model.config, num_tokens, device, batch)
        self.reserve_s = _now() - started
        started = _now()
        fill_spin(self.cache, model.config, num_tokens, device, batch, padding)
        self.fill_s = _now() - started
        self.filled = batch

    def settle(self, guess: float) -> float:
        """Find and set the spread that replays a real model's overlap; the first steps compile kernels."""
        measure(self.model, self.cache, steps=2)
        spread = replaying_spread(self.model, self.cache, guess, _CLOSE)
        set_spread(self.model, spread)
        return spread

    def shrink(self, batch: int) -> None:
        """Back to `num_tokens` of the first `batch` sequences."""
        generated = self.cache.get_seq_length() - self.num_tokens
        if generated:
            self.cache.crop(-generated)
        if batch != self.batch:
            self.cache.batch_select_indices(torch.arange(batch))
            self.batch = batch
            self.padding = None if self.padding is None else self.padding[:batch]

    def row(self, weights: int, times: int = TIMES) -> dict[str, Any]:
        """Time, traffic and memory of a step.

        Args:
            weights: bytes of the model.
            times: the median of so many.
        """
        overlap = measure(self.model, self.cache, steps=OVERLAP_STEPS)[1]
        measured = attempt(lambda: with_memory(lambda: timed(self.model, self.cache, times, self.padding), weights))
        rate = {"tokens_per_s": round(self.batch / measured["tpot_ms"] * 1e3, 1)} if measured["tpot_ms"] else {}
        return {
            "batch": self.batch, "overlap": "replayed", "overlap_at_1": round(overlap, 4), **rate, **measured,
            "page_frames": page_frames(self.cache), "captured": captured_steps(self.cache), "filled_batch": self.filled,
            "reserve_s": round(self.reserve_s, 2), "fill_s": round(self.fill_s, 2),
        }  # fmt: skip


def page_frames(cache: SpinCache) -> int:
    """Page frames of each sequence and KV head in the layer that has fewest; 0 while all pages are in GPU memory."""
    if not is_paged(cache):
        return 0
    stores = [layer.store for layer in cache.paged_layers]
    return min(store.frames.num_slots for store in stores if store is not None and store.frames is not None)


def captured_steps(cache: SpinCache) -> int:
    """Steps that are replayed; 0 would mean that rows are of eager steps."""
    return 0 if cache.calls.steps is None else sum(step is not None for step in cache.calls.steps.captured.values())


def guess_spread(record: Record, tokens: int) -> float:
    """The spread that this context, or else the nearest one that `decode.py` has measured, was replayed with."""
    known = record.spread(tokens)
    if known is not None or not GUESSES.exists():
        return 0.2 if known is None else known
    rows = [row for row in json.loads(GUESSES.read_text())["rows"] if row.get("overlap") == "replayed"]
    return float(min(rows, key=lambda row: abs(row["tokens"] - tokens))["spread"])


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
