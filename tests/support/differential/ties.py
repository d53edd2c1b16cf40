"""Whether two sparse runs part at a tie: a choice between candidates that floats of another order of summation decide.

    layer 0: query, pages, estimate     layer 1: ...        of the forward under test, and of the reference's

A choice is a function of its query and of summaries. Where the queries agree to the last digits and the summaries are what
their pages give (`SpinCache.check_integrity`), another choice, or another rounding of a summary, is a tie; anything else is a
fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import spin_hf.layer
from spin_hf.attention.methods.base import Estimate
from tests.support.compare import difference

SAME_QUERY = 2e-5
"""Of the largest: what waves of pages and their merging change of a query."""


@dataclass(frozen=True)
class Choice:
    """One query's: its states, the pages it reads, and what stands for the rest."""

    query: Tensor
    pages: Tensor
    rest: Estimate | None

    def is_like(self, other: Choice) -> bool:
        """Whether the same pages are read, and the same stands for the rest."""
        if not torch.equal(_in_order(self.pages), _in_order(other.pages)):
            return False
        if self.rest is None or other.rest is None:
            return self.rest is other.rest
        pairs = [(getattr(self.rest, name), getattr(other.rest, name)) for name in ("keys", "values", "log_tokens")]
        return all(mine.shape == theirs.shape and difference(mine, theirs) <= SAME_QUERY for mine, theirs in pairs)


class Choices:
    """Those of the last forward, or `generate`, of each side."""

    def __init__(self) -> None:
        self.made: dict[str, list[Choice]] = {"ours": [], "theirs": []}

    @contextmanager
    def of(self, side: str) -> Iterator[None]:
        """Note what is chosen in this block, of which there was nothing before."""
        made = self.made[side] = []
        estimate = spin_hf.layer.estimate_rest

        def noting(call: Any, position: int, store: Any, plan: Any, method: Any, layer: int, pages: Tensor) -> Any:
            rest = estimate(call, position, store, plan, method, layer, pages)
            made.append(Choice(call.query.float(), pages, rest))
            return rest

        with patch.object(spin_hf.layer, "estimate_rest", noting):
            yield

    def part_at_a_tie(self) -> bool:
        """Whether the first choice that differs was made for the same query."""
        for mine, theirs in zip(self.made["ours"], self.made["theirs"], strict=False):
            if mine.query.shape != theirs.query.shape or difference(mine.query, theirs.query) > SAME_QUERY:
                return False
            if not mine.is_like(theirs):
                return True
        return False


def _in_order(pages: Tensor) -> Tensor:
    return pages.sort(2).values
