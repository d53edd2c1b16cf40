"""How much of a prompt may be read between two steps.

    time per token of a running sequence  =  a step  +  what is read between two steps  <=  max_slowdown * a step

What steps leave unused adds up, as a forward over few tokens takes a GPU as long as one over many: several steps may run
between two chunks. Times are measured.
"""

from __future__ import annotations

import statistics
from collections import deque

_SMOOTHING = 0.2
"""Weight of the newest step in the mean."""
_STEADY = 15
"""Steps whose median is taken."""


class Pace:
    """Credit for reading prompts, in seconds.

    Args:
        max_slowdown: most that a running sequence's time per token may grow, as a factor; None for no bound.
        least_tokens: fewest tokens of a chunk while sequences run.
    """

    def __init__(self, max_slowdown: float | None, least_tokens: int) -> None:
        self.max_slowdown, self.least_tokens = max_slowdown, least_tokens
        self.step_s: float | None = None
        """Mean seconds of a step."""
        self._steady: deque[float] = deque(maxlen=_STEADY)
        self.token_s: float | None = None
        """Seconds per token of the last chunk."""
        self._credit_s = 0.0

    @property
    def steady_s(self) -> float:
        """Median seconds of the last steps in which every request had taken one before; 0 if there was none."""
        return statistics.median(self._steady) if self._steady else 0.0

    def stepped(self, seconds: float, steady: bool) -> None:
        """Record a step.

        Args:
            steady: whether all of its requests had taken one before. The first step behind a prompt clusters its tokens.
        """
        if steady:
            self._steady.append(seconds)
        self.step_s = seconds if self.step_s is None else self.step_s + _SMOOTHING * (seconds - self.step_s)
        if self.max_slowdown is not None:
            self._credit_s = min(self._credit_s + self._allowance(), self._most())

    def read(self, num_tokens: int, seconds: float, beside_steps: bool) -> None:
        """Record a chunk, and whether sequences were running."""
        self.token_s = seconds / num_tokens
        if beside_steps:
            self._credit_s -= seconds

    def tokens(self, most: int, running: bool) -> int:
        """Tokens to read before the next step; 0 for none yet.

        Args:
            most: of one chunk.
            running: whether sequences wait for that step.
        """
        if not running or self.max_slowdown is None:
            return most
        if self.token_s is None:  # nothing measured: a short chunk, once a step has been
            return min(most, self.least_tokens) if self.step_s is not None and self._credit_s > 0 else 0
        affordable = int(self._credit_s / self.token_s)
        return min(most, affordable) if affordable >= min(most, self.least_tokens) else 0

    def _allowance(self) -> float:
        """Seconds of reading that a step allows."""
        assert self.max_slowdown is not None
        assert self.step_s is not None
        return (self.max_slowdown - 1) * self.step_s

    def _most(self) -> float:
        """Credit that may add up: a shortest chunk, or what one step allows if that is more."""
        return max(self._allowance(), 1.01 * self.least_tokens * (self.token_s or 0.0))
