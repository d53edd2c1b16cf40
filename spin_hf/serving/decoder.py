"""Decode steps of the running requests. On a GPU the host reads the tokens of a step while the device runs the next one.

    step n        logits -> chosen ids, on the device ──┬──> host
    step n + 1    launched with these ids  <────────────┘
                  the tokens of step n are delivered; who ends with one leaves
    step n + 2    launched with the ids of step n + 1, without those who left

A request that ends with a token has taken one more step by then, in vain; its cache is dropped. Steps run ahead while nothing
else is due: before a prompt is read, or a request joins, pauses or is cancelled, the tokens are delivered (`settle`). With
processors that read ids on the host, steps do not run ahead.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from .request import Request
from .row_errors import OUT_OF_MEMORY
from .sampling import Chosen, choose


@dataclass(eq=False)
class Flight:
    """A step that is launched and not delivered.

    Attributes:
        requests: its rows.
        chosen: their tokens.
        began: `time.perf_counter()` before the launch.
        steady: whether all of them had taken a step before.
    """

    requests: list[Request]
    chosen: Chosen
    began: float
    steady: bool


class Decoder:
    """The steps of one scheduler.

    Args:
        scheduler: the `Scheduler` whose running requests take steps.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.runs_ahead = scheduler.model.device.type == "cuda"
        self._flight: Flight | None = None
        self._delivered_at = 0.0

    def step(self) -> None:
        """Launch a step of all running requests. Delivers the tokens of the step before, and its own unless steps run ahead."""
        flight, scheduler = self._flight, self._scheduler
        requests, ids = self._next(flight)
        if not requests:
            self.settle()
            return
        began = time.perf_counter()
        rows = {request.row: request.tokens[-1] for request in requests}
        steady = all(request.has_stepped for request in requests)
        try:
            logits = scheduler.batch.step(rows, ids)
        except OUT_OF_MEMORY as error:
            self.settle()
            scheduler.relief.of_step(error)
            return
        except Exception as error:  # what a forward raises is the error of all its rows
            self.settle()
            for request in requests:
                if self._runs(request):
                    scheduler.end(request, "error", error)
            return
        chosen = self.choose(requests, logits)
        self.settle(beside_a_step=True)
        self._flight = Flight(requests, chosen, began, steady)
        for request in requests:
            request.has_stepped = True
        if not self.runs_ahead or any(request.choice.group is None for request in requests):
            self.settle()

    def settle(self, beside_a_step: bool = False) -> None:
        """Deliver the tokens of the last step, if that is due.

        Args:
            beside_a_step: whether the device runs another one by now.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return
        tokens, scheduler = flight.chosen.read(), self._scheduler
        now = time.perf_counter()
        seconds, self._delivered_at = now - max(flight.began, self._delivered_at), now
        scheduler.stepped(len(flight.requests), seconds, flight.steady)
        running = [number for number, request in enumerate(flight.requests) if self._runs(request)]
        self.deliver([flight.requests[n] for n in running], [tokens[n] for n in running], beside_a_step)

    def choose(self, requests: list[Request], logits: Tensor) -> Chosen:
        """The next token of each request, on the device. `logits`: [n, vocabulary], float32."""
        choices, tokens = [request.choice for request in requests], [request.tokens for request in requests]
        return choose(choices, tokens, logits, partial(self._scheduler.relief.relieve, "choice", self._chosen()))

    def _chosen(self) -> int:
        """A number that grows with every choice."""
        counters = self._scheduler.counters
        return int(counters.generated_tokens + counters.read_tokens)

    def deliver(self, requests: list[Request], tokens: list[int | Exception], beside_a_step: bool = False) -> None:
        """Give each request its next token, and end those that are done."""
        ends: list[tuple[Request, str, Exception | None]] = []
        for request, token in zip(requests, tokens, strict=True):
            if isinstance(token, Exception):
                ends.append((request, "error", token))
                continue
            request.add(token)
            self._scheduler.counters.generated_tokens += 1
            try:
                reason = request.choice.reason(request.tokens)
            except Exception as error:  # what a criterion of the user raises ends this request
                ends.append((request, "error", error))
                continue
            if reason is not None:
                ends.append((request, reason, None))
        if ends and beside_a_step:
            self._scheduler.wait_for_device()  # it may still read their pages
        for end in ends:
            self._scheduler.end(*end)

    def _next(self, flight: Flight | None) -> tuple[list[Request], Tensor | None]:
        """The requests of the next step, and their tokens on the device; None for those that are delivered."""
        if flight is None:
            return list(self._scheduler.running.values()), None
        kept = [
            number for number, request in enumerate(flight.requests)
            if self._runs(request) and number not in flight.chosen.errors
            and request.num_tokens + 1 < request.choice.generation.max_length
        ]  # fmt: skip
        return [flight.requests[number] for number in kept], flight.chosen.ids_of(kept)

    def _runs(self, request: Request) -> bool:
        return self._scheduler.running.get(request.row) is request
