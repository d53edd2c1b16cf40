"""What gives way when memory runs out, in this order:

    1. prefixes held for waiting requests, and buffer pages of paused ones
    2. a step: the row that does not fit, or the last that joined, leaves the batch and waits first in the queue
       a prompt: it waits until a running request ends; without one, its chunks become smaller
    3. pages of paused requests: those are read again later
    4. the request, if it fails alone

After that the batch grows again by one row with every request that ends.
"""

from __future__ import annotations

from typing import Any

import torch

from ..config import MOST_TOKENS
from ..errors import BudgetError, CapacityError
from .admission import bytes_held
from .request import Request

OUT_OF_MEMORY = (torch.OutOfMemoryError, CapacityError, BudgetError)
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
        self._relieved_at: tuple[int, int] | None = None
        self._bytes: tuple[int, tuple[int, int]] | None = None

    def freed(self) -> None:
        """A request has ended: others may go on."""
        self.reading_waits = False
        self.most_rows = min(self._scheduler.max_rows, self.most_rows + 1)

    def relieve(self) -> bool:
        """Free what no running request needs. Returns whether that is worth another try."""
        scheduler = self._scheduler
        progress = scheduler.counters.steps, scheduler.counters.read_tokens
        again = self._relieved_at == progress
        self._relieved_at = progress
        if again:
            return self._forget_one()
        scheduler.prefixes.drop_all()
        for request in scheduler.waiting:
            if request.cache is not None:
                request.cache.release_gpu_memory()
        scheduler.admission.divide(scheduler.held())
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return True

    def _forget_one(self) -> bool:
        """Drop the pages of the paused request that waits last; it is read again. Only if nothing else runs."""
        scheduler = self._scheduler
        paused = [request for request in scheduler.waiting if request.cache is not None]
        if not paused or len(scheduler.running) > 1:
            return False
        paused[-1].cache = None
        return True

    def of_step(self, error: Exception) -> None:
        """A step ran out of memory; every cache is as before."""
        scheduler = self._scheduler
        if self.relieve():
            return
        row = getattr(error, "row", None)
        running = scheduler.running
        victim = running[row] if row in running else max(running.values(), key=lambda request: request.joined_at)
        if len(running) == 1:
            if scheduler.read is not None:
                self._give_up_reading()
            else:
                scheduler.end(victim, "error", error)
            return
        scheduler.pause(victim, "memory")
        scheduler.waiting.appendleft(victim)
        self.most_rows = max(1, len(running))

    def of_reading(self, request: Request, error: Exception) -> None:
        """A chunk of a prompt ran out of memory; its cache is as before."""
        scheduler = self._scheduler
        if self.relieve():
            return
        if scheduler.running:
            self.reading_waits = True
            self.most_rows = max(1, len(scheduler.running))
        elif self.most_chunk > _LEAST_CHUNK:
            largest = scheduler.largest_chunk()
            self.most_chunk = max(_LEAST_CHUNK, min(self.most_chunk, largest) // 2)
        else:
            scheduler.end(request, "error", error)

    def relieve_or_end(self, request: Request, error: Exception) -> None:
        """A waiting request got no cache."""
        if not self.relieve() and not self._scheduler.running:
            self._scheduler.end(request, "error", error)

    def _give_up_reading(self) -> None:
        """Drop what was read of a prompt, for the only running request; it is read again later."""
        scheduler = self._scheduler
        request = scheduler.stop_reading()
        request.cache = None
        scheduler.waiting.appendleft(request)
        self.most_rows = max(1, len(scheduler.running))

    def bytes_held(self, steps: int) -> tuple[int, int]:
        """Bytes of all caches on the GPU and in host memory, counted now and then."""
        if self._bytes is None or steps - self._bytes[0] >= _LOOK_STEPS:
            caches: list[Any] = [cache for cache, _ in self._scheduler.held()] + self._scheduler.idle()
            counted = [bytes_held(cache) for cache in caches]
            self._bytes = steps, (sum(each[0] for each in counted), sum(each[1] for each in counted))
        return self._bytes[1]
