"""Small chunked arrays, and a prefetcher that counts its requests."""

from __future__ import annotations

import torch

from spin_hf.storage import pinned_slab
from spin_hf.storage.chunked_array import ChunkedArray
from spin_hf.storage.slab_prefetch import PrefetchedSlab, SlabPrefetcher

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class Reserve(SlabPrefetcher):
    """A prefetcher that counts its requests."""

    def __init__(self) -> None:
        self.requests = 0
        super().__init__(lambda *args, **named: pinned_slab.allocate_rows(*args, **named))

    def ask(self, *args: object, **named: object) -> PrefetchedSlab:
        self.requests += 1
        return super().ask(*args, **named)  # type: ignore[arg-type]


def registered(num_rows: int, rows_per_chunk: int = 4) -> ChunkedArray:
    array = ChunkedArray((3,), rows_per_chunk, torch.float32, CPU, compute_device=CUDA)
    array.grow(num_rows)
    array.put(torch.arange(num_rows), content(num_rows))
    return array


def filled(num_rows: int, rows_per_chunk: int = 4, row_shape: tuple[int, ...] = (3,)) -> ChunkedArray:
    array = ChunkedArray(row_shape, rows_per_chunk, torch.float32, torch.device("cpu"))
    array.grow(num_rows)
    array.put(torch.arange(num_rows), content(num_rows, row_shape))
    return array


def content(num_rows: int, row_shape: tuple[int, ...] = (3,)) -> torch.Tensor:
    size = torch.Size(row_shape).numel()
    return torch.arange(num_rows * size, dtype=torch.float32).view(num_rows, *row_shape)
