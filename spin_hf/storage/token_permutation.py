"""Token permutation of one layer: which token is at each place of the clustered pages, and which pages form a cluster.

    row of a page   ->  shifts     [P], int16    token - place, for each place; 0 in position order
                    ->  partition  [], int16     pages of the cluster that begins at this page, 0 if it continues a cluster;
                                                 not stored if every cluster is one page

    page 5          places 40 41 .. 47      shifts 56 0 .. 30      so it holds tokens 96 41 .. 77

A place is an index into the tokens in page order. Shifts are int16, which limits a span to `longest_span` tokens. Row ids are
those of the pages and summaries, so sharing or copying a segment covers this too. Only rows of pages in spans
(`clustered_spans.py`) are read. All other pages are in position order, each a cluster of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import require_integrity
from .chunked_array import ChunkedArray
from .copied import copied
from .page_table import PageTable


class TokenPermutation:
    """Shifts and cluster sizes of one layer.

    Args:
        sequences: page table of the batch.
        num_heads, rows_per_chunk, device: as for the pages.
        multi_page_clusters: whether a cluster may have several pages.
    """

    def __init__(
        self, sequences: PageTable, num_heads: int, rows_per_chunk: int, device: torch.device, multi_page_clusters: bool
    ) -> None:
        self.sequences, self.num_heads, self.device = sequences, num_heads, device
        self.page_size = sequences.page_size
        self._shifts = ChunkedArray((self.page_size,), rows_per_chunk, torch.int16, device)
        self._partition = ChunkedArray((), rows_per_chunk, torch.int16, device) if multi_page_clusters else None

    def new_empty(self) -> TokenPermutation:
        """An empty one of the same sizes, of the same sequences."""
        twin = copied(self, {})
        twin._shifts = self._shifts.new_empty()
        twin._partition = None if self._partition is None else self._partition.new_empty()
        return twin

    @property
    def arrays(self) -> list[ChunkedArray]:
        """The arrays behind it: shifts, and cluster sizes if clusters may have several pages."""
        return [self._shifts] if self._partition is None else [self._shifts, self._partition]

    def metadata(self, num_rows: int) -> dict[str, int]:
        """Bytes of `num_rows` rows, by name."""
        each = bytes_for_clustering(self.page_size, self._partition is not None)
        return {name: num_rows * row_bytes for name, row_bytes in each.items()}

    def positions(self, first: int, stop: int) -> Tensor:
        """Token at each place of pages [first, stop): [B, H, n, P], int64."""
        shifts = self._shifts.take(self._rows(first, stop))
        tokens = self._runs(first, stop).contiguous()
        tokens[:, :, : shifts.shape[2]] += shifts
        return tokens

    def pages_per_cluster(self, first: int, stop: int) -> Tensor:
        """Size in pages of the cluster that begins at each of pages [first, stop), 0 for none: [B, H, n], int64."""
        if self._partition is None:
            shape = self.sequences.batch_size, self.num_heads, stop - first
            return torch.ones(shape, dtype=torch.int64, device=self.device)
        held = self._partition.take(self._rows(first, stop)).long()
        return torch.cat([held, held.new_ones((*held.shape[:2], stop - first - held.shape[2]))], 2)

    def in_order(self, states: Tensor) -> Tensor:
        """Reorder states [B, H, tokens, D] of all tokens from page order to position order."""
        places = self._places()
        moved = states[:, :, : places.shape[2]]
        ordered = torch.empty_like(moved).scatter_(2, places.unsqueeze(-1).expand_as(moved), moved)
        return torch.cat([ordered, states[:, :, places.shape[2] :]], 2)

    def by_place(self, mask: Tensor, group: int) -> Tensor:
        """Reorder a mask from position order to page order, which differs between KV heads.

        Args:
            mask: [B, 1 or H * group, Q, tokens].
            group: query heads per KV head.
        Returns:
            [B, H * group, Q, tokens].
        """
        places = self._places()
        batch_size, num_heads, count = places.shape
        mask = mask.expand(batch_size, num_heads * group, -1, -1).unflatten(1, (num_heads, group))
        index = places[:, :, None, None].expand(-1, -1, group, mask.shape[3], -1)
        return torch.cat([mask[..., :count].gather(-1, index), mask[..., count:]], -1).flatten(1, 2)

    def stays_in_spans(self) -> Tensor:
        """Whether each token lies in the span of its place, and clusters tile each span: [], bool, on the device."""
        spans, size = self.sequences.spans, self.page_size
        begins, ends = (table.to(self.device, non_blocking=True)[:, None] * size for table in spans.page_bounds())
        tokens = self.positions(0, spans.num_pages)
        inside = ((tokens >= begins) & (tokens < ends)).all()
        if self._partition is not None:
            for first, stop in spans.bounds:
                pages = self.pages_per_cluster(first, stop)
                inside &= (pages >= 0).all() & tiles(pages)
        return inside

    def check_integrity(self) -> None:
        """Raise CacheStateError if a span does not hold exactly its tokens, or its clusters do not tile it."""
        for first, stop in self.sequences.spans.bounds:
            positions, pages = self.positions(first, stop), self.pages_per_cluster(first, stop)
            runs = self._runs(first, stop)
            require_integrity(torch.equal(positions.flatten(2).sort(2).values, runs.flatten(2)), "a span lost tokens")
            clustered = self.sequences.spans.clustered[:, None, first:stop].to(positions.device)
            moved = (positions != runs).any(3) | (pages != 1)
            require_integrity(not bool((moved & ~clustered).any()), "a page was clustered that must stay as it is")
            require_integrity(bool(tiles(pages)), "clusters of a span overlap or leave pages out")

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenPermutation:
        return copied(self, memo, "sequences", "_shifts", "_partition")

    def _places(self) -> Tensor:
        """Token at each place of the spans: [B, H, pages * P], int64."""
        return self.positions(0, self.sequences.spans.num_pages).flatten(2)

    def _rows(self, first: int, stop: int) -> Tensor:
        """Rows of pages [first, stop), cut to those in spans."""
        rows = self.sequences.page_rows(self.num_heads, self.device)
        return rows[:, :, first : max(first, min(stop, self.sequences.spans.num_pages))]

    def _runs(self, first: int, stop: int) -> Tensor:
        tokens = torch.arange(first * self.page_size, stop * self.page_size, device=self.device)
        return tokens.view(-1, self.page_size).expand(self.sequences.batch_size, self.num_heads, -1, -1)


def tiles(pages_per_cluster: Tensor) -> Tensor:
    """Whether clusters cover n pages without gap or overlap: [], bool, on the device.

    Args:
        pages_per_cluster: [B, H, n], pages of the cluster that begins at each page, 0 for none.
    """
    places = torch.arange(pages_per_cluster.shape[2], device=pages_per_cluster.device)
    behind = torch.where(pages_per_cluster > 0, places + pages_per_cluster, 0)
    upto = behind.cummax(2).values  # the page behind the last cluster so far
    before = torch.nn.functional.pad(upto[:, :, :-1], (1, 0))
    begins = (pages_per_cluster > 0) == (before == places)
    return begins.all() & (upto[:, :, -1] == places.numel()).all()


def is_permutation(order: Tensor) -> Tensor:
    """Whether each row of an order [..., n] has all of 0 to n - 1: [], bool, on the device."""
    count = order.shape[-1]
    found = torch.zeros((*order.shape[:-1], count + 2), dtype=torch.bool, device=order.device)
    found.scatter_(-1, order.clamp(-1, count) + 1, True)  # other numbers are found apart, before and behind
    return found[..., 1:-1].all()


def longest_span(page_size: int) -> int:
    """Most tokens of a span, as shifts and cluster sizes are int16."""
    most = torch.iinfo(torch.int16).max
    return min(most + 1, most * page_size)


def bytes_for_clustering(page_size: int, multi_page_clusters: bool) -> dict[str, int]:
    """Bytes per page of shifts and, with multi-page clusters, of the cluster size, by their names in `stats()`."""
    return {"clustered shifts": 2 * page_size, **({"clustered partitions": 2} if multi_page_clusters else {})}
