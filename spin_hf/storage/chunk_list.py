"""The chunks of an array, as views of slabs: a slab is one allocation of adjacent chunks.

    slabs    [ 0 | 1 | 2 | 3 ]   [ 4 | 5 ]        tensors [chunks, rows, *row_shape]
    chunks     0   1   2   3       4   5          views [rows, *row_shape], made on access

A long context has thousands of chunks in each layer and a few slabs. So views are not kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class ChunkList(Sequence[Tensor]):
    """Chunks of one shape and dtype.

    Args:
        slabs: [n, rows, *row_shape] each, n >= 1, with contiguous chunks.
    """

    def __init__(self, slabs: list[Tensor] | None = None) -> None:
        self.slabs = [] if slabs is None else slabs
        self._stops: list[int] = []
        """The number of the first chunk behind each slab."""
        stop = 0
        for slab in self.slabs:
            stop += slab.shape[0]
            self._stops.append(stop)

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        index = range(len(self))[index]  # raises IndexError
        number = bisect_right(self._stops, index)
        return self.slabs[number][index - self._stops[number]]

    def __iter__(self) -> Iterator[Tensor]:
        for slab in self.slabs:
            yield from slab

    def first(self, count: int) -> ChunkList:
        """The first `count` chunks. A slab that is cut stays allocated."""
        kept = []
        for slab, stop in zip(self.slabs, self._stops, strict=True):
            start = stop - len(slab)
            if start < count:
                kept.append(slab[: count - start])
        return ChunkList(kept)

    def extended(self, slabs: list[Tensor]) -> ChunkList:
        """These chunks, and those of further slabs."""
        return ChunkList(self.slabs + slabs)

    def rows(self, first: int, stop: int) -> Iterator[Tensor]:
        """Rows [first, stop), as a view of each slab that they lie in. The slabs' chunks are adjacent."""
        if not self.slabs:
            return
        each = self.slabs[0].shape[1]
        number = bisect_right(self._stops, first // each)
        while first < stop:
            slab = self.slabs[number]
            begin = (self._stops[number] - len(slab)) * each
            rows = slab.view(-1, *slab.shape[2:])[first - begin : stop - begin]
            yield rows
            first, number = first + len(rows), number + 1

    def addresses(self) -> Tensor:
        """Address of each chunk: int64, on the CPU."""
        each = []
        for slab in self.slabs:
            first, step = _first_and_step(slab)
            each.append(torch.arange(first, first + slab.shape[0] * step, step))
        if len(each) == 1:
            return each[0]
        return torch.cat(each) if each else torch.empty(0, dtype=torch.int64)


def addresses_of(lists: Sequence[ChunkList]) -> Tensor:
    """Address of each chunk of several lists: [lists, most chunks], int64, on the CPU; 0 behind the last chunk of a list."""
    counts = {len(each) for each in lists}
    if len(counts) == 1 and all(len(each.slabs) == 1 for each in lists):  # of a short prompt: few operations
        first, step = torch.tensor([_first_and_step(each.slabs[0]) for each in lists]).unsqueeze(-1).unbind(1)
        return first + step * torch.arange(counts.pop())
    return torch.nn.utils.rnn.pad_sequence([each.addresses() for each in lists], batch_first=True)


def _first_and_step(slab: Tensor) -> tuple[int, int]:
    """Address of the first chunk of a slab, and bytes from one to the next."""
    return slab.data_ptr(), slab.element_size() * slab.stride(0)
