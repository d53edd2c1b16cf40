"""Gathers or scatters rows of chunked arrays on a GPU: no host synchronization, whatever the number of chunks and arrays.

    parts    [ fields of a `RowCopy` | addresses of its arrays' tables ]    one row for each, uploaded at once
    launch   program (tile of rows, array, part)                           one for all parts with short rows

Rows are found through the arrays' address tables. The specification is `reference.take_rows` and `reference.put_rows`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..compile_ahead import launch_now
from ..launch import RowCopy

_TILE_WORDS = 1024
_SHORT_BYTES = 512
"""Rows of at most this size share launches, in words that divide all of them: those take about as long as their launch."""
_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
_FIELDS = tl.constexpr(5)
"""Addresses of the rows and of what is packed, number of rows, words of a row, rows per chunk."""


def rows_copiers(groups: list[list[RowCopy]], put: bool) -> list[Callable[[], None]]:
    """Return a function for each group of copies, which copies rows of several arrays to `packed`, or from it with `put`.

    The functions allocate no memory. What the groups have in common, tables and ids, is uploaded once.

    Args:
        groups: copies of equally many arrays on one device. Their tensors are contiguous. Rows are distinct with `put`.
    """
    parts: list[list[int]] = []
    plans = [_plan(group, parts) for group in groups]
    if not parts:
        return [lambda: None for _ in groups]
    device = next(copy.packed for group in groups for copy in group if copy.packed.numel()).device
    uploaded = torch.tensor(parts).to(device, non_blocking=True)

    def copier(group: list[RowCopy], launches: list[tuple[int, int, int, int, int]]) -> Callable[[], None]:
        def copy() -> None:  # holds the group's tensors, whose addresses are uploaded
            for first, count, word, words, rows in launches:
                columns = min(triton.next_power_of_2(words), _TILE_WORDS)
                tile = _TILE_WORDS // columns
                launch_now(
                    copy_rows_kernel, (triton.cdiv(rows, tile), len(group[0].tables), count), uploaded, first, len(parts[0]),
                    PUT=put, WORD=_WORDS[word], TILE_ROWS=tile, TILE_WORDS=columns,
                )  # fmt: skip

        return copy

    return [copier(group, launches) for group, launches in zip(groups, plans, strict=True)]


def _plan(group: list[RowCopy], parts: list[list[int]]) -> list[tuple[int, int, int, int, int]]:
    """Append what kernels read of a group to `parts`. Returns its launches.

    Returns:
        first part, number of parts, bytes of a word, most words of a row and most rows, for each launch.
    """
    alike: dict[tuple[bool, int], list[tuple[RowCopy, int]]] = {}
    for copy in group:
        if copy.packed.numel():
            row_bytes = copy.packed.nbytes // (len(copy.tables) * copy.rows.numel())
            is_short, word = row_bytes <= _SHORT_BYTES, row_bytes & -row_bytes & 7 or 8
            alike.setdefault((is_short, 0 if is_short else word), []).append((copy, row_bytes))
    launches = []
    for copies in alike.values():
        word = min(row_bytes & -row_bytes & 7 or 8 for _, row_bytes in copies)
        sizes = [(copy.rows.numel(), row_bytes // word) for copy, row_bytes in copies]
        launches.append(
            (len(parts), len(copies), word, max(words for _, words in sizes), max(rows for rows, _ in sizes))
        )
        for (copy, _), size in zip(copies, sizes, strict=True):
            addresses = [table.data_ptr() for table in copy.tables]
            parts.append([copy.rows.data_ptr(), copy.packed.data_ptr(), *size, copy.rows_per_chunk, *addresses])
    return launches


@triton.jit(do_not_specialize=["first", "stride"])
def copy_rows_kernel(
    parts, first, stride, PUT: tl.constexpr, WORD: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_WORDS: tl.constexpr
):
    """Program (tile of rows, array, part) copies rows of one array.

    Args:
        parts: int64 [parts, stride], as `_plan` makes them; those of this launch begin at `first`.
        WORD: dtype in which rows are copied.
    """
    part = parts + (first + tl.program_id(2)) * stride
    rows = tl.load(part).to(tl.pointer_type(tl.int64))
    packed = tl.load(part + 1).to(tl.pointer_type(WORD))
    count = tl.load(part + 2)
    words = tl.load(part + 3).to(tl.int32)
    rows_per_chunk = tl.load(part + 4)
    array = tl.program_id(1).to(tl.int64)
    table = tl.load(part + _FIELDS + array).to(tl.pointer_type(tl.int64))
    index = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    requested = index < count
    row = tl.load(rows + index, mask=requested, other=0)
    chunk = tl.load(table + row // rows_per_chunk, mask=requested, other=0).to(tl.pointer_type(WORD))
    there = chunk + (row % rows_per_chunk) * words
    here = packed + (array * count + index) * words
    for start in range(0, words, TILE_WORDS):
        word = start + tl.arange(0, TILE_WORDS)
        inside = requested[:, None] & (word < words)[None, :]
        if PUT:
            tl.store(there[:, None] + word[None, :], tl.load(here[:, None] + word[None, :], mask=inside), mask=inside)
        else:
            tl.store(here[:, None] + word[None, :], tl.load(there[:, None] + word[None, :], mask=inside), mask=inside)
