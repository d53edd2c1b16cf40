"""The handle of a submitted request: its tokens as they come, its result, and a way to cancel it.

    thread     for token in handle: ...      handle.result(timeout)      handle.cancel()
    asyncio    async for token in handle     await handle

The loop's thread adds tokens; any number of threads and event loops read them.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

from .results import RequestResult


class RequestHandle:
    """A request of a `RequestLoop`. Made by `submit`.

    Args:
        number: of the request in its loop, counted from 0.
        cancel: called once when the user cancels the request.
    """

    def __init__(self, number: int, cancel: Callable[[], None]) -> None:
        self.number = number
        self._tokens: list[int] = []
        self._result: RequestResult | None = None
        self._changed = threading.Condition()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._cancel = cancel

    def __repr__(self) -> str:
        reason = "in progress" if self._result is None else self._result.finish_reason
        return f"RequestHandle({self.number}, {len(self._tokens)} tokens, {reason})"

    @property
    def tokens(self) -> list[int]:
        """The tokens generated so far. A copy."""
        return list(self._tokens)

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._result is not None

    def cancel(self) -> None:
        """End the request after the step in progress. Its result has the tokens so far. Does nothing if it has ended."""
        if self._result is None:
            self._cancel()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most `timeout` seconds. Returns whether it has come."""
        with self._changed:
            return self._changed.wait_for(lambda: self._result is not None, timeout)

    def outcome(self, timeout: float | None = None) -> RequestResult:
        """Wait for the end and return the result, also that of a request that failed.

        Args:
            timeout: seconds to wait at most; None for no limit.
        Raises:
            TimeoutError: the request goes on.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"request {self.number} has not ended within {timeout} seconds; it goes on")
        assert self._result is not None
        return self._result

    def result(self, timeout: float | None = None) -> RequestResult:
        """As `outcome`, but raises the exception of a request that failed."""
        return _raised(self.outcome(timeout))

    def __iter__(self) -> Iterator[int]:
        """Tokens as they come. Raises the exception of a request that fails, behind its last token."""
        sent = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._tokens) > sent or self._result is not None)  # noqa: B023
                new, ended = self._tokens[sent:], self._result
            yield from new
            sent += len(new)
            if ended is not None and sent == len(self._tokens):
                _raised(ended)
                return

    async def __aiter__(self) -> AsyncIterator[int]:
        """As `__iter__`, for asyncio."""
        sent = 0
        with _Waiter(self) as waiter:
            while True:
                waiter.event.clear()
                new, ended = self._tokens[sent:], self._result
                for token in new:
                    yield token
                sent += len(new)
                if ended is not None and sent == len(self._tokens):
                    _raised(ended)
                    return
                if not new:
                    await waiter.event.wait()

    def __await__(self) -> Generator[Any, None, RequestResult]:
        return self._awaited().__await__()

    async def _awaited(self) -> RequestResult:
        with _Waiter(self) as waiter:
            while self._result is None:
                waiter.event.clear()
                if self._result is None:
                    await waiter.event.wait()
        return _raised(self._result)

    # ----------------------------------------------------------------------------------------- called by the loop's thread

    def add(self, token: int) -> None:
        """Append a token."""
        with self._changed:
            self._tokens.append(token)
            self._notify()

    def end(self, result: RequestResult) -> None:
        """Set the result."""
        with self._changed:
            self._result, self._cancel = result, _nothing
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for loop, event in list(self._waiters):
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # that event loop is closed, so nobody waits
                self._waiters.remove((loop, event))


class _Waiter:
    """Registers an asyncio event that is set when a handle changes."""

    def __init__(self, handle: RequestHandle) -> None:
        self._handle, self.event = handle, asyncio.Event()
        self._entry = asyncio.get_running_loop(), self.event

    def __enter__(self) -> _Waiter:
        with self._handle._changed:
            self._handle._waiters.append(self._entry)
        return self

    def __exit__(self, *_: object) -> None:
        with self._handle._changed:
            if self._entry in self._handle._waiters:
                self._handle._waiters.remove(self._entry)


def _raised(result: RequestResult) -> RequestResult:
    if result.error is not None:
        raise result.error
    return result


def _nothing() -> None:
    """What cancels a request that has ended, so that its handle holds neither it nor the loop."""
