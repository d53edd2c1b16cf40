"""Turns of a loop: which request is read next, which ones take a step, and who gives way when memory is short.

    waiting ──admit──> reading ──last chunk──> running ──> ended
       ^                  one prompt at a time     rows of a RowBatch
       └────────────── paused: out of memory, or somebody has waited too long

    a turn   end cancelled requests; admit the first that waits; read a chunk if the pace allows; one step (`decoder.py`)

Requests are admitted in the order in which they came. One thread calls this.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..cache import SpinCache
from .admission import Admission
from .decoder import Decoder
from .events import ChunkRead, Event, EventLog, RequestEnded, RequestJoined, RequestPaused, RequestStarted, StepDone
from .loop_stats import Counters
from .memory_relief import MemoryRelief
from .pace import Pace
from .prefixes import SharedPrefixes, may_crop
from .reading import PromptReading
from .request import Request
from .row_batch import RowBatch
from .row_errors import OUT_OF_MEMORY, forget_frames

_LOOKED_AT = 256
"""Waiting requests that are searched for a common prefix."""
_COUNT_STEPS = 32
"""Steps after which a request that did not fit is tried again though none has ended: memory of others may be free now."""
_DIVIDE_STEPS = 256
"""Steps after which a cap is divided again, as sequences have grown."""


class Scheduler:
    """The requests of one loop.

    Args:
        model: the model.
        make_cache: makes an empty cache.
        admission, pace: of the loop.
        max_rows: most requests that decode at once.
        max_wait_s: seconds after which a waiting request takes the place of one that has run as long; None for never.
        shares_prefixes: whether common beginnings of waiting prompts are read once.
        log: gets an event for all that happens; None for none.
    """

    def __init__(
        self, model: Any, make_cache: Callable[[], SpinCache], admission: Admission, pace: Pace, max_rows: int,
        max_wait_s: float | None, shares_prefixes: bool, log: EventLog | None,
    ) -> None:  # fmt: skip
        self.model, self.make_cache, self.admission, self.pace = model, make_cache, admission, pace
        self.max_rows, self.max_wait_s, self.shares_prefixes, self.log = max_rows, max_wait_s, shares_prefixes, log
        self.batch = RowBatch(model, max_rows)
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self.read: Request | None = None
        """The request whose prompt is being read."""
        self.make_reading = PromptReading
        self.prefixes, self.counters = SharedPrefixes(), Counters()
        self.relief, self.decoder = MemoryRelief(self), Decoder(self)
        self.any_cancelled = False
        self.collect: Callable[[], object] = lambda: None
        """Queues requests that were submitted since the turn began."""
        self.memory = (0, 0)
        """Bytes of all caches on the GPU and in host memory, when they were last counted."""
        self._divides = self._may_pause = False
        self._no_room: tuple[Any, ...] | None = None
        """When the first waiting request was found not to fit; None if it was not."""
        self._reading: PromptReading | None = None
        self._began = time.perf_counter()

    # ------------------------------------------------------------------------------------------------------- a turn

    def turn(self) -> bool:
        """Do what is due. Returns whether there is more to do."""
        if self._is_due():
            self.decoder.settle()
            self._change()
        self.decoder.step()
        return bool(self.waiting or self.read or self.running)

    def _change(self) -> None:
        """Whatever changes requests, rows or memory, while no step is in flight."""
        if self.any_cancelled:
            self._end_cancelled()
        if self._divides:
            self._divides = False
            self.admission.divide(self.held())
        self._may_pause = True
        while self._admit():
            pass
        self._read()

    def _is_due(self) -> bool:
        """Whether this turn does anything but a step of the rows that took the last one."""
        if self.any_cancelled or self._divides or self._wanted():
            return True
        if not self.waiting or self.read is not None:
            return False
        head = self.waiting[0]
        is_full = len(self.running) >= self.relief.most_rows or self._no_room == self._counted(head)
        is_late = self.max_wait_s is not None and time.perf_counter() - head.waiting_since >= self.max_wait_s
        return is_late or not is_full

    def requests(self) -> list[Request]:
        """All that have not ended, the running ones first."""
        return [*self.running.values(), *([] if self.read is None else [self.read]), *self.waiting]

    def held(self) -> list[tuple[SpinCache, int]]:
        """Cache and planned tokens of each request that decodes or is read."""
        active = [*self.running.values(), *([] if self.read is None else [self.read])]
        return [(request.cache, request.planned_tokens) for request in active if request.cache is not None]

    def idle(self) -> list[SpinCache]:
        """Caches that hold memory and are not stepped: of paused requests, and shared prefixes."""
        paused = [request.cache for request in self.waiting if request.cache is not None]
        return [*paused, *(prefix.cache for prefix in self.prefixes.held)]

    # ---------------------------------------------------------------------------------------------------- admission

    def _admit(self) -> bool:
        """Admit the first waiting request, if there is room. Returns whether another one may follow in this turn."""
        if not self.waiting or self.read is not None:
            return False
        head = self.waiting[0]
        if len(self.running) >= self.relief.most_rows or not self._has_room(head):
            return self._make_turn_for(head)
        self.waiting.popleft()
        if head.cache is not None:
            self._join(head)
            return head.row is not None
        self._start(head)
        return False

    def _has_room(self, head: Request) -> bool:
        """`_fits`, counted again only when a request has ended or joined, or after some steps: it takes the host long."""
        counted = self._counted(head)
        if self._no_room != counted:
            self._no_room = None if self._fits(head) and self._fits_whole(head) else counted
        return self._no_room is None

    def _counted(self, head: Request) -> tuple[Any, ...]:
        counters = self.counters
        return head, counters.ended.total(), counters.paused, len(self.running), counters.steps // _COUNT_STEPS

    def _fits_whole(self, head: Request) -> bool:
        """Whether all pages of a request that holds none find room on the GPU, or that is not worth waiting for."""
        if head.cache is not None or not self.running:
            return True
        left = min(request.most_tokens - request.num_tokens for request in self.running.values())
        if left * self.pace.steady_s > self.admission.moving_s(head.planned_tokens):
            return True
        active = [*self.running.values(), *([] if self.read is None else [self.read])]
        held = [(request.num_tokens, request.planned_tokens) for request in active]
        shared = self.prefixes.longest(head.ids_to_hold) if self.shares_prefixes else 0
        return self.admission.fits_whole(head.planned_tokens, shared, held)

    def _fits(self, head: Request, without: Request | None = None) -> bool:
        """Whether a waiting request fits beside the others.

        Args:
            without: a request that would be paused for it.
        """
        gone = None if without is None else without.cache
        held = [each for each in self.held() if each[0] is not gone]
        others = [cache for cache in self.idle() if cache is not head.cache]
        others += [] if gone is None else [gone]
        return self.admission.fits(head.planned_tokens, held, others)

    def _make_turn_for(self, head: Request) -> bool:
        """Pause the request that has run longest, if `head` has waited too long for its place. Returns whether one was."""
        now = time.perf_counter()
        if self.max_wait_s is None or now - head.waiting_since < self.max_wait_s or not self.running:
            return False
        if not self._may_pause:  # every turn has a step, which all that run take
            return False
        longest = min(self.running.values(), key=lambda request: request.joined_at)
        if now - longest.joined_at < self.max_wait_s or not self._fits(head, longest):
            return False
        self._may_pause = False
        self.pause(longest, "turn")
        self.waiting.append(longest)
        return True

    def _start(self, request: Request) -> None:
        """Begin to read a prompt, behind what is held of it already."""
        ids, first = request.ids_to_hold, request.times.started is None
        request.start()
        try:
            cache = self._cache_for(ids)
        except OUT_OF_MEMORY as error:
            self.waiting.appendleft(request)
            self.relief.of_admission(request, error)
            return
        except Exception as error:  # what a shared or stored cache raises ends this request
            self.end(request, "error", error)
            return
        request.cache, self.read = cache, request
        self._reading = self.make_reading(self.model, cache, ids)
        held = self._reading.held
        if self.shares_prefixes:
            self.prefixes.drop_unused([ids, *self._following()])
        if first:
            request.reused_tokens = held
            self.counters.reused_tokens += held
        self.admission.divide(self.held())
        self.record(RequestStarted, request.number, held)

    def _cache_for(self, ids: array[int]) -> SpinCache:
        """A cache for a prompt, which may hold the first of its tokens."""
        cache = self.prefixes.fork_for(ids) if self.shares_prefixes else None
        if cache is None:
            cache = self.make_cache()
            self.batch.expect(cache)
            cache.calls.before_prompt(cache, _tensor(ids), None)
        return cache

    def _join(self, request: Request) -> None:
        """Make a request whose prompt is read a row."""
        assert request.cache is not None
        try:
            request.row = self.batch.join(request.cache)
        except OUT_OF_MEMORY as error:
            self.waiting.appendleft(request)
            self.relief.of_admission(request, error)
            return
        except Exception as error:  # one request's cache that cannot be a row ends that request
            self.end(request, "error", error)
            return
        request.joined_at = time.perf_counter()
        self.running[request.row] = request
        self.admission.divide(self.held())
        self.record(RequestJoined, request.number)

    def pause(self, request: Request, reason: str) -> None:
        """Take a running request out of the batch. It gives back all memory but its pages. The caller queues it."""
        self._leave(request)
        request.waiting_since = time.perf_counter()
        if request.cache is not None:
            request.cache.release_gpu_memory()
        self.counters.paused += 1
        self.record(RequestPaused, request.number, reason)

    # ------------------------------------------------------------------------------------------------------- prompts

    def _read(self) -> None:
        request, reading, wanted = self.read, self._reading, self._wanted()
        if request is None or reading is None or not wanted:
            return
        number = 0
        try:
            wanted = min(wanted, reading.largest_chunk())
            boundary = self._shared_by_others(reading.ids, reading.held)
            number = reading.chunk(wanted, boundary or len(reading.ids))
            began = time.perf_counter()
            logits = reading.read(number)
            self.wait_for_device()
            seconds = time.perf_counter() - began
        except OUT_OF_MEMORY as error:
            del reading  # an error refers to this frame
            self.relief.of_reading(request, number, error)
            return
        except Exception as error:  # what a forward of this prompt raises ends this request
            del reading
            self.end(request, "error", error)
            return
        self.pace.read(number, seconds, bool(self.running))
        self.counters.read_tokens += number
        self.record(ChunkRead, request.number, number, seconds)
        if reading.left:
            if reading.held == boundary:
                self._keep_prefix(reading)
        else:
            self._finish_reading(request, reading, logits)

    def _wanted(self) -> int:
        """Tokens of the prompt in progress that should be read now; 0 for none."""
        if self._reading is None or (self.running and self.relief.reading_waits):
            return 0
        return self.pace.tokens(min(self._reading.left, self.relief.most_chunk), bool(self.running))

    def _following(self) -> Iterator[array[int]]:
        """Prompts of the requests that come next."""
        return (other.prompt for other in islice(self.waiting, _LOOKED_AT))

    def _shared_by_others(self, ids: array[int], held: int) -> int | None:
        """Tokens of a prompt, more than `held`, that waiting requests begin with too; None if there are none."""
        return self.prefixes.boundary(ids, held, self._following()) if self.shares_prefixes else None

    def _keep_prefix(self, reading: PromptReading) -> None:
        """Keep what has been read of a prompt for waiting requests."""
        reading.close()  # a fork must not be in the middle of a prompt
        try:
            self.prefixes.keep(reading.ids[: reading.held], reading.cache)
        except OUT_OF_MEMORY:
            self.relief.relieve("prefix", self.counters.read_tokens)  # without it, the others read it again

    def stop_reading(self) -> Request:
        """Take the request whose prompt is being read out of its place."""
        request, reading = self.read, self._reading
        assert request is not None
        assert reading is not None
        reading.close()
        self.read = self._reading = None
        return request

    def _finish_reading(self, request: Request, reading: PromptReading, logits: Tensor) -> None:
        self.stop_reading()
        self.collect()
        kept = self.prefixes.longest(reading.ids)
        if may_crop(reading.cache) and self._shared_by_others(reading.ids, kept):
            self._keep_prefix(reading)  # they came while it was read
        if not request.tokens:
            self._store(reading)
            self.decoder.deliver([request], self.decoder.choose([request], logits).read())
        if request.cache is not None:
            self._join(request)

    def _store(self, reading: PromptReading) -> None:
        """Have the store keep a prompt, if there is one. Without memory for that, later requests read it again."""
        try:
            reading.cache.calls.after_prompt(reading.cache, _tensor(reading.ids), None)
        except OUT_OF_MEMORY:
            self.relief.relieve("store", self.counters.read_tokens)

    def stepped(self, rows: int, seconds: float, steady: bool) -> None:
        """Count a step that has been delivered. `steady`: as for `Pace.stepped`."""
        self.pace.stepped(seconds, steady)
        self.counters.stepped(rows, seconds)
        self._divides |= self.counters.steps % _DIVIDE_STEPS == 0
        self.memory = self.relief.bytes_held(self.counters.steps)
        self.record(StepDone, rows, len(self.waiting), seconds, *self.memory)

    # ----------------------------------------------------------------------------------------------------------- ends

    def end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """End a request, wherever it is, and free its memory."""
        if request is self.read:
            self.stop_reading()
        elif request.row is not None:
            self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        if error is not None:
            forget_frames(error)
        self.counters.ended[reason] += 1
        self.record(RequestEnded, request.number, reason, len(request.tokens))
        request.end(reason, error)
        self.relief.freed()
        self._divides = True
        if self.prefixes.held and not self.waiting:
            self.prefixes.drop_all()

    def _leave(self, request: Request) -> None:
        assert request.row is not None
        self.batch.leave(request.row)
        del self.running[request.row]
        request.row = None

    def _end_cancelled(self) -> None:
        self.any_cancelled = False
        cancelled = [request for request in self.requests() if request.cancelled]
        self.waiting = deque(request for request in self.waiting if not request.cancelled)
        for request in cancelled:
            self.end(request, "cancelled")

    def record(self, kind: type[Event], *fields: Any) -> None:
        """Add an event to the log."""
        if self.log is not None:
            self.log.add(kind(time.perf_counter() - self._began, *fields))

    def wait_for_device(self) -> None:
        """Wait until the device has done what was launched."""
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def close(self) -> None:
        """Free what is held between requests, without waiting for the garbage collector."""
        self.prefixes.drop_all()
        self.batch.close()


def _tensor(ids: array[int]) -> Tensor:
    """[1, n], int64."""
    return torch.tensor([ids.tolist()])
