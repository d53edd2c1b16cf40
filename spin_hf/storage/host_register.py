"""Host memory registration with CUDA: page-locks the memory and maps it for all devices.

    register      relaxed capture mode -> cudaHostRegister
    unregister    wait for the device -> relaxed capture mode -> cudaHostUnregister

Slabs depend on the `Registrar` protocol only, so they are tested without a GPU.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from ..errors import CapacityError

ONE_AT_A_TIME = threading.RLock()
"""Held while a thread captures a CUDA graph or synchronizes the device. Synchronizing would break another thread's capture."""

_PORTABLE, _MAPPED = 1, 2  # cudaHostRegisterPortable, cudaHostRegisterMapped
_CAPTURE_RELAXED = 2  # cudaStreamCaptureModeRelaxed


class Registrar(Protocol):
    """CUDA operations that a slab needs."""

    def register(self, address: int, num_bytes: int) -> None:
        """Page-lock [address, address + num_bytes). On CapacityError nothing is locked."""

    def unregister(self, address: int) -> None:
        """Undo `register`. Waits for device work that may read the memory."""

    def capturing(self) -> bool:
        """Whether the calling thread is capturing a CUDA graph. It must not synchronize then."""


class CudaRegistrar(Registrar):
    """Registers memory for all CUDA devices, through the context of one device.

    Args:
        device: CUDA device of the kernels that read the memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def register(self, address: int, num_bytes: int) -> None:
        """Page-lock and map [address, address + num_bytes).

        Raises:
            CapacityError: the driver refused; no memory is locked and CUDA's error state is clear.
        """
        cudart = torch.cuda.cudart()
        # Without this, a thread with no current device would create a context on device 0.
        with torch.cuda.device(self.device), allowed_during_capture():
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
        """Synchronize the device, then unlock the memory. Raises RuntimeError if CUDA has failed."""
        wait_for_device(self.device)  # kernels may still read it, and cudaHostUnregister may not wait for them
        with torch.cuda.device(self.device), allowed_during_capture():
            if int(torch.cuda.cudart().cudaHostUnregister(address)):
                _clear_last_error()

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()


def wait_for_device(device: torch.device) -> None:
    """Synchronize a device, after any CUDA graph capture of another thread."""
    with ONE_AT_A_TIME:
        torch.cuda.synchronize(device)


def wait_for_stream(device: torch.device) -> None:
    """Synchronize the current stream of a device, after any CUDA graph capture of another thread. No-op for a CPU."""
    if device.type == "cuda":
        with ONE_AT_A_TIME:
            torch.cuda.current_stream(device).synchronize()


def work_so_far(devices: Iterable[torch.device]) -> Callable[[], None]:
    """A function that waits for what the current streams of CUDA devices have to do now. It disturbs no capture."""
    events = []
    for device in {device for device in devices if device.type == "cuda"}:
        event = torch.cuda.Event(blocking=True)  # the thread sleeps while it waits
        event.record(torch.cuda.current_stream(device))
        events.append(event)

    def wait() -> None:
        for event in events:
            event.synchronize()

    return wait


def _runtime_function(name: str) -> Callable[..., int] | None:
    """A CUDA runtime function that torch loads but does not wrap; None if it is not found."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no name for "this process"
        return None
    return function


def _clear_last_error() -> None:
    """Clear CUDA's last error. Otherwise the next kernel launch of this thread would report a handled error."""
    get_last_error = _runtime_function("cudaGetLastError")
    if get_last_error is not None:
        get_last_error()


@contextmanager
def allowed_during_capture() -> Iterator[None]:
    """Allow page-locking while another thread captures a graph. By default CUDA would invalidate that capture."""
    exchange = _runtime_function("cudaThreadExchangeStreamCaptureMode")
    mode = ctypes.c_int(_CAPTURE_RELAXED)
    if exchange is not None:
        exchange(ctypes.byref(mode))  # `mode` now holds the previous mode
    try:
        yield
    finally:
        if exchange is not None:
            exchange(ctypes.byref(mode))
