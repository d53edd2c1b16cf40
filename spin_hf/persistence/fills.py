"""Memory that a saved tensor is read into: the chunks of a page store, or buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..storage.chunked_array import ChunkedArray
from ..storage.page_store import PageStore
from .manifest import PagedLayer
from .shards import bytes_of
from .staging import Staging, in_host_memory
from .strict_json import RefusedError


class Target(NamedTuple):
    """Memory for a piece of a tensor.

    Attributes:
        views: memory that together takes the bytes of the piece, in order.
        finish: called once they are full, if given.
    """

    views: list[memoryview]
    finish: Callable[[], None] | None = None


Fill = Callable[[int, int, Staging], Target]
"""Memory for bytes [begin, end) of a tensor. A thread passes its buffers."""


class PlainTensor:
    """Memory of a tensor that is read as a whole, on the CPU."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape
        self.bytes = torch.empty(torch.Size(shape).numel() * dtype.itemsize, dtype=torch.uint8, device="cpu")

    def view(self, begin: int, end: int) -> memoryview:
        """Memory of bytes [begin, end)."""
        return bytes_of(self.bytes[begin:end])

    def fill(self, begin: int, end: int, staging: Staging) -> Target:
        """Memory for bytes [begin, end)."""
        return Target([self.view(begin, end)])

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

    def fill(begin: int, end: int, staging: Staging) -> Target:
        first, stop = begin // row_bytes, end // row_bytes
        if not converts and in_host_memory(array.device):
            return Target([bytes_of(rows) for rows in array.views(first, stop)])
        buffer = staging.buffer(end - begin, array.device)

        def finish() -> None:
            rows = buffer.view(dtype).view(stop - first, *row_shape)
            if converts:
                rows = target.join(target.encode(*source.take(rows)))
            staging.copy(rows, list(array.views(first, stop)), array.device)

        return Target([bytes_of(buffer)], finish)

    return fill
