"""Registering host memory with CUDA: page-locked, and readable by every device.

    register      relaxed capture mode -> cudaHostRegister
    unregister    wait for the device -> relaxed capture mode -> cudaHostUnregister

Slabs know a `Registrar` only, so that all they do is tested without a GPU.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from ..errors import CapacityError

ONE_AT_A_TIME = threading.RLock()
"""Held by a thread that captures a CUDA graph, or waits for the whole device, which would spoil another's capture."""

_PORTABLE, _MAPPED = 1, 2  # cudaHostRegisterPortable, cudaHostRegisterMapped
_CAPTURE_RELAXED = 2  # cudaStreamCaptureModeRelaxed


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
        wait_for_device(self.device)  # kernels may still read it, and cudaHostUnregister need not wait for them
        with torch.cuda.device(self.device), _allowed_during_capture():
            if int(torch.cuda.cudart().cudaHostUnregister(address)):
                _clear_last_error()

    def capturing(self) -> bool:
        """Whether the calling thread is capturing a CUDA graph."""
        return torch.cuda.is_current_stream_capturing()


def wait_for_device(device: torch.device) -> None:
    """Wait for all work on a device, but not while another thread captures a graph."""
    with ONE_AT_A_TIME:
        torch.cuda.synchronize(device)


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
