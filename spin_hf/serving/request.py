"""A request inside a loop.

    queued ──> reading ──> running ──> ended        reading and running requests hold a cache
                 ^            │
                 └─ waiting <─┘  paused: its pages stay in its cache

Only the loop's thread changes a request, but for `cancelled`.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from typing import Any

from ..cache import SpinCache
from .handle import RequestHandle
from .results import RequestResult, RequestTimes
from .sampling import Choice

_AHEAD_TOKENS = 1024
"""Generated tokens that memory is planned for ahead. What grows beyond that takes frames from others, or waits."""


@dataclass(eq=False)
class Request:
    """One request.

    Attributes:
        number: in its loop, counted from 0.
        prompt: ids, of type "q".
        choice: how it chooses tokens and when it ends.
        tokenizer: for the text of the result; None for none.
        handle: what the user holds.
        tokens: generated so far. The last one is not in the cache yet.
        cache: while it holds memory; None before its prompt is read, or if it must be read again.
        row: in the batch; None outside.
        waiting_since, joined_at: `time.perf_counter()` when it began to wait, and when it last joined the batch.
        reused_tokens: tokens of its prompt that were not read.
        has_stepped: whether it has taken a step.
        cancelled: whether the user wants it to end. Any thread may set it.
    """

    number: int
    prompt: array[int]
    choice: Choice
    tokenizer: Any
    handle: RequestHandle
    times: RequestTimes
    tokens: list[int] = field(default_factory=list)
    cache: SpinCache | None = None
    row: int | None = None
    submitted: float = field(default_factory=time.perf_counter)
    waiting_since: float = field(default_factory=time.perf_counter)
    joined_at: float = 0.0
    reused_tokens: int = 0
    has_stepped: bool = False
    cancelled: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens with those generated."""
        return len(self.prompt) + len(self.tokens)

    @property
    def most_tokens(self) -> int:
        """Tokens that it has at most."""
        return max(self.choice.generation.max_length, self.num_tokens)

    @property
    def planned_tokens(self) -> int:
        """Tokens that memory is planned for now."""
        return min(self.most_tokens, self.num_tokens + _AHEAD_TOKENS)

    @property
    def ids_to_hold(self) -> array[int]:
        """What its cache holds before the next step: all tokens but the last generated one."""
        return self.prompt + array("q", self.tokens[:-1]) if self.tokens else self.prompt

    def start(self) -> None:
        """Note that its prompt is about to be read, for the first time."""
        if self.times.started is None:
            self.times.started = time.perf_counter() - self.submitted

    def add(self, token: int) -> None:
        """Append a generated token and tell the handle."""
        self.tokens.append(token)
        self.times.tokens.append(time.perf_counter() - self.submitted)
        self.handle.add(token)

    def end(self, reason: str, error: Exception | None = None) -> None:
        """Give the handle its result."""
        self.cache = None
        self.times.ended = time.perf_counter() - self.submitted
        result = RequestResult(
            self.prompt.tolist(), self.tokens, reason, error, self.times, self.reused_tokens, self.tokenizer
        )
        self.handle.end(result)
