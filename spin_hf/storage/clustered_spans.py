"""Which pages of a batch were clustered: their tokens stand in an order that a method chose.

    pages     [  span 0  |  span 1  ][        runs of positions        ]      stops  [14, 28]
    grouped     . x x x x x x x x . . x x x                                         [B, 28], a row per sequence
                . left as they were: sinks, padding, the recent window of that sequence

Tokens trade places inside a span only, so the past behind it is never touched. A grouped page is full, without padding,
and before every query to come: masks by position or padding are the same for all its tokens. What would end that (a crop,
padding that changes) puts the span's tokens back in order first, and all spans behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels

Plan = tuple[int, int, list[list[int]]]
"""For how many tokens, behind how many pages, and where the spans end that are made at a time."""


class ClusteredSpans:
    """ClusteredSpans of a batch, from the first page on without gaps; which of their pages are grouped, by sequence."""

    def __init__(self) -> None:
        self.stops: list[int] = []
        """The page behind each span, ascending."""
        self.grouped = torch.zeros((0, 0), dtype=torch.bool)
        """[B, num_pages], on the CPU."""
        self.planned: Plan | None = None
        """What comes next, where clustering was interrupted."""

    @property
    def num_pages(self) -> int:
        """Pages in spans; those from there on are runs of positions."""
        return self.stops[-1] if self.stops else 0

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First page and the page behind, of each span."""
        return list(zip([0, *self.stops], self.stops, strict=False))

    def around(self, first: int, stop: int) -> tuple[int, int]:
        """Pages [first, stop) and the spans that they lie in: no partition of any sequence crosses these borders."""
        touched = [bounds for bounds in self.bounds if bounds[0] < stop and bounds[1] > first and first < stop]
        return min([first, *(start for start, _ in touched)]), max([stop, *(end for _, end in touched)])

    def copy(self) -> ClusteredSpans:
        """The same, to be changed by itself."""
        made = ClusteredSpans()
        made.stops, made.grouped = list(self.stops), self.grouped
        return made

    def append(self, stop: int, grouped: Tensor) -> None:
        """A span up to page `stop`, of which the pages `grouped` [B, stop - num_pages] are clustered."""
        before = self.grouped if self.stops else grouped.new_zeros((grouped.shape[0], 0))
        self.grouped = torch.cat([before, grouped], 1)
        self.stops.append(stop)

    def without_last(self) -> ClusteredSpans:
        """The same without the last span, whose pages are runs again."""
        made = ClusteredSpans()
        made.stops = self.stops[:-1]
        made.grouped = self.grouped[:, : made.num_pages]
        return made

    def selected(self, rows: Tensor) -> ClusteredSpans:
        """The spans of sequences of which number i is number `rows[i]` of these."""
        made = self.copy()
        if self.stops:
            made.grouped = self.grouped.index_select(0, rows.to(self.grouped.device))
        return made


def pages_that_may_move(
    valid: Tensor | None, batch_size: int, length: int, page_size: int, num_sink_tokens: int, window: int
) -> Tensor:
    """Pages that are full, free of padding, no sinks, and not among the last `window` valid tokens.

    Args:
        valid: [batch_size, >= length], bool, False for padding; None for none.
        length: tokens held.
    Returns:
        [batch_size, length // page_size], bool, on the CPU.
    """
    num_pages = -(-length // page_size)
    tokens = torch.zeros((batch_size, num_pages * page_size), dtype=torch.bool)
    tokens[:, :length] = True if valid is None else valid[:, :length].cpu()
    per_page = tokens.view(batch_size, num_pages, page_size).sum(2)
    _, others = kernels.page_zones(per_page, num_sink_tokens, window)
    return (others & (per_page == page_size))[:, : length // page_size]
