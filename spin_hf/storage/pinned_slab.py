"""Host memory that a CUDA device reads by itself: the cpu tier's chunks, page-locked in slabs.

    slab     one anonymous mapping, in huge pages
             | chunk 0       .| chunk 1       .| chunk 2       .| chunk 3  .|    each starts at a multiple of 4096 bytes
    pieces   [ 0                               ] [ 1                        ]    each registered with CUDA by itself
    threads  populate ------------------------> populate ->                      in tasks, in the order of addresses
    caller        register 0 ------------------> register 1                      a piece as soon as its tasks are done
    tensors  views of the chunks; the last one that dies gives the slab back: GPU idle, unregistered, unmapped

Why not `pin_memory=True`: it lets the driver touch the pages one by one in one thread and rounds up to powers of two.
Here threads have the kernel clear the pages, while what is left to the driver is to lock few huge ones.

A kernel reads across pieces, as it uses addresses; one copy by CUDA must stay inside a piece. So a chunk does.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from ..errors import CapacityError
from .host_register import ONE_AT_A_TIME, CudaRegistrar, Registrar

PAGE = max(4096, mmap.PAGESIZE)
"""Bytes to which slabs and chunks are aligned and rounded up."""
HUGE_PAGE = 2 << 20
"""Bytes of a transparent huge page; slabs of at least one start at a multiple of it."""
PIECE_BYTES = 512 << 20
"""Bytes registered at a time: a larger piece overlaps less with touching, a smaller one costs more calls of the driver."""
THREAD_PREFIX = "spin_hf-host-"
"""How the names of background threads begin."""

_TASK_BYTES = 32 << 20
"""Bytes that a thread touches at a time."""
_MAX_TOUCH_THREADS = 16
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap has no name for it

_mappings: dict[int, mmap.mmap] = {}
"""The mapping of each registered slab, by the slab's address."""
_dropped: deque[tuple[Registrar, int, list[int]]] = deque()
"""Slabs, with their registered pieces, that no tensor views any more: to be given back as soon as that may be done."""


class HostSlab:
    """Registered host memory, as a tensor.

    The tensor's storage keeps the memory: it is given back when the slab and the last view of `tensor` are gone (and
    no CUDA graph is being captured; else with the next slab that comes or goes). It is not mapped in forked children.

    Args:
        num_bytes: its size, > 0.
        registrar: registers it, in pieces of about PIECE_BYTES.
        unit_bytes: a multiple of PAGE; pieces end at multiples of it, so that what lies inside a unit can be copied by CUDA.

    Attributes:
        tensor: [num_bytes], uint8, on the CPU; its content is undefined.

    Raises:
        CapacityError: there is not so much memory, or the registrar refused; nothing stays mapped or registered (while a
            CUDA graph is captured: until the next slab comes or goes).
    """

    def __init__(self, num_bytes: int, registrar: Registrar, unit_bytes: int = PAGE) -> None:
        give_back_dropped()
        size = _round_up(num_bytes, PAGE)
        alignment = HUGE_PAGE if size >= HUGE_PAGE else PAGE
        mapping = _map(size + alignment - PAGE)
        address = _round_up(ctypes.addressof(ctypes.c_char.from_buffer(mapping)), alignment)
        pieces: list[int] = []
        try:
            _touch_and_register(address, size, unit_bytes, registrar, pieces)
        except BaseException:
            if pieces:  # they go the way of a slab, which spoils no capture
                _mappings[address] = mapping
                _drop(registrar, address, pieces)
            else:
                mapping.close()
            raise
        _mappings[address] = mapping
        # The array only borrows the memory. A finalizer of the mapping itself would run after it has unmapped.
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        weakref.finalize(memory, _drop, registrar, address, pieces).atexit = False
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)


def allocate_rows(
    num_chunks: int, chunk_shape: Sequence[int], dtype: torch.dtype, *, compute_device: torch.device
) -> list[Tensor]:
    """Chunks in host memory; those of a CUDA compute device are registered with it and share one slab.

    Args:
        num_chunks: how many, >= 0.
        chunk_shape: shape of each.
        compute_device: the device that works on them.

    Returns:
        Contiguous CPU tensors of undefined content. In a slab each starts at a multiple of 4096 bytes, and the slab
        stays as long as one of them does.

    Raises:
        CapacityError: the host has not so much memory to lock.
    """
    chunk_bytes = math.prod(chunk_shape) * dtype.itemsize
    if compute_device.type != "cuda" or num_chunks * chunk_bytes == 0:
        return [torch.empty(tuple(chunk_shape), dtype=dtype) for _ in range(num_chunks)]
    stride = _round_up(chunk_bytes, PAGE)
    memory = HostSlab(num_chunks * stride, CudaRegistrar(compute_device), stride).tensor
    parts = (memory[first : first + chunk_bytes] for first in range(0, num_chunks * stride, stride))
    return [part.view(dtype).view(tuple(chunk_shape)) for part in parts]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _map(num_bytes: int) -> mmap.mmap:
    """Private zeroed memory, in huge pages and not copied by fork where the platform can do that."""
    try:
        if sys.platform == "win32":
            return mmap.mmap(-1, num_bytes)
        mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise CapacityError(
            f"the system has not the {num_bytes} bytes ({num_bytes / 2**30:.2f} GiB) of host memory that the cpu tier "
            f"needs: {error}; free host memory, raise gpu_memory, or shorten the context"
        ) from error
    # DONTFORK: Linux cannot share locked pages with a child and copies them, so a fork (`!command` in a notebook)
    # would take as much memory again.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice):
            with suppress(OSError):  # a kernel built without it
                mapping.madvise(getattr(mmap, advice))
    return mapping


