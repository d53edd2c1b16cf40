"""Pages of a layer where they are, for kernels that read a prompt's earlier tokens without a gathered copy of the pages.

table    address of each chunk                      rows     row of each page, for each KV head of each sequence
page     [ P * Dk keys | P * Dv values ]            segment  pages whose rows follow each other in one chunk
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ResidentPages(NamedTuple):
    """Consecutive pages of all sequences, from the first page of a segment on, in the model's dtype.

    Attributes:
        table: int64 [chunks], addresses on the device of the kernels.
        rows: int64 [B, H, n], the pages' rows; the last dimension is contiguous.
        rows_per_chunk: rows of a chunk, whole segments.
        segment_pages: pages of a segment, a power of two.
        page_size, key_dim, value_dim: tokens of a page, P, and head sizes, Dk and Dv.
        dtype: of keys and values.
    """

    table: Tensor
    rows: Tensor
    rows_per_chunk: int
    segment_pages: int
    page_size: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def is_aligned(self) -> bool:
        """Whether all pages begin at multiples of 16 bytes, as chunks do."""
        return self.page_size * (self.key_dim + self.value_dim) * self.dtype.itemsize % 16 == 0

    def holds_blocks_of(self, num_tokens: int) -> bool:
        """Whether blocks of so many tokens, from the first token on, are whole pages of one segment."""
        return num_tokens % self.page_size == 0 and self.segment_pages * self.page_size % num_tokens == 0
