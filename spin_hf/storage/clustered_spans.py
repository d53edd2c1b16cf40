"""Spans: which pages of a batch are clustered, i.e. hold their tokens in an order that a method chose.

    pages      [  span 0  |  span 1  ][     tokens in position order     ]      stops  [14, 28]
    clustered    . x x x x x x x x . . x x x                                           [B, 28], a row per sequence
                 . not clustered: sinks, padding, the recent window of that sequence

Tokens are permuted within one span only. A clustered page is full, has no padding and lies before every later query, so a
causal or padding mask has one value for the whole page. A crop or a change of padding that would break this first restores
position order in the spans that it touches and in all later spans.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import kernels

Plan = tuple[int, int, list[list[int]]]
"""Tokens held, first page, and batches of spans to cluster together, each span given by the page behind it."""


@dataclass(eq=False)
class ClusteredSpans:
    """Spans of a batch, contiguous from page 0, and the clustered pages of each sequence.

    Attributes:
        stops: the page behind each span, ascending.
        clustered: [B, num_pages], bool, on the CPU.
        planned: spans still to be clustered; None unless clustering is under way or was interrupted.
    """

    stops: list[int] = field(default_factory=list)
    clustered: Tensor = field(default_factory=lambda: torch.zeros((0, 0), dtype=torch.bool))
    planned: Plan | None = None

    @property
    def num_pages(self) -> int:
        """Pages in spans. Later pages hold their tokens in position order."""
        return self.stops[-1] if self.stops else 0

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """[first, stop) pages of each span."""
        return list(zip([0, *self.stops], self.stops, strict=False))

    def page_bounds(self) -> tuple[Tensor, Tensor]:
        """First page of each page's span, and the page behind that span: [num_pages] each, int64, on the CPU."""
        begins, ends = torch.tensor(self.bounds, dtype=torch.int64).view(-1, 2).unbind(1)
        return begins.repeat_interleave(ends - begins), ends.repeat_interleave(ends - begins)

    def around(self, first: int, stop: int) -> tuple[int, int]:
        """Pages [first, stop), extended to whole spans. No cluster crosses the returned bounds."""
        touched = [bounds for bounds in self.bounds if bounds[0] < stop and bounds[1] > first and first < stop]
        return min([first, *(start for start, _ in touched)]), max([stop, *(end for _, end in touched)])

    def copy(self) -> ClusteredSpans:
        """An independent copy, without `planned`."""
        return ClusteredSpans(list(self.stops), self.clustered)

    def append(self, stop: int, clustered: Tensor) -> None:
        """Append a span up to page `stop`; `clustered` [B, stop - num_pages], bool, marks its clustered pages."""
        before = self.clustered if self.stops else clustered.new_zeros((clustered.shape[0], 0))
        self.clustered = torch.cat([before, clustered], 1)
        self.stops.append(stop)

    def without_last(self) -> ClusteredSpans:
        """A copy without the last span."""
        stops = self.stops[:-1]
        return ClusteredSpans(stops, self.clustered[:, : stops[-1] if stops else 0])

    def selected(self, rows: Tensor) -> ClusteredSpans:
        """A copy in which sequence i is sequence rows[i] of this batch."""
        clustered = self.clustered.index_select(0, rows.to(self.clustered.device)) if self.stops else self.clustered
        return ClusteredSpans(list(self.stops), clustered)


def pages_that_may_move(
    valid: Tensor | None, batch_size: int, length: int, page_size: int, num_sink_tokens: int, window: int
) -> Tensor:
    """Pages that may be clustered: full, without padding, outside the sinks and outside the last `window` valid tokens.

    Args:
        valid: [batch_size, >= length], bool, False for padding; None for none.
        length: tokens held.
    Returns:
        [batch_size, length // page_size], bool, on the CPU.
    """
    if valid is None:
        may_move = torch.zeros((batch_size, length // page_size), dtype=torch.bool)
        may_move[:, -(-num_sink_tokens // page_size) : max(0, length - window) // page_size] = True
        return may_move
    num_pages = -(-length // page_size)
    tokens = torch.zeros((batch_size, num_pages * page_size), dtype=torch.bool)
    tokens[:, :length] = valid[:, :length].cpu()
    per_page = tokens.view(batch_size, num_pages, page_size).sum(2)
    _, others = kernels.page_zones(per_page, num_sink_tokens, window)
    return (others & (per_page == page_size))[:, : length // page_size]
