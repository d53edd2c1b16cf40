"""A progress bar while a long prompt is read. `transformers.utils.logging.disable_progress_bar()` turns it off."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers.utils import logging

from .compile_bar import DELAY_S, is_watched


class PromptBar:
    """Shows how many tokens of a prompt have been read, once reading has taken `DELAY_S` seconds.

    Args:
        num_tokens: of the prompt.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens, self.began = num_tokens, time.monotonic()
        self.shows = logging.is_progress_bar_enabled() and is_watched()
        self._bar: Any = None
        self._last: tuple[int, Any] = (0, None)
        """Tokens of the last chunk and those before it, and an event behind it on a GPU."""

    def __enter__(self) -> PromptBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, num_tokens: int) -> None:
        """Record that the forwards of the first `num_tokens` tokens have been called, and update the bar.

        On a GPU they may still be queued. The host waits for the chunk before the last one: the bar shows finished chunks, and
        one chunk stays queued.
        """
        if not self.shows:
            return
        event = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if event is not None:
            event.record()
        (read, before), self._last = self._last, (num_tokens, event)
        if before is not None:
            before.synchronize()
        elif event is None:
            read = num_tokens
        if self._bar is None and time.monotonic() - self.began > DELAY_S and num_tokens < self.num_tokens:
            self._bar = logging.tqdm(total=self.num_tokens, desc="Reading the prompt", unit=" tokens")
        if self._bar is not None:
            self._bar.update(read - self._bar.n)
