"""Page-locked host memory for chunks of the cpu tier, allocated in slabs. CUDA kernels read it directly.

    slab     one anonymous mapping, in huge pages
             | chunk 0       .| chunk 1       .| chunk 2       .| chunk 3  .|    each starts at a multiple of 4096 bytes
    pieces   [ 0                               ] [ 1                        ]    each registered with CUDA separately
    threads  populate ------------------------> populate ->                      tasks in address order
    caller        register 0 ------------------> register 1                      a piece once its tasks are done
    tensors  views of the chunks; when the last one is freed: synchronize the GPU, unregister, unmap

Why not `pin_memory=True`: the driver then faults in the pages one by one in one thread, and torch rounds sizes up to powers of
two. Here threads have the OS populate huge pages in parallel, and the driver only locks a few huge pages.

Kernels may read across pieces, but one CUDA copy must stay inside a piece. A chunk never crosses a piece boundary.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CapacityError
from .host_register import ONE_AT_A_TIME, CudaRegistrar, Registrar

PAGE = max(4096, mmap.PAGESIZE)
"""Alignment and size granularity of slabs and chunks, in bytes."""
HUGE_PAGE = 2 << 20
"""Bytes of a transparent huge page. Slabs of at least this size are aligned to it."""
PIECE_BYTES = 512 << 20
"""Bytes registered at a time. Larger pieces overlap less with populating; smaller ones need more driver calls."""
THREAD_PREFIX = "spin_hf-host-"
"""Name prefix of background threads."""

_TASK_BYTES = 32 << 20
"""Bytes that a thread populates at a time."""
_MAX_TOUCH_THREADS = 16
_THREADED_BYTES = 256 << 20
"""Slabs from this size on are populated by several threads. For smaller ones, starting the threads would take longer, and many
threads that start keep the interpreter from the thread that launches kernels."""
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap has no name for it

_mappings: dict[int, mmap.mmap] = {}
"""Mapping of each registered slab, by slab address."""
_dropped: deque[tuple[Registrar, int, list[int]]] = deque()
"""Slabs without views, with their registered pieces. They are freed as soon as no capture is running."""


class HostSlab:
    """Registered host memory as a tensor.

    The tensor's storage owns the memory. It is freed with the slab and the last view of `tensor`; during a CUDA graph capture,
    when the next slab is allocated or freed. Forked children do not map the memory.

    Args:
        num_bytes: size, > 0.
        registrar: registers the memory, in pieces of about PIECE_BYTES.
        unit_bytes: a multiple of PAGE. Pieces end at multiples of it, so a unit can be copied by one CUDA copy.

    Attributes:
        tensor: [num_bytes], uint8, on the CPU, uninitialized.

    Raises:
        CapacityError: not enough memory, or the registrar refused. Nothing stays mapped or registered; during a capture, until
            the next slab is allocated or freed.
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
            if pieces:  # freed like a slab, as unregistering could break a capture
                _mappings[address] = mapping
                _drop(registrar, address, pieces)
            else:
                mapping.close()
            raise
        _mappings[address] = mapping
        # `memory` borrows the mapping. A finalizer on the mapping itself would run after it was unmapped.
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        weakref.finalize(memory, _drop, registrar, address, pieces).atexit = False
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)


def allocate_rows(
    num_chunks: int, chunk_shape: Sequence[int], dtype: torch.dtype, *, compute_device: torch.device
) -> list[Tensor]:
    """Allocate chunks in host memory. For a CUDA compute device they are registered and share one slab.

    Args:
        num_chunks: number of chunks, >= 0.
        chunk_shape: shape of each.
        compute_device: device of the kernels that read them.

    Returns:
        Contiguous, uninitialized CPU tensors. In a slab each starts at a multiple of 4096 bytes, and the slab lives as long as
        any of them.

    Raises:
        CapacityError: the host cannot provide or page-lock the memory.
    """
    if compute_device.type != "cuda" or not num_chunks or 0 in chunk_shape:
        return [torch.empty(tuple(chunk_shape), dtype=dtype) for _ in range(num_chunks)]
    chunk_bytes = math.prod(chunk_shape) * dtype.itemsize
    key = slab_key(num_chunks, chunk_bytes, compute_device)
    prepared, stride = PREPARED.get(key), key.unit_bytes
    slab = None if prepared is None else prepared()
    memory = (make_slab(key) if slab is None else slab).tensor
    chunks = (memory[first : first + chunk_bytes] for first in range(0, num_chunks * stride, stride))
    return [chunk.view(dtype).view(tuple(chunk_shape)) for chunk in chunks]


