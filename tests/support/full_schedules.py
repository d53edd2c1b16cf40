"""Random loops on a GPU that is full: requests of all lengths, a user who takes memory and frees it, pieces that are lost.

Nothing depends on measured times.
"""

from __future__ import annotations

import gc
import random
from collections import Counter
from typing import Any
from unittest.mock import patch

from spin_hf import RequestLoop
from spin_hf.serving import admission
from spin_hf.serving.events import Event, RequestEnded, RequestPaused
from spin_hf.serving.request import Request
from tests.support.full_gpu import FullGpu, full_gpu
from tests.support.loop_schedules import generated_alone
from tests.support.zoo import build_model, random_tokens

MODEL = build_model("llama")
LONGEST = 500
MOST_NEW = 30
MOST_TURNS = 1500


class Log:
    """Keeps events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, event: Event) -> None:
        self.events.append(event)

    def most_pauses(self) -> int:
        """How often one request was paused for memory while none ended."""
        pauses: Counter[int] = Counter()
        most = 0
        for event in self.events:
            if isinstance(event, RequestEnded):
                pauses.clear()
            elif isinstance(event, RequestPaused) and event.reason == "memory":
                pauses[event.request] += 1
                most = max(most, pauses[event.request])
        return most


class FullSchedule:
    """One random history. Every request fits the GPU alone.

    Args:
        seed: which history.
    """

    def __init__(self, seed: int) -> None:
        self.random, self.log = random.Random(seed), Log()
        choose = self.random.choice
        self.exact = choose([True, False])
        sparse: dict[str, Any] = dict(budget=32, recent_window=16)
        self.options = dict(method=choose(["shadowkv", "fitted"]), **(dict(budget=4096) if self.exact else sparse))
        lengths = [choose([40, 240, 250, LONGEST]) for _ in range(self.random.randint(3, 6))]
        if choose([True, False]):
            lengths = [LONGEST] * self.random.randint(3, 5)
        self.prompts = [
            (random_tokens(1, length, seed=number)[0].tolist(), choose([1, 5, 20, MOST_NEW]))
            for number, length in enumerate(lengths)
        ]
        self.resident = self.loop(self.options).scheduler.admission.needs(LONGEST + MOST_NEW).resident
        self.total = int(self.resident * choose([1.2, 1.5, 2.2]) / 0.8)
        self.lost, self.token_bytes = (
            int(self.total * choose([0.05, 0.1, 0.14, 0.17])),
            choose([0, 1, 2]) * self.total // 4000,
        )
        self.user = choose([1, 2]) * self.resident
        self.host_fails = choose([0, 0, 0.1, 0.5])
        self.rate = choose([1.0, 1e15, 1e15])
        """Bytes per second that move to host memory: requests always wait for room for all pages, or never."""

    def loop(self, options: dict[str, Any]) -> RequestLoop:
        """A loop over the model."""
        choose = self.random.choice
        return RequestLoop(
            MODEL, max_rows=choose([2, 4, 8]), max_slowdown=None, max_wait_s=choose([None, None, 0.0]),
            share_prefixes=False, **options,
        )  # fmt: skip

    def run(self) -> FullGpu:
        """Run the history to its end and check every result. Returns the GPU, which counts failed allocations."""
        expected = [generated_alone(MODEL, p, self.options, max_new_tokens=n) for p, n in self.prompts if self.exact]
        gc.collect()
        gc.disable()  # memory must be free without it
        try:
            with (
                patch.object(admission, "_MOVED_BYTES_PER_S", self.rate),
                full_gpu(
                    self.total + self.user, MODEL, self.lost, self.token_bytes, self.random, self.host_fails
                ) as gpu,
            ):
                results = [request.handle.outcome(0) for request in self._run(gpu)]
        finally:
            gc.enable()
        for number, result in enumerate(results):
            assert result.finish_reason == "length", f"request {number}: {result.error!r}"
            assert not self.exact or result.tokens == expected[number]
        assert self.log.most_pauses() <= 1
        return gpu

    def _run(self, gpu: FullGpu) -> list[Request]:
        loop = self.loop(self.options)
        scheduler, left, requests = loop.scheduler, list(self.prompts), []
        scheduler.log = self.log  # type: ignore[assignment]
        scheduler.decoder.runs_ahead = self.random.choice([True, False])
        at_once, turns = self.random.choice([True, False]), 0
        while left or scheduler.requests():
            while left and (at_once or self.random.random() < 0.2):
                prompt, new = left.pop(0)
                requests.append(loop.unchecked(prompt, max_new_tokens=new))
                loop.check(requests[-1])
                scheduler.waiting.append(requests[-1])
            if self.random.random() < 0.3:  # a user takes free memory, or gives it back
                wanted = self.random.choice([0, self.user // 2, self.user])
                gpu.fake.user = min(wanted, gpu.fake.user + max(0, gpu.free))
            scheduler.turn()
            turns += 1
            assert turns < MOST_TURNS, f"no progress: {loop.stats()}"
            known = [*(cache for cache, _ in scheduler.held()), *scheduler.idle()]
            stores = {id(layer.store) for cache in known for layer in cache.paged_layers}
            assert all(id(store) in stores for store in gpu.stores), "a request that has ended holds memory"
        return requests
