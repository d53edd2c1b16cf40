"""Page summaries of a method, one row per page or unit of pages: int8 vectors with a scale each, or unquantized.

    quantized     values  ChunkedArray of int8 [D]       vector = values * scale;  scale = max |x| / 127
                  scale   ChunkedArray of float32 []
    unquantized   values  ChunkedArray in the model's dtype;  scalars are never quantized
    own dtype     values  ChunkedArray in the dtype that the method names, such as uint8 codes; int8 is quantized

    page p of a unit of u pages  ->  row p // u

Scoring reads all summaries of the context at every step, so its time is proportional to their bytes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .chunked_array import ChunkedArray
from .copied import copied


class SummaryArray:
    """The summaries of one name.

    Args:
        shape: of one page's summary.
        rows_per_chunk, device: as for `ChunkedArray`.
        dtype: of unquantized summaries.
        quantized: whether vectors are stored as int8.
        pages_per_row: pages that have one row.
    """

    def __init__(
        self, shape: tuple[int, ...], rows_per_chunk: int, dtype: torch.dtype, device: torch.device, quantized: bool,
        pages_per_row: int = 1,
    ) -> None:  # fmt: skip
        self.quantized, self.pages_per_row = quantized and bool(shape), pages_per_row
        self.values = ChunkedArray(shape, rows_per_chunk, torch.int8 if self.quantized else dtype, device)
        self.scale = ChunkedArray((), rows_per_chunk, torch.float32, device) if self.quantized else None

    def new_empty(self) -> SummaryArray:
        """An empty one of the same sizes."""
        twin = object.__new__(SummaryArray)
        scale = None if self.scale is None else self.scale.new_empty()
        twin.__dict__ = {**self.__dict__, "values": self.values.new_empty(), "scale": scale}
        return twin

    @property
    def arrays(self) -> list[ChunkedArray]:
        """The arrays behind it: values, and scales if quantized."""
        return [self.values] if self.scale is None else [self.values, self.scale]

    def __deepcopy__(self, memo: dict[int, Any]) -> SummaryArray:
        return copied(self, memo, "values", "scale")

    def rows_of(self, pages: Tensor) -> Tensor:
        """Rows [..., ceil(n / pages_per_row)] of rows of consecutive pages [..., n], which begin with a unit."""
        return pages if self.pages_per_row == 1 else pages[..., :: self.pages_per_row] // self.pages_per_row

    def stored(self, summaries: Tensor) -> list[Tensor]:
        """Encode `summaries` [..., *shape], float32: one tensor for each of `arrays`."""
        return [summaries.to(self.values.dtype)] if self.scale is None else list(kernels.quantize(summaries))

    def of_pages(self, pages: Tensor) -> Tensor:
        """Summaries of rows of pages: [*pages.shape, *shape], as `take`."""
        return self.take(pages if self.pages_per_row == 1 else pages // self.pages_per_row)

    def take(self, rows: Tensor) -> Tensor:
        """Read rows: [*rows.shape, *shape], in the stored dtype, or float32 if quantized."""
        values = self.values.take(rows)
        return values if self.scale is None else values.float() * self.scale.take(rows).unsqueeze(-1)

    def rounded(self, summaries: Tensor) -> Tensor:
        """`summaries` [..., *shape] as `take` returns them once they are stored."""
        values, *scale = self.stored(summaries)
        return values.float() * scale[0].unsqueeze(-1) if scale else values


def stored_as(name: str, dtype: torch.dtype, quantized: bool, own: dict[str, torch.dtype]) -> tuple[torch.dtype, bool]:
    """Storage of the summary `name`: dtype while unquantized, and whether vectors are stored as int8.

    Args:
        dtype, quantized: the cache's choice.
        own: name -> dtype, the method's choice, which takes precedence. int8 has a scale for each vector.
    """
    if name not in own:
        return dtype, quantized
    return own[name], own[name] == torch.int8


def bytes_per_page(shape: tuple[int, ...], dtype: torch.dtype, quantized: bool, pages_per_row: int = 1) -> int:
    """Bytes of a summary of this shape per page, rounded up."""
    row = math.prod(shape) + 4 if quantized and shape else math.prod(shape) * dtype.itemsize
    return -(-row // pages_per_row)
