"""A loop whose allocations fail: the batch shrinks, and only a request that fails alone ends with the error."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from spin_hf import CapacityError, RequestLoop, SpinCache
from spin_hf.serving import sampling
from spin_hf.serving.events import ChunkRead, RequestPaused
from spin_hf.serving.reading import PromptReading
from spin_hf.serving.request import Request
from spin_hf.serving.row import Row
from tests.support.full_schedules import MODEL, FullSchedule, Log
from tests.support.loop_schedules import generated_alone
from tests.support.zoo import random_tokens

OPTIONS: dict[str, Any] = dict(method="shadowkv", budget=4096)
PROMPTS = [random_tokens(1, length, seed=length)[0].tolist() for length in (500, 120, 90)]


@pytest.mark.parametrize("seed", [3, 21, 32, 47, 58])
def test_a_few_full_gpus(seed: int) -> None:
    assert FullSchedule(seed).run().failures


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_full_gpus(part: int) -> None:
    assert sum(FullSchedule(seed).run().failures for seed in range(100 + 50 * part, 150 + 50 * part))


class Run:
    """A loop without a thread, and its requests."""

    def __init__(self, prompts: list[list[int]], new: int = 10, **sampled: Any) -> None:
        self.loop = RequestLoop(MODEL, max_rows=4, max_slowdown=None, max_wait_s=None, share_prefixes=False, **OPTIONS)
        self.scheduler, self.new, self.log = self.loop.scheduler, new, Log()
        self.scheduler.log = self.log  # type: ignore[assignment]
        self.caches: list[weakref.ref[SpinCache]] = []
        make = self.scheduler.make_cache

        def watched() -> SpinCache:
            cache = make()
            self.caches.append(weakref.ref(cache))
            return cache

        self.scheduler.make_cache = watched
        self.requests = [
            self.loop.unchecked(prompt, max_new_tokens=new, seed=seed, **sampled) for seed, prompt in enumerate(prompts)
        ]
        self.scheduler.waiting.extend(self.requests)

    def finish(self) -> list[Request]:
        for _ in range(300):
            if not self.scheduler.turn():
                return self.requests
        raise AssertionError(f"no progress: {self.loop.stats()}")

    def check(self) -> None:
        """Finish, and compare the tokens of each request with those alone."""
        for request in self.finish():
            result = request.handle.outcome(0)
            expected = generated_alone(MODEL, result.prompt, OPTIONS, max_new_tokens=self.new)
            assert result.tokens == expected, f"{result.error!r}"

    def events(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.log.events if isinstance(event, kind)]

    def alive(self) -> int:
        return sum(cache() is not None for cache in self.caches)


@pytest.fixture
def no_gc() -> Iterator[None]:
    """Reference cycles stay: memory must be free without a collection."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_gc")
def test_a_step_that_failed_keeps_no_cache_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    run, room, calls = Run(PROMPTS), Row.check_room, 0

    def full(row: Row) -> None:
        nonlocal calls
        calls += 1
        if calls in (5, 7):
            raise CapacityError("full")
        room(row)

    monkeypatch.setattr(Row, "check_room", full)
    run.check()
    assert [event.reason for event in run.events(RequestPaused)] == ["memory"]
    assert run.alive() == 0


@pytest.mark.usefixtures("no_gc")
def test_the_error_of_a_request_keeps_no_cache_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(reading: PromptReading, number: int) -> Any:
        states = torch.zeros(8)
        raise ValueError("a forward") from CapacityError(f"{states.shape}")

    monkeypatch.setattr(PromptReading, "read", broken)
    run = Run(PROMPTS[:1])
    (request,) = run.finish()
    error = request.handle.outcome(0).error
    assert isinstance(error, ValueError)
    assert error.__traceback__ is not None, "the lines stay"
    assert run.alive() == 0


@pytest.mark.parametrize("activations", [True, False])
def test_chunks_shrink_for_activations_only(activations: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are reserved for a whole prompt, so smaller chunks would not help; and later prompts get larger chunks again."""
    run, read, failures = Run(PROMPTS), PromptReading.read, 0

    def full(reading: PromptReading, number: int) -> torch.Tensor:
        nonlocal failures
        if number > 300 and failures < 2:
            failures += 1
            raise torch.OutOfMemoryError("activations") if activations else CapacityError("pages")
        return read(reading, number)

    monkeypatch.setattr(PromptReading, "read", full)
    run.scheduler.waiting.rotate(-1)  # the long prompt is read beside others
    if not activations:
        run.scheduler.turn()
    run.check()
    chunks = [event.tokens for event in run.events(ChunkRead)]
    assert failures == 2
    assert max(chunks) == (256 if activations else 500)
    assert run.scheduler.relief.most_chunk > 256


@pytest.mark.parametrize("where", ["_best_or_probabilities", "multinomial"])
def test_choosing_tokens_is_tried_again(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is freed in between. Random numbers are drawn once."""
    sampled: dict[str, Any] = dict(do_sample=True, temperature=1.3) if where == "multinomial" else {}
    run, failures, home = Run(PROMPTS, **sampled), 0, torch if where == "multinomial" else sampling
    original = getattr(home, where)

    def full(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal failures
        failures += 1
        if failures in (1, 6, 9):
            raise torch.OutOfMemoryError("logits")
        return original(*args, **kwargs)

    monkeypatch.setattr(home, where, full)
    results = [request.handle.outcome(0) for request in run.finish()]
    monkeypatch.undo()
    assert failures > 9
    for seed, result in enumerate(results):
        torch.manual_seed(seed)
        assert result.tokens == generated_alone(MODEL, result.prompt, OPTIONS, max_new_tokens=10, **sampled)


def test_a_choice_without_memory_ends_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(PROMPTS[1:])

    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("logits")

    monkeypatch.setattr(sampling, "_best_or_probabilities", full)
    assert [type(request.handle.outcome(0).error) for request in run.finish()] == 2 * [torch.OutOfMemoryError]


@pytest.mark.parametrize("times", [1, 2, 4])
def test_a_request_that_gets_no_row_waits(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run, left = Run(PROMPTS), times
    join = run.scheduler.batch.join

    def full(cache: SpinCache) -> int:
        nonlocal left
        if run.scheduler.running and left:
            left -= 1
            raise torch.OutOfMemoryError("a row")
        return join(cache)

    monkeypatch.setattr(run.scheduler.batch, "join", full)
    run.check()
    assert left == 0
