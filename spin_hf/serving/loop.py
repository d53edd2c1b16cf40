"""`RequestLoop`: requests that join and leave a running batch, each with a `SpinCache` of its own.

    loop.submit(prompt, ...)  ->  Request  ->  Worker (thread)  ->  Scheduler  ->  RowBatch
          |                                                            |
          └── RequestHandle  <──────────── tokens, result ─────────────┘

Options are checked when the loop is made, requests when they are submitted.
"""

from __future__ import annotations

import itertools
import math
import time
import weakref
from array import array
from collections.abc import Sequence
from contextlib import suppress
from os import PathLike
from types import TracebackType
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from ..attention.methods.base import Method
from ..cache import SpinCache
from ..config import require_count, require_real
from ..errors import CacheStateError, OptionError, OptionTypeError
from ..integration.forward_hook import unwrapped
from ..persistence.prompt_store import PromptStore
from .admission import Admission
from .events import EventLog, RequestQueued
from .handle import RequestHandle
from .inputs import prompt_of
from .loop_stats import LoopStats
from .pace import Pace
from .preparations import Preparations
from .request import Request
from .results import RequestTimes
from .row import check_cache
from .sampling import Choice
from .scheduler import Scheduler
from .worker import Worker

MAX_ROWS = 64
_LEAST_CHUNK_GPU, _LEAST_CHUNK_CPU = 1024, 128


