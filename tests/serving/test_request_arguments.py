"""Arguments of requests and of a loop: those of `generate`, and what is refused."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList

from spin_hf import (
    OptionError,
    OptionTypeError,
    RequestLoop,
    UnsupportedModelError,
)
from tests.support.error_messages import check_message
from tests.support.request_loops import PROMPT, alone, made
from tests.support.tokenizers import letters
from tests.support.zoo import build_model


def test_ends_as_generate_says() -> None:
    tokens = alone(max_new_tokens=8)
    tokenizer = letters()
    stop = tokenizer.decode(tokens[3:5])

    class Third(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return torch.tensor([input_ids.shape[1] >= len(PROMPT) + 3])

    with made(tokenizer=tokenizer) as loop:
        by_token = loop.submit(PROMPT, max_new_tokens=8, eos_token_id=tokens[4], pad_token_id=0)
        by_criterion = loop.submit(PROMPT, max_new_tokens=8, stopping_criteria=StoppingCriteriaList([Third()]))
        by_string = loop.submit(PROMPT, max_new_tokens=8, stop_strings=stop)
        by_config = loop.submit(PROMPT, GenerationConfig(max_new_tokens=8, stop_strings=[stop]))
        by_length = loop.submit(PROMPT, max_length=len(PROMPT) + 2)
        by_time = loop.submit(PROMPT, max_new_tokens=8, max_time=0.0)
        first = tokens.index(tokens[4]) + 1
        assert by_token.result(60).tokens == tokens[:first]
        assert by_criterion.result(60).tokens == tokens[:3]
        assert by_string.result(60).tokens == by_config.result(60).tokens == tokens[:5]
        assert by_length.result(60).tokens == tokens[:2]
        assert by_time.result(60).tokens == tokens[:1]
        reasons = [each.result().finish_reason for each in (by_token, by_criterion, by_string, by_length, by_time)]
        assert reasons == ["stop", "stop", "stop", "length", "length"]
        assert by_string.result().text == tokenizer.decode(tokens[:5])


def _prepared(loop: RequestLoop, calls: list[Any], prompt: list[int], **kwargs: Any) -> tuple[Any, int]:
    """What a request ends by and is chosen with, and the calls of `generate` that it took."""
    before = len(calls)
    found = loop.preparations.of(array("q", prompt), kwargs.pop("config", None), **kwargs)
    ends = found.max_length, found.end_tokens, found.deadline, len(found.criteria)
    return (*ends, [type(each) for each in found.processors]), len(calls) - before


def test_requests_like_the_one_before_are_not_prepared_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same result as for a loop's first request, and `generate` is called where anything but the length differs."""
    kinds: list[tuple[list[int], dict[str, Any], int]] = [
        (PROMPT, dict(max_new_tokens=3), 1),
        (PROMPT[:4], dict(max_new_tokens=3), 0),
        (PROMPT, dict(max_new_tokens=7), 0),
        (PROMPT, dict(max_new_tokens=7, eos_token_id=[5, 6]), 1),
        (PROMPT, dict(max_new_tokens=2, eos_token_id=[5, 6]), 0),
        (PROMPT, dict(max_new_tokens=7, config=GenerationConfig(eos_token_id=5)), 1),
        (PROMPT, dict(config=GenerationConfig(max_new_tokens=4)), 1),
        (PROMPT[:3], dict(config=GenerationConfig(max_new_tokens=9)), 0),
        (PROMPT, dict(max_new_tokens=7, max_time=5.0), 1),
        (PROMPT, dict(max_new_tokens=7, max_time=5.0), 1),
        (PROMPT, dict(max_new_tokens=7, min_new_tokens=2, eos_token_id=5), 1),
        (PROMPT[:3], dict(max_new_tokens=7, min_new_tokens=2, eos_token_id=5), 1),
        (PROMPT, dict(max_length=len(PROMPT) + 3), 1),
        (PROMPT[:3], dict(max_length=len(PROMPT) + 3), 1),
        (PROMPT, dict(max_new_tokens=7, do_sample=True, seed=1), 1),
        (PROMPT, dict(max_new_tokens=7, do_sample=True, seed=1), 1),
        (PROMPT, dict(max_new_tokens=7, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(4)])), 1),
        (PROMPT, dict(max_new_tokens=7, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(5)])), 1),
    ]
    model, calls = build_model("llama"), list[Any]()
    generate = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda *args, **named: (calls.append(1), generate(*args, **named))[1])
    with RequestLoop(model) as loop:
        for prompt, kwargs, wanted in kinds:
            found, number = _prepared(loop, calls, prompt, **kwargs)
            with RequestLoop(model) as other:
                expected, _ = _prepared(other, calls, prompt, **kwargs)
            same = found[:2] + found[3:] == expected[:2] + expected[3:] and (found[2] is None) == (expected[2] is None)
            assert (same, number) == (True, wanted), kwargs


