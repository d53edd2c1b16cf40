"""Buffers between a file and memory that it cannot be read into or written from: memory of a GPU, or pages in another layout.

    read block 0 -> buffer 0 -> copy on the thread's stream
    read block 1 -> buffer 1 -> copy
    read block 2 -> wait for the copy of block 0 -> buffer 0 -> copy          here with two buffers

Each thread has its own. For a GPU they are page-locked, so that copies run while the next block is read. Blocks are large, as
threads hand Python's lock on several times for each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from ..storage.host_register import allowed_during_capture
from .shards import bytes_of

BLOCK_BYTES = 16 << 20
"""Bytes that are read for a GPU at a time; a multiple of 512."""
NUM_BUFFERS = 2
"""Blocks of a thread whose copies to a GPU may be running."""


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


class Staging:
    """The buffers and streams of one thread. They must be waited for before what was copied is used or freed."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._is_locked = False
        """Whether the buffer is page-locked."""
        self._streams: dict[torch.device, CopyStream] = {}
        self._uploads: dict[torch.device, Upload] = {}

    def buffer(self, num_bytes: int, locks: bool = False) -> Tensor:
        """A buffer [num_bytes], uint8. The next call may give the same memory again.

        Args:
            locks: whether it is page-locked.
        """
        if self._buffer is None or len(self._buffer) < num_bytes or self._is_locked < locks:
            self._buffer = None  # first, so that there are never two
            self._buffer, self._is_locked = _allocate(num_bytes, locks), locks
        return self._buffer[:num_bytes]

    def copy(self, rows: Tensor, places: Sequence[Tensor], device: torch.device) -> None:
        """Copy rows to views of memory of a device, one after the other. Returns once they are there.

        Args:
            rows: [n, ...], in host memory.
            places: [m, ...] each, n in all.
        """
        self._run(list(zip(places, _parts_like(rows, places), strict=True)), device)

    def gather(self, views: Sequence[Tensor], rows: Tensor, device: torch.device) -> None:
        """Copy views of memory of a device to rows, one after the other. Returns once they are there.

        Args:
            views: [m, ...] each, n in all.
            rows: [n, ...], in host memory.
        """
        self._run(list(zip(_parts_like(rows, views), views, strict=True)), device)

    def _run(self, pairs: list[tuple[Tensor, Tensor]], device: torch.device) -> None:
        """Copy (place, content) pairs."""
        if not has_streams(device):
            for place, content in pairs:
                place.copy_(content)
            return
        stream = self._stream(device)
        with stream.current():
            for place, content in pairs:
                stream.copy(place, content)
            copied = stream.event()
            copied.record()
        copied.wait()

    @contextmanager
    def upload(self, device: torch.device) -> Iterator[Upload]:
        """The way from files to memory of a GPU. Copies run on behind this context."""
        stream = self._stream(device)
        if device not in self._uploads:
            self._uploads[device] = Upload(stream)
        with stream.current():
            yield self._uploads[device]

    def _stream(self, device: torch.device) -> CopyStream:
        if device not in self._streams:
            self._streams[device] = CopyStream(device)
        return self._streams[device]

    def wait(self) -> None:
        """Wait for all copies, also for those of a call that failed, and hand over what was fetched."""
        for stream in self._streams.values():
            stream.wait()
        for upload in self._uploads.values():
            upload.hand_over()


class _Buffer:
    """A page-locked buffer, and the copy to it or from it that may be running.

    Attributes:
        content, memory: the buffer as a tensor, and for a read.
        copied: the event behind the copy.
        then: called once the copy has ended; None for nothing.
    """

    def __init__(self, content: Tensor, copied: CopyEvent) -> None:
        self.content, self.memory, self.copied = content, [bytes_of(content)], copied
        self.then: Callable[[], None] | None = None

    def settle(self) -> None:
        """Wait for the copy, and hand over what it has fetched."""
        self.copied.wait()
        if self.then is not None:
            then, self.then = self.then, None
            then()


class Upload:
    """Reads bytes of files into memory of one GPU, for one thread.

    Args:
        stream: that copies run on. It is current while `read` and `fetch` are called.
    """

    def __init__(self, stream: CopyStream) -> None:
        self._stream, self._block_bytes = stream, BLOCK_BYTES
        parts = _allocate(NUM_BUFFERS * BLOCK_BYTES, True).split(BLOCK_BYTES)  # one call to the driver
        self._buffers = deque(_Buffer(part, stream.event()) for part in parts)
        """The one that is used next is the first."""

    def _next(self) -> _Buffer:
        """The next buffer, which no copy uses."""
        buffer = self._buffers[0]
        self._buffers.rotate(-1)
        buffer.settle()
        return buffer

    def read(
        self, read_into: Callable[[list[memoryview], int], None], offset: int, places: Sequence[Tensor]
    ) -> None:  # fmt: skip
        """Read bytes from `offset` on to memory of the GPU. Copies run on when this returns.

        Args:
            read_into: of an `OpenFile`.
            places: uint8 in one dimension each, in order.
        """
        stream, whole = self._stream, self._block_bytes
        for place in places:
            for block in place.split(whole):
                buffer, size = self._next(), len(block)
                content, memory = buffer.content, buffer.memory
                if size < whole:
                    content, memory = content[:size], [memory[0][:size]]
                read_into(memory, offset)
                stream.copy(block, content)
                buffer.copied.record()
                offset += size

    def fetch(self, num_bytes: int, made: Callable[[], Tensor], then: Callable[[memoryview], None]) -> None:
        """Make a tensor from what was read, and copy it to host memory. Runs on when this returns, if it fits a buffer.

        Args:
            num_bytes: of the tensor.
            made: makes it on the GPU, uint8 in one dimension.
            then: called with the copy, at the latest by `Staging.wait`.
        """
        if num_bytes > self._block_bytes:
            self._stream.wait()
            then(bytes_of(made().cpu()))
            return
        buffer = self._next()
        self._stream.fetch(buffer.content[:num_bytes], made)
        buffer.copied.record()
        buffer.then = partial(then, buffer.memory[0][:num_bytes])

    def hand_over(self) -> None:
        """Wait for all copies, and hand over what was fetched."""
        for buffer in self._buffers:
            buffer.settle()


class CopyStream:
    """A CUDA stream for copies of one thread."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def current(self) -> AbstractContextManager[object]:
        """Within this context, the other methods may be called."""
        return torch.cuda.stream(self._stream)

    def copy(self, place: Tensor, content: Tensor) -> None:
        """Start a copy to the device or from it."""
        place.copy_(content, non_blocking=True)

    def fetch(self, place: Tensor, made: Callable[[], Tensor]) -> None:
        """Make a tensor of the device behind the copies, and start a copy of it to `place`."""
        place.copy_(made(), non_blocking=True)

    def event(self) -> CopyEvent:
        """An event of this stream, which may be recorded again and again."""
        return CopyEvent(self._stream)

    def wait(self) -> None:
        """Wait for all copies."""
        self._stream.synchronize()


class CopyEvent:
    """A place in a stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream, self._event = stream, torch.cuda.Event(blocking=True)  # the thread sleeps while it waits

    def record(self) -> None:
        """Move it behind what was started so far."""
        self._event.record(self._stream)

    def wait(self) -> None:
        """Wait for what was started before it."""
        if not self._event.query():  # keeps the interpreter's lock, which other threads would take
            self._event.synchronize()


def _parts_like(rows: Tensor, others: Sequence[Tensor]) -> Sequence[Tensor]:
    """Split rows into parts as long as `others`."""
    return rows.split([len(other) for other in others])


def _allocate(num_bytes: int, locks: bool) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=locks)
