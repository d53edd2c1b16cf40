"""The thread of a loop: takes submitted requests, and runs turns while there is something to do.

    submit (any thread) ──> inbox ──> worker thread: scheduler.turn() ──> handles

It starts with the first request and sleeps while there is none. Only this thread uses the scheduler and the caches.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Sequence

import torch

from ..errors import CacheStateError
from .request import Request
from .row_errors import forget_frames
from .scheduler import Scheduler

logger = logging.getLogger("spin_hf")

_STOP_S = 60.0
"""Seconds that the exit of the process waits for the turn in progress."""


class Worker:
    """Runs a scheduler in a thread.

    Args:
        scheduler: of the loop.
        max_waiting: most requests in the queue; `submit` waits for room. None for no limit.
    """

    def __init__(self, scheduler: Scheduler, max_waiting: int | None) -> None:
        self.scheduler, self.max_waiting = scheduler, max_waiting
        scheduler.collect = self._collect
        self._inbox: list[Request] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._busy = self._closing = False
        self._failure: BaseException | None = None

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, as many at once as there is room for.

        Raises:
            CacheStateError: the loop is closed, or its thread has failed.
        """
        left = list(requests)
        while left:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._room())
                if self._closing:
                    raise CacheStateError(
                        "expected an open RequestLoop, got one that is closed; make a new one"
                    ) from self._failure
                room = self._room()  # together: the first then knows which others share its beginning
                self._inbox += left[:room]
                left = left[room:]
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="spin_hf RequestLoop", daemon=True)
                    self._thread.start()
                self._changed.notify_all()

    def cancel(self, request: Request) -> None:
        """Have a request end after the turn in progress."""
        with self._changed:
            request.cancelled = self.scheduler.any_cancelled = True
            self._changed.notify_all()

    def cancel_all(self) -> None:
        """Have every request end after the turn in progress."""
        with self._changed:
            for request in [*self._inbox, *self.scheduler.requests()]:
                request.cancelled = True
            self.scheduler.any_cancelled = True
            self._changed.notify_all()

    def close(self, cancel: bool, timeout: float | None = None) -> None:
        """Take no more requests, and wait until those submitted have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if cancel:
            self._closing_cancels = True
            self.cancel_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def stop(self) -> None:
        """Cancel everything, at the exit of the process or when the loop is dropped."""
        self.close(cancel=True, timeout=_STOP_S)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._inbox) + len(self.scheduler.waiting)

    _closing_cancels = False

    def _room(self) -> int:
        """Requests that may be queued now."""
        return sys.maxsize if self.max_waiting is None else max(0, self.max_waiting - self.num_waiting)

    def _run(self) -> None:
        device = self.scheduler.model.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            while self._take():
                self._busy = self.scheduler.turn()
        except BaseException as error:
            # A fault of the loop itself: nobody may wait for ever.
            logger.exception("the thread of a RequestLoop failed; its requests end with the error")
            self._fail(error)
        finally:
            self.scheduler.close()

    def _take(self) -> bool:
        """Queue what was submitted; wait if there is nothing to do. Returns False at the end of the loop."""
        with self._changed:
            self._changed.notify_all()  # of room in the queue
            self._changed.wait_for(lambda: self._inbox or self._busy or self._closing)
            new = self._collect()
            return bool(new or self._busy or not self._closing)

    def _collect(self) -> int:
        """Hand what was submitted to the scheduler. Returns how many requests."""
        with self._changed:
            new, self._inbox = self._inbox, []
            if self._closing_cancels:
                for request in new:
                    request.cancelled = self.scheduler.any_cancelled = True
            self.scheduler.waiting.extend(new)
            return len(new)

    def _fail(self, error: BaseException) -> None:
        failure = (
            error if isinstance(error, Exception) else CacheStateError(f"the RequestLoop was interrupted: {error!r}")
        )
        with self._changed:
            self._closing, self._failure = True, error
            self.scheduler.waiting.extend(self._inbox)
            self._inbox = []
            self._changed.notify_all()
        forget_frames(error)
        for request in self.scheduler.requests():
            request.end("error", failure)
