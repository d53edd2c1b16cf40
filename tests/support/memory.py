"""Runs with the smallest `gpu_memory` that they accept: pages are then evicted and loaded at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from spin_hf import BudgetError

Result = TypeVar("Result")

SMALL_ZONES: dict[str, Any] = dict(num_sink_tokens=4, recent_window=8)
"""Options with which a step needs few pages, so that a context of 60 tokens does not fit a tight cap."""

_MOST_TRIES = 30


def with_tight_gpu_memory(run: Callable[[int], Result]) -> Result:
    """`run(cap)` with the smallest cap that it accepts.

    The error for a cap that is too small names the bytes that are needed. The run is then started again with these; where the
    batch grows, more than once.
    """
    cap = 1
    for _ in range(_MOST_TRIES):
        try:
            return run(cap)
        except BudgetError as error:
            refusal, needed = str(error), error.needed_bytes or 0
        if needed <= cap:
            raise AssertionError(f"cap {cap} is refused, and {needed} asked for: {refusal}")
        cap = needed
    raise AssertionError(f"gpu_memory={cap} is still refused after {_MOST_TRIES} tries")
