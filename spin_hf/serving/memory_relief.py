"""What gives way when memory runs out, in this order:

    1. prefixes held for waiting requests, and buffer pages of paused ones
    2. a step: the row that does not fit, or the last that joined, leaves the batch and waits first in the queue
       a prompt: its chunks become smaller if activations do not fit; else it waits until a running request ends
    3. alone, or without one that runs: pages of paused requests, which are read again later
    4. the request, if nobody else holds memory

With every request that ends the batch grows again by one row, and chunks to twice their size.
"""

from __future__ import annotations

from typing import Any

import torch

from ..config import MOST_TOKENS
from .admission import bytes_held
from .request import Request
from .row_errors import forget_frames

_LEAST_CHUNK = 256
_LOOK_STEPS = 128
"""Steps between two counts of the bytes held."""


class MemoryRelief:
    """Limits that follow from memory that ran out.

    Args:
        scheduler: the `Scheduler` whose requests these are.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.most_rows = scheduler.max_rows
        """Rows that may be in use."""
        self.most_chunk = MOST_TOKENS
        """Tokens of a prompt that one forward may read."""
        self.reading_waits = False
        """Whether the prompt in progress waits until a running request ends."""
        self._relieved_at: dict[str, tuple[int, int]] = {}
        """What had no memory -> how much of it was done, and how many requests had ended, when memory was freed for it last."""
        self._bytes: tuple[int, tuple[int, int]] | None = None

    def freed(self) -> None:
        """A request has ended: others may go on."""
        self.reading_waits = False
        self.most_rows = min(self._scheduler.max_rows, self.most_rows + 1)
        self.most_chunk = min(MOST_TOKENS, 2 * self.most_chunk)

    def relieve(self, what: str, done: int) -> bool:
        """Free what no running request needs. Returns False if that was done before, and neither helped nor anybody ended.

        Args:
            what: that has no memory.
            done: how much of it has been done so far.
        """
        scheduler = self._scheduler
        progress = done, scheduler.counters.ended.total()
        if self._relieved_at.get(what) == progress:
            return False
        self._relieved_at[what] = progress
        scheduler.prefixes.drop_all()
        for request in scheduler.waiting:
            if request.cache is not None:
                request.cache.release_gpu_memory()
        scheduler.admission.divide(scheduler.held())
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return True

    def of_step(self, error: Exception) -> None:
        """A step ran out of memory; every cache is as before."""
        forget_frames(error)
        if self.relieve("step", self._scheduler.counters.steps):
            return
        scheduler, row = self._scheduler, getattr(error, "row", None)
        running = scheduler.running
        victim = running[row] if row in running else max(running.values(), key=lambda request: request.joined_at)
        if len(running) > 1:
            scheduler.pause(victim, "memory")
            scheduler.waiting.appendleft(victim)
            self._wait_for_an_end()
        elif self._forget_paused():
            return
        elif scheduler.read is not None:
            self._give_up_reading()
        else:
            scheduler.end(victim, "error", error)

    def of_reading(self, request: Request, num_tokens: int, error: Exception) -> None:
        """A chunk of a prompt ran out of memory; its cache is as before.

        Args:
            num_tokens: of the chunk.
        """
        forget_frames(error)
        if self.relieve("prompt", self._scheduler.counters.read_tokens):
            return
        chunk = min(num_tokens, self.most_chunk)
        if isinstance(error, torch.OutOfMemoryError) and chunk > _LEAST_CHUNK:  # not of pages: those are CapacityError
            self.most_chunk = max(_LEAST_CHUNK, chunk // 2)
        elif self._scheduler.running:
            self.reading_waits = True
            self._wait_for_an_end()
        elif not self._forget_paused():
            self._scheduler.end(request, "error", error)

    def of_admission(self, request: Request, error: Exception) -> None:
        """The first waiting request got no cache, or no row."""
        forget_frames(error)
        if self.relieve("admission", self._scheduler.counters.paused):
            return
        if self._scheduler.running:
            self._wait_for_an_end()
        elif not self._forget_paused(but=request):
            self._scheduler.end(request, "error", error)

    def _wait_for_an_end(self) -> None:
        """Admit nobody until a request ends."""
        self.most_rows = max(1, len(self._scheduler.running))

    def _forget_paused(self, but: Request | None = None) -> bool:
        """Drop the pages of the paused request that waits last; it is read again. Returns whether there was one."""
        paused = [request for request in self._scheduler.waiting if request.cache is not None and request is not but]
        if paused:
            paused[-1].cache = None
        return bool(paused)

    def _give_up_reading(self) -> None:
        """Drop what was read of a prompt, for the only running request; it is read again later."""
        scheduler = self._scheduler
        request = scheduler.stop_reading()
        request.cache = None
        scheduler.waiting.appendleft(request)
        self._wait_for_an_end()

    def bytes_held(self, steps: int) -> tuple[int, int]:
        """Bytes of all caches on the GPU and in host memory, counted now and then."""
        if self._bytes is None or steps - self._bytes[0] >= _LOOK_STEPS:
            caches: list[Any] = [cache for cache, _ in self._scheduler.held()] + self._scheduler.idle()
            counted = [bytes_held(cache) for cache in caches]
            self._bytes = steps, (sum(each[0] for each in counted), sum(each[1] for each in counted))
        return self._bytes[1]
