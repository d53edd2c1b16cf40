"""Copies rows of chunked arrays out and back in, by a kernel or by the host.

    take_all    the same rows of several arrays                      ->  one tensor
    put_all     tensors                                              ->  rows of several arrays, of any kinds
    writers     the same in two phases: allocates at once, writes without allocating

A kernel copies arrays of all layers in one launch. It also reads and writes registered host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..kernels.launch import RowCopy
from .chunk_list import ChunkList
from .host_register import wait_for_device


class RowArray:
    """What copies need of an array of rows. `ChunkedArray` says what the attributes are."""

    row_shape: tuple[int, ...]
    rows_per_chunk: int
    dtype: torch.dtype
    device: torch.device
    compute_device: torch.device
    chunks: ChunkList

    @property
    def address_table(self) -> Tensor:
        """Address of each chunk, on the compute device."""
        raise NotImplementedError

    @property
    def is_registered(self) -> bool:
        """Whether the rows are in host memory that the kernels of a GPU read directly."""
        return self.registers(self.device)

    def registers(self, device: torch.device) -> bool:
        """Whether rows on a device are registered. Quick if kernels compute there: a prompt asks hundreds of times."""
        return device is not self.compute_device and device.type == "cpu" and self.compute_device.type == "cuda"

    def take(self, rows: Tensor) -> Tensor:
        """Copy rows (int64 ids, any device): [*rows.shape, *row_shape], on the device of `rows`."""
        return take_all([self], rows)[0]

    def put(self, rows: Tensor, values: Tensor) -> None:
        """Write `values` [*rows.shape, *row_shape] to distinct rows."""
        put_all([Put([self], rows, values[None])])

    def wait_for_kernels(self) -> None:
        """Synchronize before the host accesses registered memory, which kernels read and write directly."""
        if self.is_registered and torch.cuda.is_initialized():
            wait_for_device(self.compute_device)

    def copiers(self, rows: Tensor) -> Callable[..., list[Callable[[], None]]] | None:
        """Launcher of the kernel that copies rows; None if the host copies them.

        The host copies if there are no kernels, or if both the rows and their ids are in host memory.
        """
        if self.compute_device.type != "cuda" or (self.is_registered and rows.device.type == "cpu"):
            return None
        launch = kernels.launchers(self.compute_device)
        return None if launch is None else launch.rows_copiers


class Put(NamedTuple):
    """Contents of the same rows of several arrays, which have the same row shape, dtype, chunk size and devices.

    Attributes:
        rows: int64 ids, distinct.
        values: [arrays, *rows.shape, *row_shape].
    """

    arrays: Sequence[RowArray]
    rows: Tensor
    values: Tensor


def take_all(arrays: Sequence[RowArray], rows: Tensor) -> Tensor:
    """Copy the same rows of several arrays: [arrays, *rows.shape, *row_shape], on the device of `rows`.

    The arrays must be alike, as those of a `Put`.
    """
    first = arrays[0]
    copiers = first.copiers(rows)
    if copiers is None:
        for array in arrays:
            array.wait_for_kernels()
        each = [kernels.take_rows(array.chunks, rows.to(array.device)).to(rows.device) for array in arrays]
        return each[0][None] if len(each) == 1 else torch.stack(each)
    taken = torch.empty((len(arrays), *rows.shape, *first.row_shape), dtype=first.dtype, device=first.compute_device)
    for copy in copiers([[_row_copy(arrays, rows, taken)]], put=False):
        copy()
    return taken.to(rows.device)


def put_all(puts: Sequence[Put]) -> None:
    """Write several contents. All arrays have one compute device, and all puts equally many arrays."""
    (write,) = writers(puts)
    write()


def writers(*groups: Sequence[Put]) -> list[Callable[[], None]]:
    """Prepare `put_all` of each group. The returned functions do the writing and allocate nothing."""
    by_kernel: list[list[RowCopy]] = []
    by_host: list[list[Callable[[], None]]] = []
    launch = None
    for group in groups:
        by_kernel.append([])
        by_host.append([])
        for arrays, rows, values in group:
            copiers = arrays[0].copiers(rows)
            if copiers is not None:
                launch = copiers
                by_kernel[-1].append(_row_copy(arrays, rows, values.to(arrays[0].compute_device, arrays[0].dtype)))
                continue
            for array, content in zip(arrays, values, strict=True):
                array.wait_for_kernels()
                content = content.to(array.device, array.dtype)
                by_host[-1].append(kernels.rows_to_put(array.chunks, rows.to(array.device), content))
    if launch is not None:
        for writes, copy in zip(by_host, launch(by_kernel, put=True), strict=True):
            writes.append(copy)

    def writer(writes: list[Callable[[], None]]) -> Callable[[], None]:
        def write() -> None:
            for each in writes:
                each()

        return write

    return [writer(writes) for writes in by_host]


def _row_copy(arrays: Sequence[RowArray], rows: Tensor, packed: Tensor) -> RowCopy:
    first = arrays[0]
    tables = [array.address_table for array in arrays]
    return RowCopy(tables, first.rows_per_chunk, rows.to(first.compute_device).contiguous(), packed.contiguous())
