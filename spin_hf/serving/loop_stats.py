"""Counters of a loop, and the snapshot that `RequestLoop.stats()` returns."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from ..stats import table

_WINDOW_S = 10.0


@dataclass(frozen=True)
class LoopStats:
    """A snapshot of a loop. `print` shows it as a table.

    Attributes:
        waiting: requests in the queue, with those that are paused.
        reading: requests whose prompt is being read; at most 1.
        running: requests that decode.
        ended: finish reason -> requests.
        prompt_tokens: tokens of prompts that the model has read.
        reused_tokens: tokens of prompts that came from other requests or from a store.
        generated_tokens: tokens generated.
        tokens_per_second: generated within the last ten seconds of steps.
        steps: steps of the batch.
        mean_rows: requests per step.
        paused: how often a request was paused for others.
        gpu_bytes, cpu_bytes: pages and summaries of all caches on the GPU (in RAM without one), and pages in host memory,
            counted now and then. Pages that forks share count in each of them.
    """

    waiting: int
    reading: int
    running: int
    ended: Mapping[str, int]
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    tokens_per_second: float
    steps: int
    mean_rows: float
    paused: int
    gpu_bytes: int
    cpu_bytes: int

    def __str__(self) -> str:
        return table("RequestLoop", {item.name: getattr(self, item.name) for item in fields(self)})


@dataclass
class Counters:
    """What a scheduler counts."""

    read_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    rows: int = 0
    paused: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    _recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=4096))

    def stepped(self, rows: int, seconds: float) -> None:
        """Record a step of `rows` requests."""
        self.steps += 1
        self.rows += rows
        self._recent.append((time.perf_counter(), rows))

    def tokens_per_second(self) -> float:
        """Tokens of steps within the last seconds, per second; 0.0 if there were none."""
        now, recent = time.perf_counter(), list(self._recent)
        within = [(when, rows) for when, rows in recent if now - when < _WINDOW_S]
        if len(within) < 2:
            return 0.0
        return sum(rows for _, rows in within[1:]) / max(1e-9, now - within[0][0])
