"""A progress bar over requests. `transformers.utils.logging.disable_progress_bar()` turns it off."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

from ..integration.compile_bar import is_watched
from ..stats import size
from .loop_stats import LoopStats


class RequestBar:
    """Shows requests done, tokens per second, requests that wait, and memory.

    Args:
        num_requests: of the bar.
        wanted: whether the user wants one. It is only shown on a terminal or in a notebook.
    """

    def __init__(self, num_requests: int, wanted: bool) -> None:
        self._bar: Any = None
        if wanted and logging.is_progress_bar_enabled() and is_watched():
            self._bar = logging.tqdm(total=num_requests, desc="Generating", unit=" requests")

    def __enter__(self) -> RequestBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, stats: LoopStats) -> None:
        """Show the state of the loop."""
        if self._bar is None:
            return
        self._bar.update(sum(stats.ended.values()) - self._bar.n)
        self._bar.set_postfix_str(
            f"{stats.tokens_per_second:,.0f} tokens/s, {stats.running} running, {stats.waiting} waiting, "
            f"GPU {size(stats.gpu_bytes)}, host {size(stats.cpu_bytes)}"
        )
