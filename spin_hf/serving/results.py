"""What a request gave: tokens, why they ended, and when each came."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FINISH_REASONS = ("stop", "length", "cancelled", "error")


@dataclass
class RequestTimes:
    """Seconds since the request was submitted.

    Attributes:
        submitted: time of day, as `time.time()`.
        started: when its prompt began to be read; None before. Until then it was queued.
        tokens: when each generated token was known to the host.
        ended: when it ended; None before.
    """

    submitted: float
    started: float | None = None
    tokens: list[float] = field(default_factory=list)
    ended: float | None = None

    @property
    def queued(self) -> float | None:
        """Seconds in the queue; None if the prompt was never begun."""
        return self.started

    @property
    def first_token(self) -> float | None:
        """Time to first token in seconds; None without tokens."""
        return self.tokens[0] if self.tokens else None

    @property
    def per_token(self) -> float | None:
        """Mean seconds between two tokens; None with fewer than two."""
        return (self.tokens[-1] - self.tokens[0]) / (len(self.tokens) - 1) if len(self.tokens) > 1 else None


@dataclass(frozen=True)
class RequestResult:
    """The outcome of a request.

    Attributes:
        prompt: ids of the prompt.
        tokens: ids of the generated tokens, with the one that ended the text.
        finish_reason: "stop" (an end token, a stop string, or a stopping criterion of the user), "length" (`max_length`,
            `max_new_tokens` or `max_time`), "cancelled", or "error".
        error: the exception of a request that failed; else None.
        times: when the request started and each token came.
        reused_tokens: tokens of the prompt that were not read, as they came from another request or from a store.
        tokenizer: of the loop; None for none.
    """

    prompt: list[int]
    tokens: list[int]
    finish_reason: str
    error: Exception | None
    times: RequestTimes
    reused_tokens: int = 0
    tokenizer: Any = field(default=None, repr=False, compare=False)

    @property
    def text(self) -> str | None:
        """The generated tokens as text, without special tokens; None without a tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.decode(self.tokens, skip_special_tokens=True)

    @property
    def sequences(self) -> Tensor:
        """[1, prompt and generated tokens], int64, as `generate` returns them."""
        return torch.tensor([self.prompt + self.tokens])
