"""An array of rows that grows without ever moving: the storage under pages and summaries.

    rows_per_chunk = 4          row 6 = chunk 1, row 2
    chunks   [ 0 1 2 3 ] [ 4 5 6 7 ] [ 8 ...
    addresses  (base address of each chunk, for kernels that read through a table)

A row never changes its address, so a captured graph or a reader of an old row stays valid while the array grows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import kernels


class ChunkedArray:
    """Rows of one shape and dtype, in chunks of equal size.

    Args:
        row_shape: shape of one row.
        rows_per_chunk: rows added at a time.
        device: where the chunks live.
    """

    def __init__(
        self, row_shape: tuple[int, ...], rows_per_chunk: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.row_shape = row_shape
        self.rows_per_chunk = rows_per_chunk
        self.dtype = dtype
        self.device = device
        self.chunks: list[Tensor] = []
        self.used_rows = 0

    @property
    def num_rows(self) -> int:
        """Rows that exist."""
        return len(self.chunks) * self.rows_per_chunk

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    def grow(self, num_rows: int) -> None:
        """Make rows [0, num_rows) exist. Their content is undefined; old rows stay where they are."""
        self.used_rows = max(self.used_rows, num_rows)
        while self.num_rows < num_rows:
            self.chunks.append(
                torch.empty((self.rows_per_chunk, *self.row_shape), dtype=self.dtype, device=self.device)
            )

    def take(self, rows: Tensor) -> Tensor:
        """A copy [*rows.shape, *row_shape] of rows (int64, any device), on the ids' device."""
        return kernels.take_rows(self.chunks, rows.to(self.device)).to(rows.device)

    def put(self, rows: Tensor, values: Tensor) -> None:
        """Write `values` [*rows.shape, *row_shape] to distinct rows."""
        kernels.put_rows(self.chunks, rows.to(self.device), values.to(self.device, self.dtype))

    def move(self, device: torch.device) -> None:
        """Take all chunks to another device (nothing is copied where it is the same one)."""
        self.chunks = [chunk.to(device) for chunk in self.chunks]
        self.device = device

    def __deepcopy__(self, memo: dict[int, object]) -> ChunkedArray:
        """A copy of the rows in use; the rest of the last chunk is not touched (and so takes no memory on a CPU)."""
        twin = ChunkedArray(self.row_shape, self.rows_per_chunk, self.dtype, self.device)
        twin.grow(self.used_rows)
        for index, (source, copy) in enumerate(zip(self.chunks, twin.chunks, strict=False)):
            inside = min(self.rows_per_chunk, self.used_rows - index * self.rows_per_chunk)
            copy[:inside] = source[:inside]
        return twin
