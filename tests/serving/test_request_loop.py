"""`RequestLoop` with its thread: handles, threads, asyncio, cancelling, closing, limits and faults."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from spin_hf import (
    CacheStateError,
    CapacityError,
    EventLog,
    PromptStore,
    RequestLoop,
    ShadowKV,
)
from spin_hf.serving.events import ChunkRead, read_events
from spin_hf.serving.reading import PromptReading
from tests.support.error_messages import check_message
from tests.support.loop_schedules import FailsAt
from tests.support.request_loops import PROMPT, alone, made
from tests.support.since import Since
from tests.support.zoo import random_tokens


class Held(LogitsProcessor):
    """Holds the loop's thread at the first token until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.reached.set()
        assert self.opened.wait(60)
        return scores


def held() -> tuple[Held, LogitsProcessorList]:
    gate = Held()
    return gate, LogitsProcessorList([gate])


def test_tokens_come_one_by_one_and_the_result_has_them_all() -> None:
    with made() as loop:
        handle = loop.submit(PROMPT, max_new_tokens=6)
        tokens = list(handle)
        result = handle.result(60)
    assert tokens == alone(max_new_tokens=6)
    assert result.tokens == handle.tokens == list(handle)
    assert result.finish_reason == "length"
    assert result.prompt == PROMPT
    assert result.sequences.tolist() == [PROMPT + result.tokens]
    times = result.times
    assert times.queued is not None
    assert times.first_token is not None
    assert times.per_token is not None
    assert times.ended is not None
    assert 0 <= times.queued <= times.first_token <= times.tokens[-1] <= times.ended
    assert len(times.tokens) == 6