def _touch_and_register(address: int, size: int, unit_bytes: int, registrar: Registrar, pieces: list[int]) -> None:
    """Have all pages there and registered. Threads touch them in the order of addresses; this one registers behind them.

    Args:
        pieces: takes the address of each piece that was registered, also where a later one fails.
    """
    threads = min(_MAX_TOUCH_THREADS, os.cpu_count() or 1)
    task = min(_TASK_BYTES, _round_up(-(-size // threads), HUGE_PAGE))
    piece = unit_bytes * max(1, PIECE_BYTES // unit_bytes)
    if size <= task:
        _touch(address, size)
        _register(address, size, size, registrar, pieces)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix=THREAD_PREFIX) as pool:
        try:
            touching = pool.map(lambda first: _touch(address + first, min(task, size - first)), range(0, size, task))
            touched = 0
            for first in range(0, size, piece):
                while touched < min(first + piece, size):
                    next(touching)  # raises what a thread raised
                    touched += task
                _register(address + first, min(piece, size - first), size, registrar, pieces)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # waits: nobody may touch what will be unmapped
            raise


def _register(address: int, num_bytes: int, size: int, registrar: Registrar, pieces: list[int]) -> None:
    """Register the next piece of a slab of `size` bytes."""
    pieces.append(address)  # before the call: an interrupt may come between it and whatever follows
    try:
        registrar.register(address, num_bytes)
    except Exception as error:
        pieces.pop()
        if not pieces or not isinstance(error, CapacityError):
            raise
        raise CapacityError(
            f"the cpu tier needs {size} bytes ({size / 2**30:.2f} GiB) of page-locked host memory at once, and got "
            f"{address - pieces[0]} of them: {error}"
        ) from error


def _touch(address: int, num_bytes: int) -> None:
    """Have the kernel provide pages; the time goes into clearing them. The GIL is free meanwhile.

    Raises:
        CapacityError: there are no more.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), _MADV_POPULATE_WRITE) == 0:
            return
        if ctypes.get_errno() == errno.ENOMEM:
            raise CapacityError(
                f"the system has not the {num_bytes} bytes more of host memory that the cpu tier needs; free host memory, "
                "raise gpu_memory, or shorten the context"
            )
    ctypes.memset(address, 0, num_bytes)  # no such advice here: a page is there once it is written


def _drop(registrar: Registrar, address: int, pieces: list[int]) -> None:
    """No tensor views the slab any more. Takes no lock: the garbage collector may call it anywhere."""
    if address in _mappings:
        _dropped.append((registrar, address, pieces))
        give_back_dropped()


def give_back_dropped() -> None:
    """Unregister and unmap what was dropped; nothing is done where waiting for the device could spoil a capture.

    The garbage collector may call this in any thread, whatever that holds, so it does not wait for one that captures.
    Background threads leave it to the others.
    """
    if threading.current_thread().name.startswith(THREAD_PREFIX):
        return
    while _dropped and ONE_AT_A_TIME.acquire(blocking=False):
        try:
            registrar, address, pieces = _dropped.popleft()
            with suppress(RuntimeError):  # CUDA has failed for good: there is nothing left to wait for
                if registrar.capturing():
                    _dropped.append((registrar, address, pieces))
                    return
                for piece in pieces:
                    registrar.unregister(piece)
            mapping = _mappings.pop(address, None)
            if mapping is not None:
                mapping.close()
        except IndexError:  # another thread was faster
            return
        finally:
            ONE_AT_A_TIME.release()


def leave_mapped() -> None:
    """Neither unregister nor unmap from now on: the process ends, or is a forked child.

    At the end the system takes everything back at once, and tensors may still be in use. In a child the addresses are
    not the slabs' any more, and unmapping would hit what has taken their place.
    """
    for mapping in list(_mappings.values()):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapping))  # survives the clearing of modules, which would unmap
    _mappings.clear()
    _dropped.clear()
