"""Steps that run ahead of the host: what is launched and delivered when, and what waits until no step is in flight."""

from __future__ import annotations

from typing import Any

import torch

from spin_hf import RequestLoop
from tests.support.loop_schedules import generated_alone
from tests.support.zoo import build_model, random_tokens

MODEL = build_model("llama")
OPTIONS: dict[str, Any] = dict(method="shadowkv", budget=4096)
PROMPT = random_tokens(1, 20, seed=1)[0].tolist()


def loop_ahead() -> RequestLoop:
    loop = RequestLoop(MODEL, max_rows=2, max_slowdown=None, **OPTIONS)
    loop.scheduler.decoder.runs_ahead = True
    return loop


def logged(loop: RequestLoop) -> list[str]:
    """What happens from now on: steps that are launched, and tokens that are delivered."""
    log: list[str] = []
    step, deliver = loop.scheduler.batch.step, loop.scheduler.decoder.deliver

    def launched(tokens: dict[int, int], ids: torch.Tensor | None) -> torch.Tensor:
        log.append("step" if ids is None else "step ahead")
        return step(tokens, ids)

    def delivered(*arguments: Any, **options: Any) -> None:
        log.append("deliver")
        deliver(*arguments, **options)

    loop.scheduler.batch.step = launched  # type: ignore[method-assign]
    loop.scheduler.decoder.deliver = delivered  # type: ignore[method-assign]
    return log


def test_a_step_is_launched_before_the_tokens_of_the_last_one_are_delivered() -> None:
    loop = loop_ahead()
    request, log = loop.unchecked(PROMPT, max_new_tokens=4, do_sample=False), logged(loop)
    loop.scheduler.waiting.append(request)
    while loop.scheduler.turn():
        pass
    assert log == ["deliver", "step", "step ahead", "deliver", "step ahead", "deliver", "deliver"]
    assert request.tokens == generated_alone(MODEL, PROMPT, OPTIONS, max_new_tokens=4)


def test_a_token_that_ends_a_request_is_learned_one_step_late() -> None:
    expected = generated_alone(MODEL, PROMPT, OPTIONS, max_new_tokens=8)
    end = expected.index(expected[2])
    loop = loop_ahead()
    request, log = loop.unchecked(PROMPT, max_new_tokens=8, do_sample=False, eos_token_id=expected[2]), logged(loop)
    loop.scheduler.waiting.append(request)
    while loop.scheduler.turn():
        pass
    assert request.tokens == expected[: end + 1]
    assert sum("step" in what for what in log) == end + 1, "one in vain"
    assert loop.stats().ended == {"stop": 1}


def test_nothing_changes_while_a_step_is_in_flight() -> None:
    """Not even if it becomes due behind the look at what is due, as when another thread cancels."""
    loop = loop_ahead()
    scheduler = loop.scheduler
    request = loop.unchecked(PROMPT, max_new_tokens=8, do_sample=False)
    scheduler.waiting.append(request)
    for _ in range(3):
        scheduler.turn()
    due = scheduler._is_due

    def cancelled_meanwhile() -> bool:
        found = due()
        loop.worker.cancel(request)
        return found

    scheduler._is_due = cancelled_meanwhile  # type: ignore[method-assign]
    held = len(request.tokens)
    scheduler.turn()
    assert scheduler.running
    assert len(request.tokens) == held + 1
    scheduler.turn()
    assert not scheduler.running
    assert request.handle.outcome(0).finish_reason == "cancelled"
    assert request.tokens == generated_alone(MODEL, PROMPT, OPTIONS, max_new_tokens=8)[: held + 2]