def test_a_changed_generation_config_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama")
    with RequestLoop(model) as loop:
        before = loop.preparations.of(array("q", PROMPT), None, max_new_tokens=3)
        monkeypatch.setattr(model.generation_config, "eos_token_id", [3, 4])
        after = loop.preparations.of(array("q", PROMPT), None, max_new_tokens=3)
        assert before.end_tokens != after.end_tokens == {3, 4}
        config = GenerationConfig(eos_token_id=[7])
        for tokens in ([7], [7, 8]):
            config.eos_token_id = tokens
            found = loop.preparations.of(array("q", PROMPT), config, max_new_tokens=3)
            assert found.end_tokens == set(tokens)


def test_processors_that_read_ids_and_sampling_beside_each_other() -> None:
    """Each as alone, though two sampled requests are chosen for in one call."""
    arguments: list[dict[str, Any]] = [
        dict(repetition_penalty=1.7),
        dict(no_repeat_ngram_size=1),
        dict(do_sample=True, temperature=0.8, seed=3),
        dict(do_sample=True, temperature=0.8, seed=4),
        dict(do_sample=True, top_k=5, repetition_penalty=1.3, seed=5),
        dict(do_sample=True, min_p=0.05, typical_p=0.9, seed=2**40),
        {},
    ]
    with made(max_rows=8) as loop:
        handles = [loop.submit(PROMPT, max_new_tokens=7, **each) for each in arguments]
    for handle, each in zip(handles, arguments, strict=True):
        torch.manual_seed(each.pop("seed", 0))
        assert handle.result().tokens == alone(max_new_tokens=7, **each), each


def test_without_a_seed_the_global_one_decides() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(11)
        with made() as loop:
            handles = [loop.submit(PROMPT, max_new_tokens=6, do_sample=True) for _ in range(2)]
            found.append([handle.result(60).tokens for handle in handles])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(num_beams=2), ["beam", "call generate"]),
        (dict(prompt_lookup_num_tokens=3), ["assisted", "call generate"]),
        (dict(num_return_sequences=2, do_sample=True), ["num_return_sequences", "2", "generate_batch"]),
        (dict(output_scores=True, return_dict_in_generate=True), ["output_scores", "call generate"]),
        (dict(streamer=object()), ["streamer", "handle"]),
        (dict(attention_mask=torch.ones(1, 40)), ["attention_mask", "without padding"]),
        (dict(use_cache=False), ["use_cache"]),
        (dict(seed=-1), ["seed", "-1"]),
    ],
)
def test_what_a_loop_cannot_serve_is_refused(arguments: dict[str, Any], words: list[str]) -> None:
    with made() as loop, pytest.raises((OptionError, OptionTypeError)) as caught:
        loop.submit(PROMPT, max_new_tokens=2, **arguments)
    check_message(caught.value, *words)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], ["at least one token"]),
        ([1, 128], ["0 to 127", "128"]),
        ([-1], ["-1"]),
        ([[1, 2], [3, 4]], ["one sequence", "(2, 2)"]),
        ([0.5], ["list of token ids"]),
        (object(), ["list of token ids"]),
        ("a text", ["tokenizer", "a text"]),
        ([{"role": "user", "content": "hello"}], ["tokenizer", "a chat"]),
        ({"input_ids": [1, 2], "attention_mask": [0, 1]}, ["without padding"]),
    ],
)
def test_prompts_that_are_none(prompt: Any, words: list[str]) -> None:
    with made() as loop, pytest.raises((OptionError, OptionTypeError)) as caught:
        loop.submit(prompt, max_new_tokens=2)
    check_message(caught.value, *words)


def test_arguments_that_generate_refuses() -> None:
    with made() as loop:
        with pytest.raises(ValueError, match="model_kwargs"):
            loop.submit(PROMPT, max_new_tokens=2, no_such_argument=1)
        with pytest.raises(OptionTypeError, match="tokenizer"):
            loop.submit(PROMPT, max_new_tokens=2, stop_strings="x")


@pytest.mark.parametrize(
    "option",
    [dict(max_rows=0), dict(max_slowdown=1.0), dict(max_wait_s=-1), dict(max_waiting=0), dict(max_slowdown="x")],
)
def test_options_that_cannot_work(option: dict[str, Any]) -> None:
    with pytest.raises((OptionError, OptionTypeError), match=next(iter(option))):
        made(**option)


def test_models_that_are_not_served() -> None:
    with pytest.raises(UnsupportedModelError, match="no paged layers"):
        RequestLoop(build_model("mistral"))
    with pytest.raises(UnsupportedModelError, match="scales queries"):
        RequestLoop(build_model("llama4_text"))
    with pytest.raises(OptionTypeError):
        RequestLoop(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