class RequestLoop:
    """Generates for many requests at once, in one thread. Requests may be submitted at any time, by any thread.

    While it is open, only the loop calls the model.

    Args:
        model: a causal language model.
        method, budget, store, cache_options: as for `SpinCache`; of every request's cache.
        gpu_memory, cpu_memory: caps for all requests together.
        tokenizer: for texts, chats and stop strings, and for the text of results.
        max_rows: most requests that decode at once.
        max_slowdown: most that reading prompts may lengthen the mean time per token of a running request, as a factor; None
            for no bound. A prompt that cannot be read in chunks is read at once.
        max_waiting: most requests in the queue; `submit` waits for room. None for no limit.
        max_wait_s: a request that has waited so many seconds for a place gets that of the request that has run longest, if that
            has run as long. None for never.
        share_prefixes: whether a beginning that several waiting requests share is read once.
        events: an `EventLog`, or a path for one.
    Raises:
        OptionTypeError, OptionError, BudgetError, UnsupportedModelError: an option cannot work, or the model is not served.
    """

    def __init__(
        self, model: PreTrainedModel, method: str | Method = "fitted", *, budget: int | float = 2048,
        gpu_memory: int | str = "auto", store: PromptStore | None = None, tokenizer: Any = None, max_rows: int = MAX_ROWS,
        max_slowdown: float | None = 2.0, max_waiting: int | None = None, max_wait_s: float | None = 60.0,
        share_prefixes: bool = True, events: EventLog | str | PathLike[str] | None = None, **cache_options: Any,
    ) -> None:  # fmt: skip
        max_rows = require_count("max_rows", max_rows, 1, example=MAX_ROWS)
        if max_slowdown is not None:
            max_slowdown = require_real("max_slowdown", max_slowdown, 2.0)
            if not 1.0 < max_slowdown < math.inf:
                raise OptionError(
                    f"max_slowdown: expected more than 1, or None for no bound, got {max_slowdown}; pass max_slowdown=2.0"
                )
        if max_wait_s is not None:
            max_wait_s = require_real("max_wait_s", max_wait_s, 60.0)
            if not max_wait_s >= 0:
                raise OptionError(f"max_wait_s: expected 0 seconds or more, got {max_wait_s}; pass max_wait_s=60.0")
        if max_waiting is not None:
            max_waiting = require_count("max_waiting", max_waiting, 1, example=1000)
        found = unwrapped(model)
        if not hasattr(found, "generate"):
            raise OptionTypeError(
                f"model: expected a model with generate(), got {type(model).__name__}; pass a causal language model"
            )
        options = dict(cache_options, budget=budget, gpu_memory=gpu_memory, store=store)
        self.model, self.tokenizer = found, tokenizer
        self._template = SpinCache(found, method, **options)
        """An empty cache: it keeps the model's forward wrapped, and is asked for sizes."""
        with suppress(CacheStateError):  # it is empty; here, models whose sequences cannot be rows are refused
            check_cache(self._template, found)
        self._admission = Admission(self._template)
        self.preparations = Preparations(found, tokenizer)
        self._vocabulary = int(found.get_input_embeddings().weight.shape[0])
        self._own_log = None if events is None or isinstance(events, EventLog) else EventLog(events)
        self.events = self._own_log or events
        """The `EventLog`; None if there is none."""
        least = _LEAST_CHUNK_GPU if found.device.type == "cuda" else _LEAST_CHUNK_CPU
        self.scheduler = Scheduler(
            found, lambda: SpinCache(found, method, **options), self._admission, Pace(max_slowdown, least), max_rows,
            max_wait_s, share_prefixes, self.events if isinstance(self.events, EventLog) else None,
        )  # fmt: skip
        self.worker = Worker(self.scheduler, max_waiting)
        self._numbers = itertools.count()
        self._finalizer = weakref.finalize(self, self.worker.stop)

    def submit(
        self, inputs: Any, generation_config: GenerationConfig | None = None, *, seed: int | None = None,
        logits_processor: Any = None, stopping_criteria: Any = None, stop_strings: Any = None, **kwargs: Any,
    ) -> RequestHandle:  # fmt: skip
        """Queue a request. Waits for room if the queue is full.

        Args:
            inputs: the prompt: token ids as a list or a tensor [n], a text, or a chat (a list of messages).
            generation_config, kwargs: as for `generate`: greedy search or sampling of one sequence. `max_time` counts from now.
            seed: of its random numbers, which no other request uses: tokens are those of `torch.manual_seed(seed)` and
                `generate` with the prompt alone. None draws one from torch's global generator.
            logits_processor, stopping_criteria: as for `generate`; called in the loop's thread with the ids [1, n] of this
                request. An exception in them ends this request only.
            stop_strings: a text or several that end the answer. Need a tokenizer.
        Returns:
            A handle: tokens as they come, the result, `cancel`.
        Raises:
            CapacityError: the request can never fit the memory.
            OptionError, OptionTypeError, ValueError: an argument is wrong, or a loop cannot serve it.
            CacheStateError: the loop is closed.
        """
        request = self.unchecked(
            inputs, generation_config, seed=seed, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
            stop_strings=stop_strings, **kwargs,
        )  # fmt: skip
        self.check(request)
        self.enqueue([request])
        return request.handle

    def unchecked(self, inputs: Any, generation_config: GenerationConfig | None = None, **kwargs: Any) -> Request:
        """A request that is not queued yet, and may not fit. Arguments and errors as for `submit`."""
        prompt = prompt_of(inputs, self.tokenizer, self._vocabulary)
        return self._made(prompt, generation_config, kwargs)

    def check(self, request: Request) -> None:
        """Raise CapacityError if a request can never fit the memory."""
        self._admission.check(len(request.prompt), request.most_tokens)

    def enqueue(self, requests: Sequence[Request]) -> None:
        """Queue prepared requests."""
        for request in requests:
            request.times.submitted = time.time()
            request.submitted = request.waiting_since = time.perf_counter()
            self.scheduler.record(RequestQueued, request.number, len(request.prompt))
        self.worker.submit(requests)

    def _made(self, prompt: array[int], generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> Request:
        generation = self.preparations.of(prompt, generation_config, **kwargs)
        choice = Choice(generation, prompt, self.model.device)
        number = next(self._numbers)

        def cancel() -> None:  # it holds the loop, which so lives as long as the request
            self.worker.cancel(request)

        handle = RequestHandle(number, cancel)
        request = Request(number, prompt, choice, self.tokenizer, handle, RequestTimes(time.time()))
        return request

    def cancel_all(self) -> None:
        """Cancel every request that has not ended."""
        self.worker.cancel_all()

    def stats(self) -> LoopStats:
        """Requests by state, tokens, and memory. `print` shows the result as a table."""
        scheduler = self.scheduler
        counters = scheduler.counters
        gpu_bytes, cpu_bytes = scheduler.memory
        return LoopStats(
            waiting=self.worker.num_waiting, reading=int(scheduler.read is not None), running=len(scheduler.running),
            ended=dict(counters.ended), prompt_tokens=counters.read_tokens, reused_tokens=counters.reused_tokens,
            generated_tokens=counters.generated_tokens, tokens_per_second=counters.tokens_per_second(),
            steps=counters.steps, mean_rows=counters.rows / counters.steps if counters.steps else 0.0,
            paused=counters.paused, gpu_bytes=gpu_bytes, cpu_bytes=cpu_bytes,
        )  # fmt: skip

    def close(self, *, cancel: bool = False) -> None:
        """Take no more requests, and wait until those submitted have ended. May be called again.

        Args:
            cancel: whether to cancel them instead.
        """
        self.worker.close(cancel)
        if self._own_log is not None:
            self._own_log.close()

    def __enter__(self) -> RequestLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=kind is not None)
