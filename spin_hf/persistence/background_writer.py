"""Writes the prompts of a store to the disk in a thread, so that no first token waits for the disk.

    generate's thread   fork of the cache  ->  queue of at most 2 prompts, of which the oldest goes
    writer's thread     the oldest prompt  ->  files and index (`disk_entries.py`)  ->  its fork is released

The thread ends with the last prompt of the queue. It is a daemon. A handler at exit waits for the queue, for some minutes at
most, then has the thread stop. A forked child starts with an empty queue and without a thread.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import threading
import time
import uuid
import weakref
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import util
from pathlib import Path
from typing import Any

import torch

from ..storage.host_register import work_so_far
from .fingerprint import ModelFacts
from .prompt_identity import common_length, tensors_of, with_options
from .staging import thread_modes
from .writer import ForkInUse, StoppedError, save

logger = logging.getLogger("spin_hf")

_MOST_QUEUED = 2
"""Prompts that wait while another one is written. Each holds memory."""
_QUIET_S = 1.0
"""Seconds that the exit of the process waits without a message."""
_MOST_EXIT_S = 300.0
"""Seconds that it waits at most, for the prompts of all stores. A disk that does not answer must not hold a process."""
_MOST_STOP_S = 5.0
"""Seconds that it then waits at most for threads to stop."""
_MOST_FORK_S = 10.0
"""Seconds that `os.fork` waits at most while a fork of a cache is released."""
_SHARD_BYTES = "1GiB"


@dataclass(eq=False)
class PendingPrompt:
    """A prompt that is to be written.

    Attributes:
        cache: a fork that nobody steps; None once it is written or dropped.
        ids: its tokens.
        space: of `space_of`.
        options: of `with_options`: a fork has the options of its origin.
        facts: of the model that has read it.
        kernels: waits for the kernels that write to the fork.
        name: of the entry on disk.
        is_dropped: whether it must not become an entry. What is being written then stops.
    """

    cache: Any
    ids: array[int]
    space: str
    options: str
    facts: ModelFacts | None
    kernels: Callable[[], None]
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    is_dropped: bool = False

    @classmethod
    def of(cls, cache: Any, ids: array[int], space: str, facts: ModelFacts | None) -> PendingPrompt:
        """A prompt that `cache` holds. The cache may be stepped, cropped or deleted from now on, and the model too.

        Raises:
            SpinError, torch.OutOfMemoryError: the cache cannot be forked.
        """
        fork = cache.fork()
        fork.calls.unhook()  # here, as a model may be called while the writer's thread releases the fork
        devices = [layer.store.device for layer in fork._state.layers if layer.store is not None]
        devices += [tensor.device for tensor in tensors_of(fork)]
        return cls(fork, ids, space, with_options(space, cache), facts, work_so_far(devices))

    def covers(self, other: PendingPrompt) -> bool:
        """Whether the prompt begins with all of another one, of the same space."""
        return self.space == other.space and common_length(other.ids, self.ids, 0) == len(other.ids)

    def save(self, folder: Path) -> int:
        """Write the fork to a folder. Returns the bytes of its files. For one thread, which may be any.

        Raises:
            SpinError, OSError: it cannot be written.
            StoppedError: it was dropped.
        """
        fork, in_use = self.cache, ForkInUse(self.kernels, lambda: self.is_dropped)
        with _not_forking:
            fork._passes.gpu.withdraw()
        tokens = torch.frombuffer(self.ids, dtype=torch.int64)[None]
        with thread_modes():
            length, state = fork.get_seq_length(), fork._state
            save(
                folder, state, fork.layers, fork._config, self.facts, length, 1, tokens, _SHARD_BYTES, in_use
            )  # fmt: skip
        return sum(file.stat().st_size for file in folder.iterdir())


class BackgroundWriter:
    """The prompts of one store that are to be written, and the thread that writes them, one at a time.

    Args:
        place: folder of the store, for messages.
    """

    def __init__(self, place: Path | None) -> None:
        self.place = place
        self.forget_parent()
        _writers.add(self)

    def forget_parent(self) -> None:
        """Start anew. Needed in a forked child, which has no such thread and may inherit a held lock."""
        self._inherited = vars(self).copy()  # not freed here, as that may take locks too
        self._changed = threading.Condition()
        self._queue: deque[tuple[PendingPrompt, Callable[[PendingPrompt], None]]] = deque()
        self._current: PendingPrompt | None = None
        self._thread: threading.Thread | None = None

    def submit(self, prompt: PendingPrompt, write: Callable[[PendingPrompt], None]) -> None:
        """Have `write(prompt)` called in the thread, after the prompts submitted before.

        Those that the prompt covers and that are not being written yet are dropped. So is the oldest one if more than two wait.
        """
        with self._changed:
            if self._thread is None and not self._start():
                return
            left = [each for each in self._queue if not prompt.covers(each[0])]
            crowded = max(0, len(left) + 1 - _MOST_QUEUED)
            gone = [each for each, _ in self._queue if all(each is not other for other, _ in left[crowded:])]
            self._queue = deque([*left[crowded:], (prompt, write)])  # behind the start: Ctrl-C may come between them
            self._changed.notify_all()  # for `wait`
        for each in gone:
            each.cache = None
        if crowded:
            logger.info("a prompt is not stored in %s: at most %d may wait for the disk", self.place, _MOST_QUEUED)

    def _start(self) -> bool:
        """Start the thread. It finds the queue once the lock is released."""
        _wait_at_exit()
        thread = threading.Thread(target=self._work, name="spin_hf_store", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads; while the interpreter exits, none
            self.warn(error)
            return False
        self._thread = thread
        return True

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._queue:
                    self._thread = None
                    return
                prompt, write = self._queue.popleft()
                self._current = prompt
            try:
                write(prompt)
            except StoppedError:
                pass
            except BaseException as error:
                self.warn(error)
            finally:
                with _not_forking:
                    prompt.cache = None
                with self._changed:
                    self._current = None
                    self._changed.notify_all()
            del prompt, write  # they hold the store

    def warn(self, error: BaseException) -> None:
        """Log that a prompt is not stored. The record does not hold the error, whose frames hold the fork."""
        reason = str(error) or type(error).__name__
        logger.warning("a prompt could not be stored in %s: %s", self.place, reason)

    def pending(self) -> list[PendingPrompt]:
        """Prompts that wait or are being written, the oldest first, without dropped ones."""
        with self._changed:
            return [prompt for prompt in self._all() if not prompt.is_dropped]

    def _all(self) -> list[PendingPrompt]:
        return [*([] if self._current is None else [self._current]), *(prompt for prompt, _ in self._queue)]

    def drop_all(self) -> None:
        """Forget prompts that wait, and have one that is being written stop. It becomes no entry."""
        with self._changed:
            gone, self._queue = [prompt for prompt, _ in self._queue], deque()
            if self._current is not None:
                self._current.is_dropped = True
            self._changed.notify_all()
        for prompt in gone:
            prompt.cache = None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until no prompt that was submitted so far is pending. Returns whether that is so."""
        with self._changed:
            waited = set(self._all())
            return self._changed.wait_for(lambda: waited.isdisjoint(self._all()), timeout)

    def before_fork(self) -> Callable[[bool], None]:
        """Called before the process forks; see `process_forks.py`."""
        held = _not_forking.acquire(timeout=_MOST_FORK_S)

        def after(in_child: bool) -> None:
            if in_child:
                self.forget_parent()
            if held:
                _not_forking.release()

        return after


