"""Tells objects that the process forks (`os.fork`, `multiprocessing` by fork), so that the child inherits nothing in use.

    before    locks are taken, files closed      in the thread that forks; other threads wait
    fork
    after     locks are released, files opened   in the parent and in the child, where no other thread runs

An object waits for a bounded time, so that no fork hangs. `subprocess` and "spawn" fork no Python, and call nothing of this.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol


class Forked(Protocol):
    """An object that takes part."""

    def before_fork(self) -> Callable[[bool], None]:
        """Prepare for a fork. Returns a function for both sides; its argument is whether it is called in the child."""


_told: weakref.WeakSet[Any] = weakref.WeakSet()
_calls: list[Callable[[bool], None]] = []
"""What to call behind the fork."""
_lock = threading.RLock()
"""Held from before a fork to behind it."""


def told_of_forks(one: Forked) -> None:
    """Call `one.before_fork()` before each fork of the process, while the object lives."""
    with _lock:
        _told.add(one)


def _before() -> None:
    _lock.acquire()
    for one in list(_told):
        _calls.append(one.before_fork())


def _after(in_child: bool) -> None:
    while _calls:
        _calls.pop()(in_child)
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=lambda: _after(False), after_in_child=lambda: _after(True))
