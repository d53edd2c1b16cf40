"""Whether two sparse runs diverge at a tie: a selection that depends on the order of summation.

    layer 0: query, pages, estimate     layer 1: ...        of the forward under test, and of the reference's

A selection is a function of its query and of summaries. Where the queries agree to the last digits and the summaries fit their
pages (`SpinCache.check_integrity`), another selection, or another rounding of a summary, is a tie. Anything else is a fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import spin_hf.backends.reference
from spin_hf.attention.methods.base import Estimate
from tests.support.compare import difference

SAME_QUERY = 2e-5
"""Relative to the largest number: how far reading pages in waves may change a query."""


@dataclass(frozen=True)
class Choice:
    """Of one query: its states, the pages it reads, and the estimate of the rest."""

    query: Tensor
    pages: Tensor
    rest: Estimate | None

    def is_like(self, other: Choice) -> bool:
        """Whether the same pages are read, and the estimates of the rest agree."""
        if not torch.equal(_in_order(self.pages), _in_order(other.pages)):
            return False
        if self.rest is None or other.rest is None:
            return self.rest is other.rest
        pairs = [(getattr(self.rest, name), getattr(other.rest, name)) for name in ("keys", "values", "log_tokens")]
        return all(mine.shape == theirs.shape and difference(mine, theirs) <= SAME_QUERY for mine, theirs in pairs)


class Choices:
    """Selections of the last forward, or `generate`, of each side."""

    def __init__(self) -> None:
        self.made: dict[str, list[Choice]] = {"ours": [], "theirs": []}

    @contextmanager
    def of(self, side: str) -> Iterator[None]:
        """Record the selections of this block; earlier ones are dropped."""
        made = self.made[side] = []
        estimate = spin_hf.backends.reference.estimate_rest

        def noting(call: Any, position: int, layer: Any, plan: Any, method: Any, pages: Tensor) -> Any:
            rest = estimate(call, position, layer, plan, method, pages)
            made.append(Choice(call.query.float(), pages, rest))
            return rest

        with patch.object(spin_hf.backends.reference, "estimate_rest", noting):
            yield

    def part_at_a_tie(self) -> bool:
        """Whether the first selection that differs was made for the same query."""
        for mine, theirs in zip(self.made["ours"], self.made["theirs"], strict=False):
            if mine.query.shape != theirs.query.shape or difference(mine.query, theirs.query) > SAME_QUERY:
                return False
            if not mine.is_like(theirs):
                return True
        return False


def _in_order(pages: Tensor) -> Tensor:
    return pages.sort(2).values
