"""Gathers or scatters rows of chunked arrays on a GPU: one launch, no host synchronization, for any number of chunks.

Rows are found through the arrays' address tables. The specification is `reference.take_rows` and `reference.put_rows`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_ahead import launch_now
from ..device_guard import on_device_of

_TILE_WORDS = 1024
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def rows_copier(
    tables: list[Tensor], rows_per_chunk: int, rows: Tensor, packed: Tensor, put: bool
) -> Callable[[], None]:
    """Return a function that copies the same rows of several arrays to `packed`, or from it with `put`.

    The function allocates no memory.

    Args:
        tables: for each array, int64 [chunks]: the address of each chunk.
        rows: int64 of any shape, contiguous; distinct with `put`.
        packed: [arrays, *rows.shape, *row_shape], contiguous. Mutated by the copy, unless `put`.
    """
    if not packed.numel():
        return lambda: None
    row_bytes = packed[0].numel() // rows.numel() * packed.element_size()
    word = next(size for size in _WORDS if row_bytes % size == 0)
    words = row_bytes // word
    columns = min(triton.next_power_of_2(words), _TILE_WORDS)
    tile = _TILE_WORDS // columns
    many = len(tables) > 1
    found = tables[0]
    if many:
        found = torch.tensor([table.data_ptr() for table in tables]).to(packed.device, non_blocking=True)

    def copy() -> None:
        with on_device_of(packed):
            launch_now(
                copy_rows_kernel, (triton.cdiv(rows.numel(), tile), len(tables)), found, rows,
                packed.view(-1).view(_WORDS[word]), rows.numel(), words, rows_per_chunk,
                PUT=put, MANY=many, TILE_ROWS=tile, TILE_WORDS=columns,
            )  # fmt: skip

    return copy


@triton.jit(do_not_specialize=["count", "words", "rows_per_chunk"])
def copy_rows_kernel(
    tables, rows, packed, count, words, rows_per_chunk,
    PUT: tl.constexpr, MANY: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_WORDS: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, array) copies rows of `words` words. With MANY, `tables` holds the addresses of the tables."""
    array = tl.program_id(1).to(tl.int64)
    table = tables
    if MANY:
        table = tl.load(tables + array).to(tl.pointer_type(tl.int64))
    index = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    requested = index < count
    row = tl.load(rows + index, mask=requested, other=0)
    chunk = tl.load(table + row // rows_per_chunk, mask=requested, other=0).to(tl.pointer_type(packed.dtype.element_ty))
    there = chunk + (row % rows_per_chunk) * words
    here = packed + (array * count + index) * words
    for first in range(0, words, TILE_WORDS):
        word = first + tl.arange(0, TILE_WORDS)
        inside = requested[:, None] & (word < words)[None, :]
        if PUT:
            tl.store(there[:, None] + word[None, :], tl.load(here[:, None] + word[None, :], mask=inside), mask=inside)
        else:
            tl.store(here[:, None] + word[None, :], tl.load(there[:, None] + word[None, :], mask=inside), mask=inside)
