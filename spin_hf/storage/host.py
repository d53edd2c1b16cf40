"""Host memory that a CUDA device reads by itself: the cpu tier's chunks, page-locked in slabs and ahead of need.

    slab     one anonymous mapping, in huge pages, registered with CUDA
             | chunk 0       .| chunk 1       .| chunk 2       .|      each starts at a multiple of 4096 bytes
    tensors  views of the chunks; the last one that dies gives the slab back: GPU idle, unregistered, unmapped
    spare    one chunk of an array, made by a background thread while the array's last chunk fills

Why not `pin_memory=True`: it lets the driver touch the pages one by one in one thread and rounds up to powers of two.
Here threads touch the pages, so that what is left to the driver is to lock few huge ones.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import mmap
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Protocol

import torch
from torch import Tensor

from ..errors import CapacityError

PAGE = max(4096, mmap.PAGESIZE)
"""Bytes to which slabs and chunks are aligned and rounded up."""
HUGE_PAGE = 2 << 20
"""Bytes of a transparent huge page; slabs of at least one start at a multiple of it."""

_MAX_TOUCH_THREADS = 16
_THREAD_PREFIX = "spin_hf-host-"
_PORTABLE, _MAPPED = 1, 2  # cudaHostRegisterPortable, cudaHostRegisterMapped
_CAPTURE_RELAXED = 2  # cudaStreamCaptureModeRelaxed


# ------------------------------------------------------------------------------------------------------ calls to CUDA


class Registrar(Protocol):
    """What a slab asks of CUDA."""

    def register(self, address: int, num_bytes: int) -> None:
        """Page-lock [address, address + num_bytes). Raises CapacityError, with nothing locked."""

    def unregister(self, address: int) -> None:
        """Undo `register`, once no device work is under way that may read the memory."""

    def capturing(self) -> bool:
        """Whether the calling thread is capturing a CUDA graph, which waiting for the device would spoil."""


class CudaRegistrar:
    """Registers memory for all CUDA devices, through the context of one.

    Args:
        device: the CUDA device whose kernels read the memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def register(self, address: int, num_bytes: int) -> None:
        """Page-lock and map [address, address + num_bytes).

        Raises:
            CapacityError: the driver refused; no memory is locked and CUDA's error state is clear.
        """
        cudart = torch.cuda.cudart()
        # A thread without a current device would make a context on device 0.
        with torch.cuda.device(self.device), _allowed_during_capture():
            code = int(cudart.cudaHostRegister(address, num_bytes, _PORTABLE | _MAPPED))
            if code:
                _clear_last_error()
        if code:
            raise CapacityError(
                f"page-locking {num_bytes} bytes ({num_bytes / 2**30:.2f} GiB) of host memory for the cpu tier was "
                f"refused: CUDA says {cudart.cudaGetErrorString(cudart.cudaError(code))!r} (error {code}); raise the "
                "limit on locked memory (`ulimit -l`), free host memory, raise gpu_memory, or shorten the context"
            )

    def unregister(self, address: int) -> None:
        """Wait for the device, then unlock the memory. Raises RuntimeError where CUDA has failed."""
        torch.cuda.synchronize(self.device)  # kernels may still read it, and cudaHostUnregister need not wait for them
        with torch.cuda.device(self.device), _allowed_during_capture():
            if int(torch.cuda.cudart().cudaHostUnregister(address)):
                _clear_last_error()

    def capturing(self) -> bool:
        """Whether the calling thread is capturing a CUDA graph."""
        return torch.cuda.is_current_stream_capturing()


def _runtime_function(name: str) -> Callable[..., int] | None:
    """A function of the CUDA runtime that torch has loaded but does not wrap; None where it cannot be found."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no name for "this process"
        return None
    return function


def _clear_last_error() -> None:
    """Else the next kernel launch of this thread would report an error that has been dealt with."""
    get_last_error = _runtime_function("cudaGetLastError")
    if get_last_error is not None:
        get_last_error()


@contextmanager
def _allowed_during_capture() -> Iterator[None]:
    """Let this thread page-lock while another one captures a graph; by default CUDA would fail that capture."""
    exchange = _runtime_function("cudaThreadExchangeStreamCaptureMode")
    mode = ctypes.c_int(_CAPTURE_RELAXED)
    if exchange is not None:
        exchange(ctypes.byref(mode))  # now `mode` is what it was before
    try:
        yield
    finally:
        if exchange is not None:
            exchange(ctypes.byref(mode))


# -------------------------------------------------------------------------------------------------------------- slabs

_mappings: dict[int, mmap.mmap] = {}
"""The mapping of each registered slab, by the slab's address."""
_dropped: deque[tuple[Registrar, int]] = deque()
"""Slabs that no tensor views any more, to be given back as soon as that may be done."""


