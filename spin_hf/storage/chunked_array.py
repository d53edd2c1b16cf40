"""A growing array of rows with stable addresses. It stores pages and summaries.

    rows_per_chunk = 4          row 6 = chunk 1, row 2
    chunks         [ 0 1 2 3 ] [ 4 5 6 7 ] [ 8 ...      on `device`
    address_table  [ a0, a1, a2, 0, ... 0 ]             address of each chunk; on `compute_device`, MAX_CHUNKS entries

Growing does not move rows, so captured graphs and views of old rows stay valid. Kernels find rows through the address table.
The table keeps its own address, even when the array moves to another device.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import CapacityError
from ..inference_mode import outside_inference_mode
from .chunk_list import ChunkList, addresses_of
from .out_of_memory import allocating, refuse
from .page_layout import Conversion
from .pinned_slab import allocate_rows
from .row_copies import RowArray
from .slab_prefetch import PREFETCHER, PrefetchedSlab

MAX_CHUNKS = 4096
"""Most chunks of an array; also the length of its address table."""

_GPU_SLAB_BYTES = 256 << 20
"""Most bytes of chunks on a GPU that are one allocation, which is freed with the last of them. Each is a call to the driver."""
_SLAB_BYTES = 64 << 20
"""Likewise in host memory that is allocated ahead."""
_MOST_BLOCK_COPIES = 16
"""Most blocks that are copied one by one; more are copied by one kernel."""
_CONVERT_BYTES = 16 << 20
"""Bytes of rows converted at a time. Bounds temporary memory."""
_NO_CHUNKS = ChunkList()
_zeros = outside_inference_mode(torch.zeros)


class ChunkedArray(RowArray):
    """Rows of one shape and dtype, in chunks of equal size.

    Args:
        row_shape: shape of one row.
        rows_per_chunk: rows added at a time.
        device: device of the chunks.
        compute_device: device of the kernels that read the chunks; default `device`. If it is a CUDA device, CPU chunks are
            registered with CUDA (`storage/pinned_slab.py`) and the next chunk is allocated ahead of need.
    """

    def __init__(
        self, row_shape: tuple[int, ...], rows_per_chunk: int, dtype: torch.dtype, device: torch.device, *,
        compute_device: torch.device | None = None,
    ) -> None:  # fmt: skip
        self.row_shape = row_shape
        self.rows_per_chunk = rows_per_chunk
        self.dtype = dtype
        self.device = device
        self.compute_device = device if compute_device is None else compute_device
        self.chunks = _NO_CHUNKS
        self.used_rows = 0
        self.is_shared = False
        """Whether a fork may use the same chunks. Not reset when the fork ends."""
        self.converted = False
        """Whether `move` has converted the rows to another shape or dtype."""
        self._table: Tensor | None = None
        self._table_is_behind = False
        """Whether the table may hold old addresses. Set while chunks move."""
        self._spares: deque[PrefetchedSlab] = deque()
        """The next chunks, allocated ahead."""

    @property
    def num_rows(self) -> int:
        """Rows allocated."""
        return len(self.chunks) * self.rows_per_chunk

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def table_bytes(self) -> int:
        """Bytes of the address table; 0 until it is first used."""
        return 0 if self._table is None else self._table.nbytes

    @property
    def address_table(self) -> Tensor:
        """Address of each chunk, 0 for none: [MAX_CHUNKS], int64, on the compute device.

        Allocated on first use. The tensor stays the same; growing and moving the array write to it.
        """
        if self._table is None:
            make_tables([self])
        assert self._table is not None
        return self._table

    def new_empty(self) -> ChunkedArray:
        """An empty array of the same row shape, dtype and devices."""
        return self._twin(chunks=_NO_CHUNKS, used_rows=0, is_shared=False)

    def _twin(self, **known: Any) -> ChunkedArray:
        """An array with these attributes, and otherwise those of this one, but with a table and spares of its own."""
        twin = object.__new__(ChunkedArray)
        twin.__dict__ = {**self.__dict__, "_table": None, "_table_is_behind": False, "_spares": deque(), **known}
        return twin

    def grow(self, num_rows: int, expected: int = 0) -> bool:
        """Allocate rows up to `num_rows`. New rows are uninitialized; old rows keep their addresses.

        Args:
            expected: rows that are needed soon. Allocated too, in the background if they are registered host memory.
        Returns:
            Whether chunks were added.
        Raises:
            CapacityError: this needs more than MAX_CHUNKS chunks, or memory ran out. Nothing has changed.
        """
        is_registered = self.registers(self.device)
        num_rows = num_rows if is_registered else max(num_rows, expected)
        if self._table_is_behind:  # a move was interrupted
            self._write_addresses(self._table, 0, self.chunks)
            self._table_is_behind = False
        held = len(self.chunks)
        if (missing := -(-num_rows // self.rows_per_chunk) - held) > 0:
            if held + missing > MAX_CHUNKS:
                raise CapacityError(
                    f"{num_rows} rows take {held + missing} chunks of {self.rows_per_chunk} rows, an array has at most "
                    f"{MAX_CHUNKS}; shorten the context or use a smaller batch"
                )
            made = self._new_slabs(missing)
            if self._table is not None:
                self._write_addresses(self._table, held, ChunkList(made))
            self.chunks = self.chunks.extended(made)
        self.used_rows = max(self.used_rows, num_rows)
        if is_registered:
            is_full = self.num_rows - self.used_rows <= self.rows_per_chunk // 2
            self._prefetch(max(len(self.chunks) + is_full, -(-expected // self.rows_per_chunk)))
        return missing > 0

    def shrink(self, num_rows: int) -> None:
        """Free the chunks behind row `num_rows`. Allocates nothing."""
        needed = -(-num_rows // self.rows_per_chunk)
        held, self.used_rows = len(self.chunks), min(self.used_rows, num_rows)
        while len(self._spares) > 1:
            self._spares.pop()
        if needed < held:
            self.chunks = self.chunks.first(needed)  # first: every chunk in use has its address in the table
            if self._table is not None:
                self._table[needed:held].zero_()

    def release(self) -> None:
        """Free all rows. The address table keeps its address."""
        self.wait_for_kernels()
        self.chunks, self.used_rows, self._spares = ChunkList(), 0, deque()
        if self._table is not None:
            self._table.zero_()

    def copy_runs(self, starts: list[int], length: int, target: Tensor) -> None:
        """Copy rows [start, start + length) for each of `starts` to `target` [>= len(starts) * length, *row_shape], in order.

        Asynchronous on a GPU: registered host memory is read by the copy engine. Consecutive runs are one copy.
        """
        done = 0
        while starts:
            run = 1
            while run < len(starts) and starts[run] == starts[run - 1] + length:
                run += 1
            for rows in self.views(starts[0], starts[0] + run * length):
                target[done : done + len(rows)].copy_(rows, non_blocking=True)
                done += len(rows)
            starts = starts[run:]

    def copy_blocks(self, pairs: list[tuple[int, int]], length: int) -> None:
        """Copy rows [s * length, (s + 1) * length) to the place of block d, for each pair (s, d). A block lies in one chunk.

        Asynchronous on a GPU. No destination is a source.
        """
        if self.device.type == "cuda" and len(pairs) <= _MOST_BLOCK_COPIES:
            for pair in pairs:
                (source,), (destination,) = (self.views(block * length, (block + 1) * length) for block in pair)
                destination.copy_(source, non_blocking=True)
        elif pairs:
            source, destination = torch.tensor(pairs).T.unsqueeze(2) * length + torch.arange(length)
            self.put(destination, self.take(source))

    def views(self, first: int, stop: int) -> Iterator[Tensor]:
        """Rows [first, stop), as a view of each allocation that they lie in; of each chunk in registered memory."""
        return self.chunks.rows(first, stop)

    def move(self, device: torch.device, conversion: Conversion | None = None) -> None:
        """Move all chunks to another device and convert their rows if `conversion` is given. Writes to the address table.

        The compute device does not change. A move from CPU to CPU without conversion copies nothing.

        Raises:
            CapacityError: the host cannot page-lock the memory. Nothing has changed.
        """
        if conversion is not None:
            self._convert(device, conversion)
        elif not device.type == self.device.type == "cpu":
            self._copy_chunks(device)

    def unshare(self) -> None:
        """Copy all chunks if a fork may use them. Rows keep their ids.

        Raises:
            CapacityError: no memory for the copies. Nothing has changed.
        """
        if self.is_shared:
            self.wait_for_kernels()
            self._copy_chunks(self.device)

    def _copy_chunks(self, device: torch.device) -> None:
        moved = ChunkList(self._allocate(len(self.chunks), device))
        for copy, chunk in zip(moved, self.chunks, strict=True):
            copy.copy_(chunk)
        self._replace(device, moved)

    def _convert(self, device: torch.device, conversion: Conversion) -> None:
        """`move` with conversion. Unused rows are not converted."""
        old, at_once = self.chunks, max(1, _CONVERT_BYTES // self.row_bytes)
        moved = ChunkList(self._allocate(len(old), device, conversion.row_shape, conversion.dtype))
        for index, (copy, chunk) in enumerate(zip(moved, old, strict=True)):
            inside = min(self.rows_per_chunk, self.used_rows - index * self.rows_per_chunk)
            for first in range(0, inside, at_once):
                rows = slice(first, min(first + at_once, inside))
                copy[rows] = conversion.convert(chunk[rows])
        self._replace(device, moved, row_shape=conversion.row_shape, dtype=conversion.dtype, converted=True)

    def _replace(self, device: torch.device, moved: ChunkList, **layout: Any) -> None:
        """Replace the chunks. One update, so that an interruption leaves either the old state or the new one."""
        self._table_is_behind = True
        self._write_addresses(self._table, 0, moved)
        known = {"device": device, "chunks": moved, "is_shared": False, "_spares": deque()}
        self.__dict__.update(layout, _table_is_behind=False, **known)

    def fork(self) -> ChunkedArray:
        """An array with the same chunks. Both may grow; chunks that are added later are their own. Copies nothing."""
        self.is_shared = True
        return self._twin()

    def __deepcopy__(self, memo: dict[int, object]) -> ChunkedArray:
        """Copy the rows in use. The rest of the last chunk is not written, so on a CPU it takes no memory."""
        twin = self.new_empty()
        twin.grow(self.used_rows)
        self.wait_for_kernels()
        done = 0
        for copy in twin.views(0, self.used_rows):
            sources = list(self.views(done, done + len(copy)))
            for part, source in zip(copy.split([len(each) for each in sources]), sources, strict=True):
                part.copy_(source)
            done += len(copy)
        return twin

    def _new_slabs(self, count: int) -> list[Tensor]:
        """Slabs of at least `count` chunks: those that were allocated ahead, as far as there are any, and new ones."""
        slabs: list[Tensor] = []
        while self._spares and len(slabs) < count:  # a slab of registered memory is one chunk
            ahead = self._spares.popleft().take()
            if ahead is None:
                break
            slabs += [chunk[None] for chunk in ahead]
        return slabs + self._allocate(max(0, count - len(slabs)), self.device)

    def _allocate(
        self, count: int, device: torch.device, row_shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
    ) -> list[Tensor]:  # fmt: skip
        """Allocate slabs of `count` chunks on a device, by default of this array's row shape and dtype.

        Each chunk of registered memory is a slab: CUDA cannot copy across two registrations.
        """
        shape = (self.rows_per_chunk, *(self.row_shape if row_shape is None else row_shape))
        dtype = self.dtype if dtype is None else dtype
        chunk_bytes = math.prod(shape) * dtype.itemsize
        try:  # `allocating` takes longer, and a prompt makes hundreds of arrays
            if self.registers(device):
                return allocate_rows(count, (1, *shape), dtype, compute_device=self.compute_device)
            each = 1 if device.type == "cpu" else _chunks_per_slab(chunk_bytes, _GPU_SLAB_BYTES)
            sizes = (min(each, count - first) for first in range(0, count, each))
            return [torch.empty((number, *shape), dtype=dtype, device=device) for number in sizes]
        except (RuntimeError, MemoryError) as error:
            refuse("pages and summaries", count * chunk_bytes, error)
            raise

    def _prefetch(self, num_chunks: int) -> None:
        """Have chunks of registered memory below number `num_chunks` allocated ahead, so that growing does not wait."""
        if not self.chunks:
            return
        shape = (self.rows_per_chunk, *self.row_shape)
        each = _chunks_per_slab(self.rows_per_chunk * self.row_bytes, _SLAB_BYTES)
        first, stop = len(self.chunks) + sum(slab.count for slab in self._spares), min(num_chunks, MAX_CHUNKS)
        for number in range(first, stop, each):
            count = min(each, stop - number)
            slab = PREFETCHER.ask(shape, self.dtype, compute_device=self.compute_device, count=count, number=number)
            self._spares.append(slab)

    def _write_addresses(self, table: Tensor | None, first: int, chunks: ChunkList) -> None:
        """Write the addresses of chunks [first, first + len(chunks)) to `table`, if given."""
        if table is not None and chunks:
            with allocating("addresses of pages", 8 * len(chunks)):
                table[first : first + len(chunks)].copy_(chunks.addresses(), non_blocking=True)


def make_tables(arrays: list[ChunkedArray]) -> None:
    """Allocate the address tables that arrays of one compute device lack, with three launches for all of them."""
    missing = [array for array in arrays if array._table is None]
    if not missing:
        return
    shape, device = (len(missing), MAX_CHUNKS), missing[0].compute_device
    held = addresses_of([array.chunks for array in missing])
    with allocating("address tables", 8 * MAX_CHUNKS * len(missing)):
        made = _zeros(shape, dtype=torch.int64, device=device)
        made[:, : held.shape[1]].copy_(held, non_blocking=True)
    for array, table in zip(missing, made, strict=True):
        array._table = table


def _chunks_per_slab(chunk_bytes: int, slab_bytes: int) -> int:
    """Chunks that are allocated at once, where several are needed."""
    return max(1, slab_bytes // max(1, chunk_bytes))
