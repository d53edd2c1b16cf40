"""Memory that a saved tensor is read into: the chunks of a page store, or buffers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

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


class Destination(Protocol):
    """Where the bytes of a tensor go."""

    @property
    def is_on_gpu(self) -> bool:
        """Whether the bytes end up on a GPU as the file has them. They are checked there, not while they are read."""

    def fill(self, begin: int, end: int, staging: Staging) -> Target:
        """Memory for bytes [begin, end). A thread passes its buffers."""

    def views(self, begin: int, end: int) -> list[Tensor]:
        """Where bytes [begin, end) lie, in order, if `is_on_gpu` and once all copies are made."""


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

    is_on_gpu = False

    def views(self, begin: int, end: int) -> list[Tensor]:
        """Not called."""
        raise NotImplementedError

    def finished(self, device: torch.device) -> Tensor:
        """The tensor on a device, once it has been read."""
        if self.dtype == torch.bool and self.bytes.numel() and int(self.bytes.max()) > 1:
            raise RefusedError("bools of 0 and 1", f"{int(self.bytes.max())}")
        return self.bytes.view(self.dtype).view(self.shape).to(device)


class PagesMemory:
    """Rows of an array of a page store: its chunks, or a buffer.

    A buffer is used for rows on a GPU, and for pages that the file has in another layout. `finish` converts and copies them.

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
        self.is_direct = not self.converts and in_host_memory(array.device)

    @property
    def is_on_gpu(self) -> bool:
        """Whether the rows end up on a GPU as the file has them."""
        return not self.converts and not self.is_direct

    def fill(self, begin: int, end: int, staging: Staging) -> Target:
        """Memory for bytes [begin, end), whole rows."""
        if self.is_direct:
            return Target([bytes_of(rows) for rows in self.views(begin, end)])
        buffer = staging.buffer(end - begin, self.array.device)

        def finish() -> None:
            rows = buffer.view(self.dtype).view(-1, *self.row_shape)
            if self.converts:
                rows = self.target.join(self.target.encode(*self.source.take(rows)))
            staging.copy(rows, self.views(begin, end), self.array.device)

        return Target([bytes_of(buffer)], finish)

    def views(self, begin: int, end: int) -> list[Tensor]:
        """The rows of bytes [begin, end) in the file."""
        return list(self.array.views(begin // self.row_bytes, end // self.row_bytes))
