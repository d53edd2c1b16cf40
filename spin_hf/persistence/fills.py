"""Memory that a saved tensor is read into: the chunks of a page store, or buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..storage.chunked_array import ChunkedArray
from ..storage.page_store import PageStore
from .manifest import PagedLayer
from .strict_json import RefusedError


class Target(NamedTuple):
    """Memory for a piece of a tensor.

    Attributes:
        buffers: CPU tensors that together take the bytes of the piece, in order.
        finish: called once they are full, if given.
    """

    buffers: list[Tensor]
    finish: Callable[[], None] | None = None


Fill = Callable[[int, int], Target]
"""Memory for bytes [begin, end) of a tensor."""


class PlainTensor:
    """Memory of a tensor that is read as a whole, on the CPU."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape
        self.bytes = torch.empty(torch.Size(shape).numel() * dtype.itemsize, dtype=torch.uint8)

    def fill(self, begin: int, end: int) -> Target:
        """Memory for bytes [begin, end)."""
        return Target([self.bytes[begin:end]])

    def finished(self, device: torch.device) -> Tensor:
        """The tensor on a device, once it has been read."""
        if self.dtype == torch.bool and self.bytes.numel() and int(self.bytes.max()) > 1:
            raise RefusedError("bools of 0 and 1", f"{int(self.bytes.max())}")
        return self.bytes.view(self.dtype).view(self.shape).to(device)


def pages_fill(store: PageStore, array: ChunkedArray, entry: PagedLayer, name: str) -> Fill:
    """Memory for rows of an array of a page store: its chunks, or a buffer.

    A buffer is used for rows on a GPU, and for pages that the file has in another layout. `finish` converts and copies them.
    """
    source, target = entry.layout(store.page_size), store.backing_layout
    converts = name == "pages" and source != target
    dtype, row_shape = (source.row_dtype, (source.row_elements,)) if converts else (array.dtype, array.row_shape)
    row_bytes = torch.Size(row_shape).numel() * dtype.itemsize

    def fill(begin: int, end: int) -> Target:
        first, stop = begin // row_bytes, end // row_bytes
        if not converts and array.device.type == "cpu":
            return Target([rows.reshape(-1).view(torch.uint8) for rows in array.views(first, stop)])
        buffer = torch.empty(end - begin, dtype=torch.uint8)

        def finish() -> None:
            rows = buffer.view(dtype).view(stop - first, *row_shape)
            if converts:
                rows = target.join(target.encode(*source.take(rows)))
            at = 0
            for place in array.views(first, stop):
                place.copy_(rows[at : at + len(place)])
                at += len(place)

        return Target([buffer], finish)

    return fill