_writers: weakref.WeakSet[BackgroundWriter] = weakref.WeakSet()
_waits_at_exit: set[int] = set()
"""Processes that wait at their exit. A forked child inherits the handler, and the ids of its ancestors."""
_not_forking = threading.RLock()
"""Held while a thread releases a fork of a cache, which takes locks of this package. So a forked child inherits none held."""


def _wait_at_exit() -> None:
    """Have this process wait. Called late, as handlers run in reverse order: `weakref` closes caches in one that is older."""
    if not _waits_at_exit:
        atexit.register(_at_exit)
    if os.getpid() not in _waits_at_exit and multiprocessing.parent_process() is not None:
        util.Finalize(None, _at_exit, exitpriority=0)  # a worker that was forked runs this, and no handlers
    _waits_at_exit.add(os.getpid())


def _at_exit() -> None:
    """Wait for all prompts, for a bounded time or until Ctrl-C. Then drop what is left: it becomes no entry."""
    writers, until = list(_writers), time.monotonic() + _MOST_EXIT_S
    try:
        for writer in writers:
            if not writer.wait(_QUIET_S):
                logger.warning(
                    "the process ends once its prompts are stored in %s, %d to go, or in %.0f s; Ctrl-C ends it now",
                    writer.place, len(writer.pending()), max(0.0, until - time.monotonic()),
                )  # fmt: skip
                writer.wait(max(0.0, until - time.monotonic()))
    except KeyboardInterrupt:
        pass
    for writer in writers:
        if left := len(writer.pending()):
            logger.warning("%d prompts are not stored in %s: the process ends", left, writer.place)
        writer.drop_all()
    until = time.monotonic() + _MOST_STOP_S
    for writer in writers:
        writer.wait(max(0.0, until - time.monotonic()))
