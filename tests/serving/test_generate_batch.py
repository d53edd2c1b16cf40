"""`generate_batch`: results in order, kinds of prompts, seeds, several results of a prompt, Ctrl-C, and flat memory."""

from __future__ import annotations

import gc
import signal
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

from spin_hf import CapacityError, OptionError, OptionTypeError, RequestLoop, generate_batch
from spin_hf.serving import progress
from tests.support.loop_schedules import FailsAt, generated_alone, resident_bytes
from tests.support.since import Since
from tests.support.tokenizers import letters
from tests.support.zoo import build_model, random_tokens

MODEL = build_model("llama")
OPTIONS: dict[str, Any] = dict(budget=4096, method="shadowkv")
PROMPTS = [random_tokens(1, length, seed=length)[0].tolist() for length in (40, 3, 150, 33, 90)]


def batch(prompts: Any = PROMPTS, *arguments: Any, **options: Any) -> list[Any]:
    return generate_batch(MODEL, prompts, *arguments, **{**OPTIONS, "max_rows": 2, **options})


def alone(prompt: list[int], **kwargs: Any) -> list[int]:
    return generated_alone(MODEL, prompt, OPTIONS, **kwargs)


def test_results_are_in_order() -> None:
    results = batch(max_new_tokens=5)
    assert [result.tokens for result in results] == [alone(prompt, max_new_tokens=5) for prompt in PROMPTS]
    assert [result.prompt for result in results] == PROMPTS
    assert {result.finish_reason for result in results} == {"length"}
    assert batch([]) == []


def test_texts_chats_and_ids() -> None:
    tokenizer = letters()
    text = tokenizer.decode(PROMPTS[0])
    chat = [{"role": "user", "content": "hello"}]
    of_chat = tokenizer("user:hello/a:")["input_ids"]
    given = [text, chat, torch.tensor(PROMPTS[0]), torch.tensor([PROMPTS[0]]), tokenizer(text, return_tensors="pt")]
    results = batch(given, tokenizer=tokenizer, max_new_tokens=4)
    expected = alone(PROMPTS[0], max_new_tokens=4)
    assert [result.tokens for result in results] == [expected, alone(of_chat, max_new_tokens=4), *[expected] * 3]
    assert [result.text for result in results] == [tokenizer.decode(result.tokens) for result in results]


def test_seeds_count_from_the_first_prompt() -> None:
    sampling: dict[str, Any] = dict(do_sample=True, temperature=1.1, max_new_tokens=5)
    expected = []
    for number, prompt in enumerate(PROMPTS):
        torch.manual_seed(7 + number)
        expected.append(alone(prompt, **sampling))
    assert [result.tokens for result in batch(seed=7, **sampling)] == expected
    shuffled = batch(PROMPTS[::-1], seed=[11, 10, 9, 8, 7], max_rows=5, **sampling)
    assert [result.tokens for result in shuffled] == expected[::-1]
    with pytest.raises(OptionError, match="seed"):
        batch(seed=[1, 2], **sampling)


def test_several_results_of_a_prompt() -> None:
    sampling: dict[str, Any] = dict(do_sample=True, max_new_tokens=4)
    results = batch(PROMPTS[2:3], num_return_sequences=3, seed=1, **sampling)
    expected = []
    for number in range(3):
        torch.manual_seed(1 + number)
        expected.append(alone(PROMPTS[2], **sampling))
    assert [result.tokens for result in results] == expected
    assert [result.reused_tokens for result in results] == [0, 149, 149], "the prompt is read once"
    config = GenerationConfig(num_return_sequences=3, **sampling)
    assert [result.tokens for result in batch(PROMPTS[2:3], config, seed=1)] == expected


def test_a_request_that_fails_is_an_error_of_its_own() -> None:
    results = batch(max_new_tokens=3, logits_processor=LogitsProcessorList([FailsAt(4)]))
    assert [result.finish_reason for result in results].count("error") > 0
    assert all(isinstance(result.error, ZeroDivisionError) for result in results if result.finish_reason == "error")
    long = random_tokens(1, 900)[0].tolist()
    results = batch([long, PROMPTS[0]], max_new_tokens=3, gpu_memory="150KB")
    assert isinstance(results[0].error, CapacityError)
    assert results[0].tokens == []
    assert results[1].tokens == alone(PROMPTS[0], max_new_tokens=3)


@pytest.mark.parametrize("inputs", ["a text", 3, [1, 2, 3], {"input_ids": [1]}])
def test_inputs_that_are_no_list_of_prompts(inputs: Any) -> None:
    with pytest.raises(OptionTypeError, match="list of prompts"):
        batch(inputs)


def test_wrong_arguments_are_told_before_anything_runs() -> None:
    since = Since()
    with pytest.raises(OptionError, match="0 to 127"):
        batch([*PROMPTS, [500]], max_new_tokens=2)
    with pytest.raises(OptionError, match="budget"):
        batch(budget=-1)
    assert not since.threads()


class InterruptsAt(LogitsProcessor):
    """Ctrl-C at the n-th token of all."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if not self.left:
            signal.raise_signal(signal.SIGINT)
        return scores


def test_ctrl_c_returns_what_is_done() -> None:
    since = Since()
    results = batch(PROMPTS * 4, max_new_tokens=30, logits_processor=LogitsProcessorList([InterruptsAt(70)]))
    reasons = [result.finish_reason for result in results]
    assert len(results) == 20
    assert reasons[0] == "length"
    assert reasons[-1] == "cancelled"
    assert set(reasons) == {"length", "cancelled"}
    for prompt, result in zip(PROMPTS * 4, results, strict=True):
        assert result.tokens == alone(prompt, max_new_tokens=30)[: len(result.tokens)]
    assert not since.threads()


def test_the_bar_counts_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar:
        def __init__(self, total: int, desc: str, unit: str) -> None:
            self.total, self.n, self.texts, self.closed = total, 0, [""], False
            bars.append(self)

        def update(self, number: int) -> None:
            self.n += number

        def set_postfix_str(self, text: str) -> None:
            self.texts.append(text)

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(logging, "tqdm", Bar)
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    batch(max_new_tokens=2)
    (bar,) = bars
    assert (bar.total, bar.n, bar.closed) == (5, 5, True)
    assert "tokens/s" in bar.texts[-1]
    assert "waiting" in bar.texts[-1]
    batch(max_new_tokens=2, progress=False)
    assert len(bars) == 1


def run_many(loop: RequestLoop, number: int) -> None:
    handles = [loop.submit(PROMPTS[index % 2], max_new_tokens=2) for index in range(number)]
    for handle in handles:
        handle.result(300)


def test_ended_requests_leave_no_cache() -> None:
    since = Since()
    with RequestLoop(MODEL, max_rows=8, **OPTIONS) as loop:
        run_many(loop, 40)
        assert len(since.caches()) <= 1, "the loop's own empty one"
        assert loop.stats().ended == {"length": 40}
    del loop
    assert not since.caches()


@pytest.mark.slow
def test_ten_thousand_requests_leave_memory_flat() -> None:
    with RequestLoop(MODEL, max_rows=16, **OPTIONS) as loop:
        run_many(loop, 1000)
        gc.collect()
        before = resident_bytes()
        for _ in range(9):
            run_many(loop, 1000)
        gc.collect()
        assert resident_bytes() - before < 32 << 20