def test_threads_and_event_loops_read_side_by_side() -> None:
    expected = alone(max_new_tokens=5)
    found: list[list[int]] = []

    def ask(loop: RequestLoop) -> None:
        found.append(list(loop.submit(torch.tensor(PROMPT), max_new_tokens=5)))

    async def main(loop: RequestLoop) -> None:
        handles = [loop.submit(PROMPT, max_new_tokens=5) for _ in range(3)]
        found.append([token async for token in handles[0]])
        results = await asyncio.gather(*handles)
        found.extend(result.tokens for result in results)
        found.append([token async for token in handles[1]])  # has ended

    with made() as loop:
        threads = [threading.Thread(target=ask, args=(loop,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        asyncio.run(main(loop))
        for thread in threads:
            thread.join()
    assert found == [expected] * 8


def test_cancelled_requests_keep_their_tokens_and_others_go_on() -> None:
    gate, processors = held()
    expected, of_other = alone(max_new_tokens=2), alone(PROMPT[:30], max_new_tokens=4)
    with made() as loop:
        first = loop.submit(PROMPT, max_new_tokens=50, logits_processor=processors)
        second = loop.submit(PROMPT[:20], max_new_tokens=50)
        other = loop.submit(PROMPT[:30], max_new_tokens=4)
        assert gate.reached.wait(60)
        first.cancel()
        second.cancel()
        gate.opened.set()
        assert first.result(60).finish_reason == second.result(60).finish_reason == "cancelled"
        assert other.result(60).tokens == of_other
        first.cancel()
        assert 1 <= len(first.tokens) <= 2, "a step may have been in progress"
        assert first.tokens == expected[: len(first.tokens)]
        assert second.tokens == []
        with pytest.raises(TimeoutError, match="has not ended"):
            gate.opened.clear()
            loop.submit(PROMPT, max_new_tokens=2, logits_processor=processors).result(0.01)
        gate.opened.set()


def test_closing() -> None:
    loop = made()
    handle = loop.submit(PROMPT, max_new_tokens=4)
    loop.close()
    assert handle.done
    assert handle.result().tokens == alone(max_new_tokens=4)
    loop.close()
    with pytest.raises(CacheStateError) as caught:
        loop.submit(PROMPT, max_new_tokens=4)
    check_message(caught.value, "open RequestLoop", "closed", "make a new one")
    gate, processors = held()
    with pytest.raises(ZeroDivisionError), made() as loop:
        handle = loop.submit(PROMPT, max_new_tokens=4, logits_processor=processors)
        assert gate.reached.wait(60)
        gate.opened.set()
        raise ZeroDivisionError
    assert handle.done


def test_a_dropped_loop_ends_its_thread() -> None:
    since = Since()
    loop = made()
    loop.submit(PROMPT, max_new_tokens=1).result(60)
    assert since.threads() == ["spin_hf RequestLoop"]
    del loop
    gc.collect()
    assert not since.threads()


def test_the_queue_is_bounded() -> None:
    gate, processors = held()
    expected = alone(max_new_tokens=2)
    with made(max_rows=1, max_waiting=1) as loop:
        handles = [loop.submit(PROMPT, max_new_tokens=2, logits_processor=processors)]
        assert gate.reached.wait(60)
        handles.append(loop.submit(PROMPT, max_new_tokens=2))
        thread = threading.Thread(target=lambda: handles.append(loop.submit(PROMPT, max_new_tokens=2)))
        thread.start()
        time.sleep(0.05)
        assert len(handles) == 2, "the third waits for room"
        gate.opened.set()
        thread.join(60)
        assert [handle.result(60).tokens for handle in handles] == [expected] * 3


# ------------------------------------------------------------------------------------------------------------ faults


def test_a_failing_processor_ends_its_request_only() -> None:
    class Wrong(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            raise KeyError("a criterion of the user")

    with made() as loop:
        bad = loop.submit(PROMPT, max_new_tokens=6, logits_processor=LogitsProcessorList([FailsAt(2)]))
        worse = loop.submit(PROMPT, max_new_tokens=6, stopping_criteria=StoppingCriteriaList([Wrong()]))
        good = loop.submit(PROMPT, max_new_tokens=6)
        with pytest.raises(ZeroDivisionError):
            bad.result(60)
    expected = alone(max_new_tokens=6)
    assert bad.outcome().tokens == expected[:2]
    assert worse.outcome().tokens == expected[:1]
    assert isinstance(worse.outcome().error, KeyError)
    assert good.result().tokens == expected
    seen = []
    with pytest.raises(ZeroDivisionError):
        seen += bad


def test_a_fault_of_the_thread_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = made()
    monkeypatch.setattr(loop.scheduler, "turn", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.submit(PROMPT, max_new_tokens=2).result(60)
    with pytest.raises(CacheStateError) as caught:
        loop.submit(PROMPT, max_new_tokens=2)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_what_can_never_fit_is_refused_at_once() -> None:
    with made(gpu_memory="100KB") as loop:
        with pytest.raises(CapacityError) as caught:
            loop.submit(PROMPT * 20, max_new_tokens=2000)
        check_message(caught.value, "needs", "GPU memory", "raise gpu_memory")
        assert caught.value.needed_bytes is not None
        assert caught.value.available_bytes == 100_000
    with (
        made(budget=64, gpu_memory="300KB", cpu_memory="200KB") as loop,
        pytest.raises(CapacityError, match="host memory"),
    ):
        loop.submit(PROMPT * 20, max_new_tokens=100)


def test_two_that_do_not_fit_together_run_one_after_the_other() -> None:
    prompts = [random_tokens(1, 300, seed=seed)[0].tolist() for seed in range(3)]
    expected = [alone(prompt, max_new_tokens=8) for prompt in prompts]
    with made(gpu_memory="400KB", method=ShadowKV(), budget=64, recent_window=16) as loop:
        handles = [loop.submit(prompt, max_new_tokens=8) for prompt in prompts]
        lengths = [len(handle.result(60).tokens) for handle in handles]
        assert lengths == [8] * 3
        rows = loop.stats().mean_rows
    assert rows == 1.0
    with made(gpu_memory="4MB") as loop:
        handles = [loop.submit(prompt, max_new_tokens=8) for prompt in prompts]
        assert [handle.result(60).tokens for handle in handles] == expected
        assert loop.stats().mean_rows > 1.0


def test_a_request_that_waits_too_long_takes_the_place_of_another() -> None:
    prompts = [random_tokens(1, 60, seed=seed)[0].tolist() for seed in range(2)]
    expected = [alone(prompt, max_new_tokens=12) for prompt in prompts]
    with made(max_rows=1, max_wait_s=0.0) as loop:
        handles = [loop.submit(prompt, max_new_tokens=12) for prompt in prompts]
        results = [handle.result(60) for handle in handles]
        assert loop.stats().paused > 2
    assert [result.tokens for result in results] == expected
    starts = [result.times.started for result in results]
    assert starts[1] is not None
    assert starts[1] < results[0].times.tokens[-1], "the second has not waited for the end of the first"


# ---------------------------------------------------------------------------------------------------- prompts and store


def test_a_shared_beginning_is_read_once() -> None:
    document = random_tokens(1, 300)[0].tolist()
    prompts = [document + random_tokens(1, 5, seed=seed)[0].tolist() for seed in range(4)]
    gate, processors = held()
    with made() as loop:
        loop.submit(PROMPT, max_new_tokens=1, logits_processor=processors)
        assert gate.reached.wait(60)
        handles = [loop.submit(prompt, max_new_tokens=4) for prompt in prompts]
        gate.opened.set()
        results = [handle.result(60) for handle in handles]
        stats = loop.stats()
    assert [result.tokens for result in results] == [alone(prompt, max_new_tokens=4) for prompt in prompts]
    assert [result.reused_tokens for result in results] == [0, 300, 300, 300]
    assert stats.reused_tokens == 900
    assert stats.prompt_tokens == len(PROMPT) + 300 + 4 * 5


@pytest.mark.parametrize("long", [False, True])
def test_requests_that_come_while_a_prompt_is_read_share_it(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of its chunks, or while its only chunk is read."""
    document = random_tokens(1, 800 if long else 300)[0].tolist()
    prompts = [document + random_tokens(1, 5, seed=seed)[0].tolist() for seed in range(3)]
    reached, opened, read = threading.Event(), threading.Event(), PromptReading.read

    def reading(self: PromptReading, number: int) -> torch.Tensor:
        if self.held == 0:
            reached.set()
            assert opened.wait(60)
        return read(self, number)

    monkeypatch.setattr(PromptReading, "read", reading)
    with made(prefill_chunk_size=256 if long else None) as loop:
        first = loop.submit(prompts[0], max_new_tokens=4)
        assert reached.wait(60)
        handles = [first, *(loop.submit(prompt, max_new_tokens=4) for prompt in prompts[1:])]
        opened.set()
        results = [handle.result(60) for handle in handles]
    assert [result.tokens for result in results] == [alone(prompt, max_new_tokens=4) for prompt in prompts]
    assert [result.reused_tokens for result in results] == [0, len(document), len(document)]


def test_a_stored_beginning_is_not_read() -> None:
    store, prompt = PromptStore(block_tokens=8), PROMPT * 3
    with made(store=store, share_prefixes=False) as loop:
        loop.submit(prompt, max_new_tokens=2).result(60)
        result = loop.submit([*prompt, 7], max_new_tokens=4).result(60)
    assert result.tokens == alone([*prompt, 7], max_new_tokens=4)
    assert result.reused_tokens == len(prompt)


def test_prompts_are_read_between_steps() -> None:
    """A long prompt takes several chunks, and the running request gets tokens meanwhile."""
    long = random_tokens(1, 900)[0].tolist()
    log, expected = EventLog(), alone(long, max_new_tokens=2)
    with made(max_slowdown=1.5, events=log) as loop:
        running = loop.submit(PROMPT, max_new_tokens=150)
        next(iter(running))
        reading = loop.submit(long, max_new_tokens=2)
        assert reading.result(60).tokens == expected
        running.cancel()
    kinds = [type(event).__name__ for event in log.events]
    assert kinds.count("ChunkRead") > 3
    second = kinds.index("RequestStarted", kinds.index("RequestStarted") + 1)
    last = len(kinds) - 1 - kinds[::-1].index("ChunkRead")
    assert kinds[second:last].count("StepDone") >= 3


@pytest.mark.parametrize("length", [129, 200, 300])
def test_a_prompt_that_nobody_waits_for_is_one_chunk(length: int) -> None:
    """Not whole blocks, and then a rest."""
    log = EventLog()
    with made(events=log) as loop:
        loop.submit(random_tokens(1, length)[0].tolist(), max_new_tokens=1).result(60)
    assert [event.tokens for event in log.events if isinstance(event, ChunkRead)] == [length]


# ------------------------------------------------------------------------------------------------------------ seeing it


def test_events_and_stats(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    loop = made(events=file)
    loop.submit(PROMPT, max_new_tokens=3).result(60)
    stats = loop.stats()
    loop.close()
    lines = file.read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == [
        "RequestQueued", "RequestStarted", "ChunkRead", "RequestJoined", "StepDone", "StepDone", "RequestEnded",
    ]  # fmt: skip
    assert isinstance(loop.events, EventLog)
    assert read_events(lines) == list(loop.events.events)
    assert stats.ended == {"length": 1}
    assert (stats.generated_tokens, stats.prompt_tokens, stats.steps, stats.mean_rows) == (3, 40, 2, 1.0)
    assert (stats.waiting, stats.running, stats.reading) == (0, 0, 0)
    assert "generated tokens" in str(stats)