class HostSlab:
    """Registered host memory, as a tensor.

    The tensor's storage keeps the memory: it is given back when the slab and the last view of `tensor` are gone (and
    no CUDA graph is being captured; else with the next slab that comes or goes). It is not mapped in forked children.

    Args:
        num_bytes: its size, > 0.
        registrar: registers it.

    Attributes:
        tensor: [num_bytes], uint8, on the CPU; its content is undefined.

    Raises:
        CapacityError: there is not so much memory, or the registrar refused; nothing stays mapped.
    """

    def __init__(self, num_bytes: int, registrar: Registrar) -> None:
        _give_back_dropped()
        size = _round_up(num_bytes, PAGE)
        alignment = HUGE_PAGE if size >= HUGE_PAGE else PAGE
        mapping = _map(size + alignment - PAGE)
        try:
            address = _round_up(ctypes.addressof(ctypes.c_char.from_buffer(mapping)), alignment)
            _touch(address, size)
            registrar.register(address, size)
        except BaseException:
            mapping.close()
            raise
        _mappings[address] = mapping
        # The array only borrows the memory. A finalizer of the mapping itself would run after it has unmapped.
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        weakref.finalize(memory, _drop, registrar, address).atexit = False
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
    memory = HostSlab(num_chunks * stride, CudaRegistrar(compute_device)).tensor
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


def _touch(address: int, num_bytes: int) -> None:
    """Write all of the memory, in pieces of whole huge pages: the time goes into clearing pages, in the kernel."""
    threads = min(_MAX_TOUCH_THREADS, os.cpu_count() or 1)
    piece = _round_up(-(-num_bytes // threads), HUGE_PAGE)
    firsts = range(0, num_bytes, piece)
    if len(firsts) == 1:
        ctypes.memset(address, 0, num_bytes)
        return
    with ThreadPoolExecutor(len(firsts), thread_name_prefix=_THREAD_PREFIX) as pool:
        # ctypes lets go of the GIL during the call
        for _ in pool.map(lambda first: ctypes.memset(address + first, 0, min(piece, num_bytes - first)), firsts):
            pass  # reading the results raises what a thread raised


def _drop(registrar: Registrar, address: int) -> None:
    """No tensor views the slab any more. Takes no lock: the garbage collector may call it anywhere."""
    if address in _mappings:
        _dropped.append((registrar, address))
        _give_back_dropped()


def _give_back_dropped() -> None:
    """Unregister and unmap what was dropped; nothing is done where waiting for the device could spoil a capture.

    A thread cannot see whether another one captures; so what the garbage collector finds in a background thread is
    left to the others.
    """
    if threading.current_thread().name.startswith(_THREAD_PREFIX):
        return
    while _dropped:
        try:
            registrar, address = _dropped.popleft()
        except IndexError:  # another thread was faster
            return
        with suppress(RuntimeError):  # CUDA has failed for good: there is nothing left to wait for
            if registrar.capturing():
                _dropped.append((registrar, address))
                return
            registrar.unregister(address)
        mapping = _mappings.pop(address, None)
        if mapping is not None:
            mapping.close()


def _leave_mapped() -> None:
    """Neither unregister nor unmap from now on: the process ends, or is a forked child.

    At the end the system takes everything back at once, and tensors may still be in use. In a child the addresses are
    not the slabs' any more, and unmapping would hit what has taken their place.
    """
    for mapping in list(_mappings.values()):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapping))  # survives the clearing of modules, which would unmap
    _mappings.clear()
    _dropped.clear()


# ----------------------------------------------------------------------------------------------------- ahead of need


class Spare:
    """A chunk that is made ahead of need. Whoever lets go of it lets go of the chunk.

    Args:
        make: makes the chunk.
    """

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._chunk: Tensor | None = None
        self._closed = False
        self._lock = threading.Lock()

    def fill(self) -> None:
        """Make the chunk, unless `take` came first. An error is dropped: the taker makes its own chunk and meets it."""
        with self._lock:
            if not self._closed:
                with suppress(Exception):
                    self._chunk = self._make()

    def take(self) -> Tensor | None:
        """The chunk, or None where it could not be made or its making has not begun; waits for a making under way.

        Only the first call can return a chunk.
        """
        with self._lock:
            self._closed = True
            chunk, self._chunk = self._chunk, None
            return chunk


class SlabReserve:
    """Fills spares in one background thread, in the order of asking, for all arrays of the process.

    It holds no spare itself, so there are never more than the arrays keep.

    Args:
        allocate: makes chunks, see `allocate_rows`.
    """

    def __init__(self, allocate: Callable[..., list[Tensor]] = allocate_rows) -> None:
        self._allocate = allocate
        self.reset()

    def reset(self) -> None:
        """Begin anew: a forked child has no such thread, and may have a lock that the thread held."""
        self._asked: deque[weakref.ref[Spare]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def ask(self, chunk_shape: Sequence[int], dtype: torch.dtype, *, compute_device: torch.device) -> Spare:
        """A spare that will be filled soon; returns at once and raises nothing of what happens later."""
        shape = tuple(chunk_shape)
        spare = Spare(lambda: self._allocate(1, shape, dtype, compute_device=compute_device)[0])
        with self._changed:
            if not self._stopped:
                self._asked.append(weakref.ref(spare))
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name=f"{_THREAD_PREFIX}ahead", daemon=True)
                    self._thread.start()
                self._changed.notify()
        return spare

    def stop(self) -> None:
        """End the thread, after the spare that it is making; later spares stay empty."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked or self._stopped)
                if self._stopped:
                    return
                spare = self._asked.popleft()()
            if spare is not None:
                spare.fill()
            del spare  # while the thread waits it must not keep one that nobody wants


RESERVE = SlabReserve()
"""The reserve of this process."""


@atexit.register
def _at_exit() -> None:
    """No thread of ours may be inside the driver while the process takes itself apart."""
    RESERVE.stop()
    _leave_mapped()


def _in_child() -> None:
    RESERVE.reset()
    _leave_mapped()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_in_child)
