"""Memory that a saved tensor is read into: the chunks of a page store, or buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..storage.chunked_array import ChunkedArray
from ..storage.page_store import PageStore
from .manifest import PagedLayer
from .strict_json import RefusedError

Fill = Callable[[int, int], list[Tensor]]
"""Memory for bytes [begin, end) of a tensor: uint8 on the CPU. Where it has `done`, that is called once it is full."""


class Staged(list[Tensor]):
    """Memory for a piece, and what is to be done once it is filled."""

    def __init__(self, buffer: Tensor, done: Callable[[], None]) -> None:
        super().__init__([buffer])
        self.done = done


class PlainTensor:
    """A tensor on the CPU that is being read."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape
        self.bytes = torch.empty(torch.Size(shape).numel() * dtype.itemsize, dtype=torch.uint8)

    def fill(self, begin: int, end: int) -> list[Tensor]:
        """Memory for bytes [begin, end)."""
        return [self.bytes[begin:end]]

    def finished(self, device: torch.device) -> Tensor:
        """The tensor, on a device."""
        if self.dtype == torch.bool and self.bytes.numel() and int(self.bytes.max()) > 1:
            raise RefusedError("bools of 0 and 1", f"{int(self.bytes.max())}")
        return self.bytes.view(self.dtype).view(self.shape).to(device)


def pages_fill(store: PageStore, array: ChunkedArray, entry: PagedLayer, name: str) -> Fill:
    """Memory for rows of an array: the chunks themselves, or a buffer whose rows are converted or moved to them."""
    source = entry.layout(store.page_size)
    converts = name == "pages" and source != store.backing_layout
    row_bytes = source.row_bytes if name == "pages" else array.row_bytes
    target = store.backing_layout

    def chunks(first: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """(number of rows, the rows) in each chunk."""
        while first < stop:
            chunk, inside = divmod(first, array.rows_per_chunk)
            count = min(stop - first, array.rows_per_chunk - inside)
            yield count, array.chunks[chunk][inside : inside + count]
            first += count

    def fill(begin: int, end: int) -> list[Tensor]:
        first, stop = begin // row_bytes, end // row_bytes
        if not converts and array.device.type == "cpu":
            return [rows.reshape(-1).view(torch.uint8) for _, rows in chunks(first, stop)]
        buffer = torch.empty(end - begin, dtype=torch.uint8)

        def done() -> None:
            rows = buffer.view(source.row_dtype if name == "pages" else array.dtype)
            rows = rows.view(stop - first, *((source.row_elements,) if name == "pages" else array.row_shape))
            if converts:
                fields = source.take(rows)
                rows = target.join(target.encode(*fields))
            at = 0
            for count, place in chunks(first, stop):
                place.copy_(rows[at : at + count])
                at += count

        return Staged(buffer, done)

    return fill