class SlabKey(NamedTuple):
    """What determines a slab: its size, the unit that one CUDA copy may take, and the device of the kernels."""

    num_bytes: int
    unit_bytes: int
    device: torch.device


def slab_key(num_chunks: int, chunk_bytes: int, device: torch.device) -> SlabKey:
    """The slab of chunks of a size."""
    stride = _round_up(chunk_bytes, PAGE)
    return SlabKey(num_chunks * stride, stride, device)


def make_slab(key: SlabKey) -> HostSlab:
    """Map, populate and register a slab. Raises as `HostSlab`."""
    return HostSlab(key.num_bytes, CudaRegistrar(key.device), key.unit_bytes)


PREPARED: dict[SlabKey, Callable[[], HostSlab | None]] = {}
"""Functions that give slabs which were made ahead, or None (`slabs_ahead.py`)."""


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _map(num_bytes: int) -> mmap.mmap:
    """Map private zeroed memory; with huge pages and not inherited by fork, where the platform supports that."""
    try:
        if sys.platform == "win32":
            return mmap.mmap(-1, num_bytes)
        mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise CapacityError(
            f"the system could not provide {num_bytes} bytes ({num_bytes / 2**30:.2f} GiB) of host memory that the cpu tier "
            f"needs: {error}; free host memory, raise gpu_memory, or shorten the context"
        ) from error
    # DONTFORK: Linux copies locked pages on fork instead of sharing them, so a fork (`!command` in a notebook) would double
    # the memory.
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice):
            with suppress(OSError):  # the OS kernel was built without it
                mapping.madvise(getattr(mmap, advice))
    return mapping


def _touch_and_register(address: int, size: int, unit_bytes: int, registrar: Registrar, pieces: list[int]) -> None:
    """Populate and register all pages. Threads populate them in address order; this thread registers behind them.

    Args:
        pieces: receives the address of each registered piece, also if a later one fails.
    """
    threads = min(_MAX_TOUCH_THREADS, os.cpu_count() or 1) if size >= _THREADED_BYTES else 1
    task = min(_TASK_BYTES, _round_up(-(-size // threads), HUGE_PAGE))
    piece = unit_bytes * max(1, PIECE_BYTES // unit_bytes)
    if size <= task or size < _THREADED_BYTES:
        _touch(address, size)
        for first in range(0, size, piece):
            _register(address + first, min(piece, size - first), size, registrar, pieces)
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
            pool.shutdown(cancel_futures=True)  # waits: no thread may touch memory that will be unmapped
            raise


def _register(address: int, num_bytes: int, size: int, registrar: Registrar, pieces: list[int]) -> None:
    """Register the next piece of a slab of `size` bytes."""
    pieces.append(address)  # before the call: an interrupt may arrive right after it
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
    """Have the OS populate pages, which spends its time on zeroing them. Releases the GIL meanwhile.

    Raises:
        CapacityError: the host has no more memory.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), _MADV_POPULATE_WRITE) == 0:
            return
        if ctypes.get_errno() == errno.ENOMEM:
            raise CapacityError(
                f"the system could not provide {num_bytes} bytes more of host memory that the cpu tier needs; free host "
                "memory, raise gpu_memory, or shorten the context"
            )
    ctypes.memset(address, 0, num_bytes)  # MADV_POPULATE_WRITE is not supported here: writing populates the pages


def _drop(registrar: Registrar, address: int, pieces: list[int]) -> None:
    """Queue a slab without views to be freed. Blocks on no lock: the garbage collector may call this anywhere."""
    if address in _mappings:
        _dropped.append((registrar, address, pieces))
        give_back_dropped()


def give_back_dropped() -> None:
    """Unregister and unmap dropped slabs. Does nothing if synchronizing could break a capture.

    The garbage collector may call this in any thread, with any lock held, so it never waits for a capturing thread. In
    background threads it does nothing.
    """
    if threading.current_thread().name.startswith(THREAD_PREFIX):
        return
    while _dropped and ONE_AT_A_TIME.acquire(blocking=False):
        try:
            registrar, address, pieces = _dropped.popleft()
            with suppress(RuntimeError):  # CUDA has failed for good: no work is left to wait for
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
    """Stop unregistering and unmapping: the process is exiting, or is a forked child.

    At exit the OS frees everything and tensors may still be in use. In a child the slabs are not mapped, so unmapping would hit
    other memory at their addresses.
    """
    for mapping in list(_mappings.values()):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapping))  # module teardown would unmap it
    _mappings.clear()
    _dropped.clear()
    PREPARED.clear()
