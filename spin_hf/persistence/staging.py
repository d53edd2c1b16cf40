"""Buffers between a file and memory that it cannot be read into or written from: memory of a GPU, or pages in another layout.

    read piece 0 -> buffer 0 -> copy on the thread's stream
    read piece 1 -> buffer 1 -> copy
    read piece 2 -> wait for the copy of piece 0 -> buffer 0 -> copy

Each thread has its own. For a GPU its buffers are page-locked, so that copies run while the next piece is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..storage.host_register import allowed_during_capture

_NUM_BUFFERS = 2


def in_host_memory(device: torch.device) -> bool:
    """Whether files are read into memory of this device directly."""
    return device.type == "cpu"


def has_streams(device: torch.device) -> bool:
    """Whether copies to this device run on a stream."""
    return device.type == "cuda"


@contextmanager
def thread_modes() -> Iterator[None]:
    """The modes of a thread that reads or fills a cache. Modes belong to a thread, not to its starter.

    Other threads may capture CUDA graphs, also in CUDA's strictest mode.
    """
    captures = allowed_during_capture() if torch.cuda.is_initialized() else nullcontext()
    with torch.inference_mode(False), torch.no_grad(), captures:
        yield


@dataclass
class _Buffer:
    """A buffer and the copy from it that may be running.

    Attributes:
        memory: uint8; None before the first use.
        is_locked: whether it is page-locked.
        wait: waits for the copy; None if there is none.
        in_use: tensors of the copy, which must not be freed before its end.
    """

    memory: Tensor | None = None
    is_locked: bool = False
    wait: Callable[[], None] | None = None
    in_use: Any = None

    def settle(self) -> None:
        """Wait for the copy."""
        if self.wait is not None:
            self.wait()
        self.wait = self.in_use = None


class Staging:
    """The buffers and streams of one thread. They must be waited for before what was copied is used or freed."""

    def __init__(self) -> None:
        self._buffers = [_Buffer() for _ in range(_NUM_BUFFERS)]
        self._streams: dict[torch.device, CopyStream] = {}

    def buffer(self, num_bytes: int, device: torch.device) -> Tensor:
        """A buffer [num_bytes], uint8, for a copy to `device`. Waits for the copy that was made from it before.

        The call after the next one gives the same memory again.
        """
        current = self._buffers.pop(0)
        self._buffers.append(current)
        current.settle()
        locks = has_streams(device)
        if current.memory is None or len(current.memory) < num_bytes or current.is_locked < locks:
            current.memory, current.is_locked = _allocate(num_bytes, locks), locks
        return current.memory[:num_bytes]

    def copy(self, rows: Tensor, places: Sequence[Tensor], device: torch.device) -> None:
        """Copy rows to views of memory of a device, one after the other. Asynchronous for a GPU.

        Args:
            rows: [n, ...], in the buffer that `buffer` gave last, or computed from it.
            places: [m, ...] each, n in all.
        """
        self._start(list(zip(places, _parts_like(rows, places), strict=True)), device)

    def gather(self, views: Sequence[Tensor], rows: Tensor, device: torch.device) -> None:
        """Copy views of memory of a device to rows, one after the other. Returns once they are there.

        Args:
            views: [m, ...] each, n in all.
            rows: [n, ...], in the buffer that `buffer` gave last.
        """
        self._start(list(zip(_parts_like(rows, views), views, strict=True)), device)
        self._buffers[-1].settle()

    def _start(self, pairs: list[tuple[Tensor, Tensor]], device: torch.device) -> None:
        """Copy (place, content) pairs. For a GPU the buffer that was given last waits for it."""
        if not has_streams(device):
            for place, content in pairs:
                place.copy_(content)
            return
        if device not in self._streams:
            self._streams[device] = CopyStream(device)
        current = self._buffers[-1]
        current.in_use = pairs  # first: also if an error comes behind the start of a copy
        current.wait = self._streams[device].copy(pairs)

    def wait(self) -> None:
        """Wait for all copies, also for those of a call that failed."""
        for stream in self._streams.values():
            stream.wait()
        for buffer in self._buffers:
            buffer.settle()


class CopyStream:
    """A CUDA stream for copies of one thread."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
        """Start copies of (place, content) pairs, to the device or from it. Returns a function that waits for them."""
        with torch.cuda.stream(self._stream):
            for place, content in pairs:
                place.copy_(content, non_blocking=True)
            copied = torch.cuda.Event(blocking=True)  # the thread sleeps while it waits
            copied.record(self._stream)
        return copied.synchronize

    def wait(self) -> None:
        """Wait for all copies."""
        self._stream.synchronize()


def _parts_like(rows: Tensor, others: Sequence[Tensor]) -> Sequence[Tensor]:
    """Split rows into parts as long as `others`."""
    return rows.split([len(other) for other in others])


def _allocate(num_bytes: int, locks: bool) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=locks)
