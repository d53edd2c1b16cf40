"""Steps over several caches: the tokens of each row are those of its cache alone, whatever joins, leaves or fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from spin_hf import (
    BatchSizeError,
    CacheStateError,
    CapacityError,
    OptionError,
    OptionTypeError,
    SpinCache,
    UnsupportedModelError,
)
from spin_hf.serving.row_batch import RowBatch
from tests.support.error_messages import check_message
from tests.support.families import FAMILIES
from tests.support.row_schedules import Requests, alone
from tests.support.zoo import build_model, random_tokens, subject_model

LENGTHS = [10, 60, 33, 200]
SERVED = [name for name, family in FAMILIES.items() if family.paged and name != "llama4_text"]
QUICK = ["llama", "gemma2", "gpt_oss", "qwen3_next", "gemma3n_text"]


def prompts_of(lengths: list[int]) -> list[torch.Tensor]:
    return [random_tokens(1, length, seed=number) for number, length in enumerate(lengths)]


@pytest.mark.sweep(keep=[SERVED.index(name) for name in QUICK])
@pytest.mark.parametrize("family", SERVED)
def test_rows_that_join_and_leave_decode_as_alone(family: str) -> None:
    """Windows that are full and that are not, subsets of rows, another order, and a cache that goes on by itself."""
    model, prompts = subject_model(family), prompts_of(LENGTHS)
    expected = [alone(model, prompt, 9, budget=4096) for prompt in prompts]
    requests = Requests(model, prompts, 3, budget=4096)
    requests.start(0, 1)
    requests.step(0, 1)
    requests.step(1, 0, on_device=True)
    requests.start(2)
    requests.step(0, 1, 2)
    requests.step(2, 1, on_device=True)
    left = requests.leave(1)
    requests.start(3)
    requests.step(3, 0, 2)
    requests.go_on_alone(1, left, 3)
    for _ in range(3):
        requests.step(0, 2, 3)
    requests.check(expected)
    assert [len(tokens) for tokens in requests.tokens] == [7, 7, 6, 4]
    for number in (0, 2, 3):
        cache = requests.leave(number)
        cache.check_integrity()
        assert cache.get_seq_length() == LENGTHS[number] + len(requests.tokens[number])
    assert requests.batch.rows == [None] * 3


@pytest.mark.parametrize("method", ["fitted", "shadowkv"])
def test_rows_select_pages_as_alone(method: str) -> None:
    """Lengths of 100 and 1000 tokens with a small budget: each row has its own candidates, clusters and fits."""
    model, prompts = subject_model("llama"), prompts_of([100, 1000, 300])
    options: dict[str, Any] = dict(method=method, budget=32, recent_window=16)
    expected = [alone(model, prompt, 20, **options) for prompt in prompts]
    requests = Requests(model, prompts, 3, **options)
    requests.start(0, 1, 2)
    for _ in range(20):
        requests.step(2, 0, 1)
    requests.check(expected)
    caches = [requests.leave(number) for number in range(3)]
    assert all(0 < cache.stats().attended_tokens < 150 for cache in caches)


def test_a_cache_that_left_remembers_its_tokens() -> None:
    """`generate` with the whole text reads nothing anew."""
    model, (prompt,) = subject_model("llama"), prompts_of([40])
    expected = alone(model, prompt, 10)
    requests = Requests(model, [prompt], 1)
    requests.start(0)
    for _ in range(5):
        requests.step(0)
    cache = requests.leave(0)
    text = torch.cat([prompt, torch.tensor([requests.tokens[0]])], 1)
    out = model.generate(text, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert out[0, 40:].tolist() == expected
    cache.check_integrity()


class FailingError(Exception):
    """Raised in the middle of a forward."""


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_next"])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_step_that_fails_changes_no_row(family: str, place: float) -> None:
    """The model raises before, between or behind its layers; then the same step succeeds."""
    model, prompts = build_model(family), prompts_of([30, 70])
    expected = [alone(model, prompt, 6) for prompt in prompts]
    requests = Requests(model, prompts, 2)
    requests.start(0, 1)
    requests.step(0, 1)
    layers = model.model.layers
    broken = model.lm_head if place == 1.0 else layers[int(place * len(layers))]

    def fail(*_: Any) -> None:
        raise FailingError

    hook = broken.register_forward_pre_hook(fail)
    with pytest.raises(FailingError):
        requests.step(0, 1)
    hook.remove()
    assert [cache.get_seq_length() for cache in requests.batch.rows if cache is not None] == [31, 71]
    for _ in range(4):
        requests.step(1, 0)
    requests.check(expected)
    for cache in requests.batch.rows:
        assert cache is not None
        cache.check_integrity()


def test_a_row_that_is_full_is_named() -> None:
    model, prompts = subject_model("llama"), prompts_of([300, 250, 20])
    expected = [alone(model, prompt, 12) for prompt in prompts]
    requests = Requests(model, prompts, 3)
    requests.start(0, 1, 2)
    cache = requests.batch.rows[requests.row[1]]
    assert cache is not None

    def refuse(*_: Any) -> None:
        raise CapacityError("expected more memory, got none; raise cpu_memory")

    with pytest.MonkeyPatch.context() as patch:
        store = cache.paged_layers[0].store
        assert store is not None
        patch.setattr(store, "check", refuse)
        lengths = [held.get_seq_length() for held in requests.batch.rows if held is not None]
        with pytest.raises(CapacityError) as caught:
            for _ in range(12):
                lengths = [held.get_seq_length() for held in requests.batch.rows if held is not None]
                requests.step(0, 1, 2)
        assert caught.value.row == requests.row[1]
        check_message(caught.value, f"row {requests.row[1]}: ")
    assert lengths == [held.get_seq_length() for held in requests.batch.rows if held is not None]
    while len(requests.tokens[0]) < 12:
        requests.step(0, 1, 2)
    requests.check(expected)


@pytest.mark.parametrize(
    ("make", "error", "fact"),
    [
        (lambda model: torch.nn.Linear(2, 2), OptionTypeError, "expected a SpinCache"),
        (lambda model: SpinCache(model), CacheStateError, "got an empty one"),
        (lambda model: SpinCache(build_model("llama")), OptionError, "of another"),
        (lambda model: filled(model, 2), BatchSizeError, "expected one sequence, got 2"),
        (lambda model: filled(model, 1, budget=7), OptionError, "options of the other rows"),
        (lambda model: filled(model, 1, method="quest"), OptionError, "method of the other rows"),
        (lambda model: SpinCache(subject_model("mistral")), UnsupportedModelError, "no paged layers"),
    ],
)
def test_a_cache_that_cannot_be_a_row_is_refused(make: Any, error: type[Exception], fact: str) -> None:
    model = subject_model("llama")
    batch = RowBatch(model, 3)
    batch.join(filled(model, 1))
    with pytest.raises(error) as caught:
        batch.join(make(model))
    check_message(caught.value, fact)
    assert [cache is None for cache in batch.rows] == [False, True, True]


def filled(model: Any, batch_size: int, mask: torch.Tensor | None = None, **options: Any) -> SpinCache:
    cache = SpinCache(model, **options)
    with torch.no_grad():
        model(random_tokens(batch_size, 20), past_key_values=cache, attention_mask=mask)
    return cache


def test_wrong_uses_are_refused() -> None:
    model = subject_model("llama")
    mask = torch.ones((1, 20), dtype=torch.int64)
    mask[0, :3] = 0
    batch, cache = RowBatch(model, 1), filled(model, 1)
    with pytest.raises(BatchSizeError, match="padding"):
        batch.join(filled(model, 1, mask))
    row = batch.join(cache)
    with pytest.raises(CacheStateError, match="not a row yet"):
        batch.join(cache)
    with pytest.raises(CacheStateError, match="expected an empty row"):
        batch.join(filled(model, 1))
    for tokens, error in (
        ({}, OptionTypeError),
        ({7: 3}, OptionError),
        ({row: -1}, OptionTypeError),
        ({row: 0.5}, OptionTypeError),
    ):
        with pytest.raises(error) as caught:
            batch.step(tokens)
        check_message(caught.value)
    with pytest.raises(OptionError):
        batch.leave(5)
    with pytest.raises(OptionTypeError):
        RowBatch("llama", 2)  # type: ignore[arg-type]
    assert batch.leave(row) is cache
    assert cache.get_seq_length() == 20


def test_steps_run_as_generate_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within transformers' context for decoding, in which experts do not wait for the host; it ends with the step."""
    model, inside, seen = build_model("qwen3_next"), [False], []

    @contextmanager
    def decoding() -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    requests = Requests(model, prompts_of([10]), 1, budget=4096)
    requests.start(0)
    monkeypatch.setattr(model, "_optimize_model_for_decode", decoding, raising=True)
    hook = model.model.embed_tokens.register_forward_hook(lambda *_: seen.append(inside[0]))
    requests.step(0)
    hook.remove()
    assert seen == [True]
    assert inside == [False]


def test_a_tensor_parallel_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spin_hf.serving.row_batch.ranks_of", lambda model: object())
    with pytest.raises(UnsupportedModelError) as raised:
        RowBatch(build_model("llama"), 2)
    check_message(raised.value, "expected a model on one rank")
