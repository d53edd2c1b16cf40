"""An array of rows that grows without ever moving: the storage under pages and summaries.

    rows_per_chunk = 4          row 6 = chunk 1, row 2
    chunks         [ 0 1 2 3 ] [ 4 5 6 7 ] [ 8 ...      on `device`
    address_table  [ a0, a1, a2, 0, ... 0 ]             address of each chunk; on `compute_device`, MAX_CHUNKS entries

A row never changes its address, so a captured graph or a reader of an old row stays valid while the array grows. A
kernel finds the rows through the table, whose own address never changes either, not even when the array moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..errors import CapacityError
from ..inference_mode import outside_inference_mode
from .host_register import wait_for_device
from .out_of_memory import allocating
from .pinned_slab import allocate_rows
from .slab_prefetch import PREFETCHER, PrefetchedChunk

MAX_CHUNKS = 4096
"""Chunks that an array can have, and entries of its address table."""

_RECODED_BYTES = 16 << 20
"""Of rows that are converted at a time: bounds temporary memory."""


class Recoding(NamedTuple):
    """Rows of another shape and dtype, and what makes them of [n, *row_shape] old ones."""

    row_shape: tuple[int, ...]
    dtype: torch.dtype
    convert: Callable[[Tensor], Tensor]


class ChunkedArray:
    """Rows of one shape and dtype, in chunks of equal size.

    Args:
        row_shape: shape of one row.
        rows_per_chunk: rows added at a time.
        device: where the chunks live.
        compute_device: whose kernels read them, `device` unless given. CPU chunks of a CUDA compute device are
            registered with it (see `storage/pinned_slab.py`), and the next one is made ahead of need.
    """

    def __init__(
        self,
        row_shape: tuple[int, ...],
        rows_per_chunk: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        compute_device: torch.device | None = None,
    ) -> None:
        self.row_shape = row_shape
        self.rows_per_chunk = rows_per_chunk
        self.dtype = dtype
        self.device = device
        self.compute_device = device if compute_device is None else compute_device
        self.chunks: list[Tensor] = []
        self.used_rows = 0
        self.converted = False
        """Whether rows have taken another form since the array was made (`move`)."""
        self._table: Tensor | None = None
        self._table_is_behind = False
        """Whether the table may not say where the chunks are: set while they move."""
        self._spare: PrefetchedChunk | None = None

    @property
    def num_rows(self) -> int:
        """Rows that exist."""
        return len(self.chunks) * self.rows_per_chunk

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def table_bytes(self) -> int:
        """Bytes of the address table, if it has been asked for."""
        return 0 if self._table is None else self._table.nbytes

    @property
    def address_table(self) -> Tensor:
        """[MAX_CHUNKS], int64, on the compute device: the address of each chunk, 0 where there is none.

        One tensor as long as the array lives, made by the first request; growing and moving write to it.
        """
        if self._table is None:
            with allocating("an address table", 8 * MAX_CHUNKS):
                table = outside_inference_mode(torch.zeros)(MAX_CHUNKS, dtype=torch.int64, device=self.compute_device)
                self._write_addresses(table, 0, self.chunks)
            self._table = table
        return self._table

    def grow(self, num_rows: int) -> None:
        """Make rows [0, num_rows) exist. Their content is undefined; old rows stay where they are.

        Raises:
            CapacityError: that takes more than MAX_CHUNKS chunks, or memory that there is not. Nothing changes.
        """
        if self._table_is_behind:  # a move was interrupted
            self._write_addresses(self._table, 0, self.chunks)
            self._table_is_behind = False
        missing = -(-num_rows // self.rows_per_chunk) - len(self.chunks)
        if missing > 0:
            if len(self.chunks) + missing > MAX_CHUNKS:
                raise CapacityError(
                    f"{num_rows} rows take {len(self.chunks) + missing} chunks of {self.rows_per_chunk} rows, an array "
                    f"has at most {MAX_CHUNKS}; shorten the context or use a smaller batch"
                )
            made = self._new_chunks(missing)
            self._write_addresses(self._table, len(self.chunks), made)
            self.chunks += made
        self.used_rows = max(self.used_rows, num_rows)
        self._order_spare()

    def shrink(self, num_rows: int) -> None:
        """Give back the chunks that rows [0, num_rows) do not need. Asks for no memory."""
        needed = -(-num_rows // self.rows_per_chunk)
        held, self.used_rows = len(self.chunks), min(self.used_rows, num_rows)
        if needed < held:
            self.chunks = self.chunks[:needed]  # before its address goes: what a chunk has is always said
            if self._table is not None:
                self._table[needed:held].zero_()

    def release(self) -> None:
        """Let go of all rows; the table stays where it is."""
        self._wait_for_kernels()
        self.chunks, self.used_rows, self._spare = [], 0, None
        if self._table is not None:
            self._table.zero_()

    def take(self, rows: Tensor) -> Tensor:
        """A copy [*rows.shape, *row_shape] of rows (int64, any device), on the ids' device."""
        return take_all([self], rows)[0]

    def put(self, rows: Tensor, values: Tensor) -> None:
        """Write `values` [*rows.shape, *row_shape] to distinct rows."""
        put_all([self], rows, values[None])

    def move(self, device: torch.device, recoding: Recoding | None = None) -> None:
        """Take all chunks to another device (nothing is copied where it is the same one and rows stay as they are).

        The compute device stays, and so does the address table. Raises CapacityError, before anything changes, where
        the host cannot lock the memory.
        """
        if recoding is not None:
            self._recode(device, recoding)
            return
        if device.type == self.device.type == "cpu":
            return
        if device.type == "cpu":
            moved = self._allocate(len(self.chunks), device)
            for copy, chunk in zip(moved, self.chunks, strict=True):
                copy.copy_(chunk)
        else:
            moved = [chunk.to(device) for chunk in self.chunks]
        self._table_is_behind = True
        self._write_addresses(self._table, 0, moved)
        self.chunks, self.device, self._spare, self._table_is_behind = moved, device, None, False

    def _recode(self, device: torch.device, recoding: Recoding) -> None:
        """As `move`, to rows of another form. Rows that are not in use are not touched."""
        old, at_once = self.chunks, max(1, _RECODED_BYTES // self.row_bytes)
        moved = self._allocate(len(old), device, recoding.row_shape, recoding.dtype)
        for index, (copy, chunk) in enumerate(zip(moved, old, strict=True)):
            inside = min(self.rows_per_chunk, self.used_rows - index * self.rows_per_chunk)
            for first in range(0, inside, at_once):
                part = slice(first, min(first + at_once, inside))
                copy[part] = recoding.convert(chunk[part])
        form = {"row_shape": recoding.row_shape, "dtype": recoding.dtype, "converted": True}
        self._table_is_behind = True
        self._write_addresses(self._table, 0, moved)
        self.__dict__.update(form, chunks=moved, device=device, _spare=None, _table_is_behind=False)  # at once

    def __deepcopy__(self, memo: dict[int, object]) -> ChunkedArray:
        """A copy of the rows in use; the rest of the last chunk is not touched (and so takes no memory on a CPU)."""
        twin = ChunkedArray(
            self.row_shape, self.rows_per_chunk, self.dtype, self.device, compute_device=self.compute_device
        )
        twin.converted = self.converted
        twin.grow(self.used_rows)
        self._wait_for_kernels()
        for index, (source, copy) in enumerate(zip(self.chunks, twin.chunks, strict=False)):
            inside = min(self.rows_per_chunk, self.used_rows - index * self.rows_per_chunk)
            copy[:inside] = source[:inside]
        return twin

    def _copier(self, rows: Tensor) -> Callable[..., Callable[[], None]] | None:
        """What readies the kernel that copies rows, in host memory too unless the host asks for them; None if there is none."""
        if self.compute_device.type != "cuda" or (self._is_registered and rows.device.type == "cpu"):
            return None
        launch = kernels.launchers(self.compute_device)
        return None if launch is None else launch.rows_copier

    def _take_by_host(self, rows: Tensor) -> Tensor:
        self._wait_for_kernels()
        return kernels.take_rows(self.chunks, rows.to(self.device)).to(rows.device)

    def _writer_by_host(self, rows: Tensor, values: Tensor) -> Callable[[], None]:
        self._wait_for_kernels()
        return kernels.rows_to_put(self.chunks, rows.to(self.device), values.to(self.device, self.dtype))

    @property
    def _is_registered(self) -> bool:
        return self.device.type == "cpu" and self.compute_device.type == "cuda"

    def _wait_for_kernels(self) -> None:
        """Before the host touches memory that kernels read and write by themselves."""
        if self._is_registered and torch.cuda.is_initialized():
            wait_for_device(self.compute_device)

    def _new_chunks(self, count: int) -> list[Tensor]:
        """The spare, where that is all that is needed; else new ones (and the spare is kept for next time)."""
        if count == 1 and self._spare is not None:
            chunk, self._spare = self._spare.take(), None
            if chunk is not None:
                return [chunk]
        return self._allocate(count, self.device)

    def _allocate(
        self, count: int, device: torch.device, row_shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
    ) -> list[Tensor]:  # fmt: skip
        """Chunks on a device, of these rows unless others are asked for."""
        shape = (self.rows_per_chunk, *(self.row_shape if row_shape is None else row_shape))
        dtype = self.dtype if dtype is None else dtype
        with allocating("pages and what is known of them", count * math.prod(shape) * dtype.itemsize):
            if device.type == "cpu":
                return allocate_rows(count, shape, dtype, compute_device=self.compute_device)
            return [torch.empty(shape, dtype=dtype, device=device) for _ in range(count)]

    def _order_spare(self) -> None:
        """Have the next chunk made once half of the last one is used, so that growing by one need not wait for it."""
        left = self.num_rows - self.used_rows
        if (
            self._is_registered
            and self._spare is None
            and 0 < len(self.chunks) < MAX_CHUNKS
            and left <= self.rows_per_chunk // 2
        ):
            shape = (self.rows_per_chunk, *self.row_shape)
            self._spare = PREFETCHER.ask(shape, self.dtype, compute_device=self.compute_device)

    def _write_addresses(self, table: Tensor | None, first: int, chunks: list[Tensor]) -> None:
        """Write the addresses of chunks [first, first + len(chunks)) to a table, if there is one."""
        if table is not None and chunks:
            with allocating("addresses of pages", 8 * len(chunks)):
                addresses = torch.tensor([chunk.data_ptr() for chunk in chunks], dtype=torch.int64)
                table[first : first + len(chunks)].copy_(addresses, non_blocking=True)


def take_all(arrays: list[ChunkedArray], rows: Tensor) -> Tensor:
    """The same rows of several arrays that are alike: [arrays, *rows.shape, *row_shape], copies on the ids' device."""
    first = arrays[0]
    copier = first._copier(rows)
    if copier is None:
        each = [array._take_by_host(rows) for array in arrays]
        return each[0][None] if len(each) == 1 else torch.stack(each)
    taken = torch.empty((len(arrays), *rows.shape, *first.row_shape), dtype=first.dtype, device=first.compute_device)
    tables = [array.address_table for array in arrays]
    copier(tables, first.rows_per_chunk, rows.to(first.compute_device).contiguous(), taken, put=False)()
    return taken.to(rows.device)


def put_all(arrays: list[ChunkedArray], rows: Tensor, values: Tensor) -> None:
    """Write `values` [arrays, *rows.shape, *row_shape] to distinct rows of several arrays that are alike."""
    for write in writers(arrays, rows, values):
        write()


def writers(arrays: list[ChunkedArray], rows: Tensor, values: Tensor) -> list[Callable[[], None]]:
    """As `put_all`, up to the writing: that is done by what is returned, which asks for no more memory."""
    first = arrays[0]
    copier = first._copier(rows)
    if copier is None:
        return [array._writer_by_host(rows, content) for array, content in zip(arrays, values, strict=True)]
    values = values.to(first.compute_device, first.dtype).contiguous()
    tables = [array.address_table for array in arrays]
    return [copier(tables, first.rows_per_chunk, rows.to(first.compute_device).contiguous(), values, put=True)]
