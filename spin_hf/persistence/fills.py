"""Memory that a saved tensor is read into, or converted to: the chunks of a page store, or a tensor."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from ..storage.chunked_array import ChunkedArray
from ..storage.page_store import PageStore
from .manifest import PagedLayer
from .staging import Staging, in_host_memory
from .strict_json import RefusedError


class Destination(Protocol):
    """Where the bytes of a tensor go.

    Attributes:
        is_direct: whether they go to `views` as the file has them. Otherwise `put` takes them.
        is_on_gpu: whether they end up in memory of a GPU.
    """

    is_direct: bool
    is_on_gpu: bool

    def views(self, begin: int, end: int) -> list[Tensor]:
        """Memory of bytes [begin, end), uint8 in one dimension each, in order; if `is_direct`."""

    def put(self, begin: int, content: Tensor, staging: Staging) -> None:
        """Take bytes from a buffer: `content`, uint8, whole rows, which begin at byte `begin`. Returns once they are there."""


class PlainTensor:
    """Memory of a tensor that is read as a whole, on the CPU."""

    is_direct, is_on_gpu = True, False

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape
        self.bytes = torch.empty(torch.Size(shape).numel() * dtype.itemsize, dtype=torch.uint8, device="cpu")

    def views(self, begin: int, end: int) -> list[Tensor]:
        """Memory of bytes [begin, end)."""
        return [self.bytes[begin:end]]

    def put(self, begin: int, content: Tensor, staging: Staging) -> None:
        """Copy bytes."""
        self.bytes[begin : begin + len(content)] = content

    def finished(self, device: torch.device) -> Tensor:
        """The tensor on a device, once it has been read."""
        if self.dtype == torch.bool and self.bytes.numel() and int(self.bytes.max()) > 1:
            raise RefusedError("bools of 0 and 1", f"{int(self.bytes.max())}")
        return self.bytes.view(self.dtype).view(self.shape).to(device)


class PagesMemory:
    """Rows of an array of a page store.

    Args:
        store, array: of the new cache.
        entry: of the layer in the manifest.
        name: of the array.
    """

    def __init__(self, store: PageStore, array: ChunkedArray, entry: PagedLayer, name: str) -> None:
        self.array = array
        self.source, self.target = entry.layout(store.page_size), store.backing_layout
        self.converts = name == "pages" and self.source != self.target
        self.dtype, self.row_shape = array.dtype, array.row_shape
        if self.converts:
            self.dtype, self.row_shape = self.source.row_dtype, (self.source.row_elements,)
        self.row_bytes = math.prod(self.row_shape) * self.dtype.itemsize
        self.is_direct, self.is_on_gpu = not self.converts, not in_host_memory(array.device)

    def views(self, begin: int, end: int) -> list[Tensor]:
        """Memory of bytes [begin, end), whole rows."""
        rows = self.array.views(begin // self.row_bytes, end // self.row_bytes)
        return [each.reshape(-1).view(torch.uint8) for each in rows]

    def put(self, begin: int, content: Tensor, staging: Staging) -> None:
        """Convert rows to the layout of the store, and copy them."""
        rows, first = self.rows_of(content), begin // self.row_bytes
        staging.copy(rows, list(self.array.views(first, first + len(rows))), self.array.device)

    def rows_of(self, content: Tensor) -> Tensor:
        """Rows of the file, in the layout of the store."""
        rows = content.view(self.dtype).view(-1, *self.row_shape)
        return self.target.join(self.target.encode(*self.source.take(rows))) if self.converts else rows
