"""Threads that read pieces of tensors. Reading begins while the caller still allocates memory for later pieces.

    with PieceReader(read, threads) as reader:
        reader.submit(pieces)      returns at once
        reader.submit(more)
        reader.finish()            waits for all; raises the error of a thread

At the end of the block no thread runs and no copy is under way, whatever happened in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, TypeVar

from .staging import Staging, thread_modes

Piece = TypeVar("Piece")


class PieceReader(Generic[Piece]):
    """Reads pieces in the order in which they were submitted, several at a time.

    Args:
        read: reads one piece; called by the threads, each with its own `Staging`.
        threads: number of threads.
    """

    def __init__(self, read: Callable[[Piece, Staging], None], threads: int) -> None:
        self._read, self._threads = read, threads
        self._queue: SimpleQueue[Piece | None] = SimpleQueue()
        """None ends a thread."""
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="spin_hf_load")
        self._running: list[Future[None]] = []
        self._stopped = False

    def __enter__(self) -> PieceReader[Piece]:
        try:
            for _ in range(self._threads):
                self._running.append(self._pool.submit(self._work))
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def submit(self, pieces: Iterable[Piece]) -> None:
        """Have pieces read. If a thread has failed, raise its error instead."""
        if self._stopped:
            self.finish()
        for piece in pieces:
            self._queue.put(piece)

    def finish(self) -> None:
        """Wait until all pieces are read and copied. Raises the error of a thread. Nothing may be submitted afterwards."""
        self._end()
        for running in self._running:
            running.result()

    def _end(self) -> None:
        """End each thread once the pieces before are read."""
        for _ in range(self._threads):
            self._queue.put(None)

    def _stop(self) -> None:
        """Drop the pieces that no thread has begun, and wait for the others."""
        self._stopped = True
        self._end()
        self._pool.shutdown()

    def _work(self) -> None:
        staging = Staging()
        try:
            with thread_modes():
                while not self._stopped and (piece := self._queue.get()) is not None:
                    self._read(piece, staging)
        except BaseException:
            self._stopped = True
            raise
        finally:
            staging.wait()
