"""What a method keeps of each page, by row: vectors as int8 with a scale each, or all as they are in the model's dtype.

    int8      values  ChunkedArray of int8 [D]       vector = values * scale;  scale = largest absolute value / 127
              scale   ChunkedArray of float32 []
    as is     values  ChunkedArray of the model's dtype;  scalars are always kept so
    own       values  ChunkedArray of the dtype that the method names, such as bytes of codes

Scoring reads every vector of the context at every step, so their bytes are its time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import kernels
from .chunked_array import ChunkedArray


class SummaryArray:
    """The summaries of one name.

    Args:
        shape: of one page's summary.
        rows_per_chunk, device: as for `ChunkedArray`.
        dtype: of what is kept as it is.
        quantized: whether vectors are kept as int8.
    """

    def __init__(
        self, shape: tuple[int, ...], rows_per_chunk: int, dtype: torch.dtype, device: torch.device, quantized: bool
    ) -> None:
        self.quantized = quantized and bool(shape)
        self.values = ChunkedArray(shape, rows_per_chunk, torch.int8 if self.quantized else dtype, device)
        self.scale = ChunkedArray((), rows_per_chunk, torch.float32, device) if self.quantized else None

    @property
    def arrays(self) -> list[ChunkedArray]:
        """All that is stored, for whoever grows, copies or counts it."""
        return [self.values] if self.scale is None else [self.values, self.scale]

    def put(self, rows: Tensor, summaries: Tensor) -> None:
        """Keep `summaries` [*rows.shape, *shape], float32."""
        for array, content in zip(self.arrays, self.stored(summaries), strict=True):
            array.put(rows, content)

    def stored(self, summaries: Tensor) -> list[Tensor]:
        """What is stored of `summaries` [..., *shape], float32, in each of `arrays`."""
        return [summaries.to(self.values.dtype)] if self.scale is None else list(kernels.quantize(summaries))

    def take(self, rows: Tensor) -> Tensor:
        """What is kept, [*rows.shape, *shape]: in the model's dtype, or float32 where it was int8."""
        values = self.values.take(rows)
        return values if self.scale is None else values.float() * self.scale.take(rows).unsqueeze(-1)

    def rounded(self, summaries: Tensor) -> Tensor:
        """What `take` gives after `put`."""
        values, *scale = self.stored(summaries)
        return values.float() * scale[0].unsqueeze(-1) if scale else values


def stored_as(
    name: str, dtype: torch.dtype, quantized: bool, own: dict[str, torch.dtype]
) -> tuple[torch.dtype, bool]:  # fmt: skip
    """Dtype of what is kept as it is, and whether vectors become int8, for a summary of this name.

    Args:
        dtype, quantized: what the cache chose.
        own: name -> dtype, where the method chose.
    """
    return (own[name], False) if name in own else (dtype, quantized)


def bytes_per_page(shape: tuple[int, ...], dtype: torch.dtype, quantized: bool) -> int:
    """Bytes that a summary of this shape takes."""
    return math.prod(shape) + 4 if quantized and shape else math.prod(shape) * dtype.itemsize
