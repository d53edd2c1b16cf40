"""Captured steps of rows, with the recorder of `tests/support/graph_recorder.py` in place of CUDA graphs."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from typing import Any

import pytest
import torch

from spin_hf import CacheStateError, CapacityError
from spin_hf.serving import row_program
from tests.support.graph_recorder import FakeRecorder, capture_on_cpu, eagerly
from tests.support.inspection import state_of
from tests.support.row_schedules import Requests, alone
from tests.support.zoo import build_model, random_tokens

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu captures steps"),
]

LENGTHS = [40, 21, 30]
OPTIONS: dict[str, Any] = dict(method="shadowkv", budget=1.0)


def requests_on(model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Requests, list[list[int]]]:
    prompts = [random_tokens(1, length, seed=number) for number, length in enumerate(LENGTHS)]
    expected = [alone(model, prompt, 10, **OPTIONS) for prompt in prompts]
    capture_on_cpu(monkeypatch)
    return Requests(model, prompts, 4, **OPTIONS), expected


@pytest.mark.sweep(keep=[0, 1, 2])
@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next", "gpt_oss", "llama", "gemma3n_text", "gemma4_text"])
def test_one_graph_serves_whatever_rows_there_are(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of a size runs eagerly, the second is captured; later rows replay. Windows fill up in between."""
    model = build_model(family)
    requests, expected = requests_on(model, monkeypatch)
    requests.start(0, 1)
    requests.step(0, 1)
    assert FakeRecorder.replays == 0
    requests.step(1, 0)
    requests.step(0, 1)
    assert FakeRecorder.replays == 2
    left = requests.leave(0)
    requests.start(2)
    requests.step(2, 1)
    requests.step(1, 2)
    assert FakeRecorder.replays == 4, "no capture for a row that joins"
    with eagerly(model):
        requests.go_on_alone(0, left, 2)
    requests.step(2)
    requests.step(2, 1)
    requests.check(expected)
    assert [len(tokens) for tokens in requests.tokens] == [5, 6, 4]
    for number in (1, 2):
        requests.leave(number).check_integrity()
    left.check_integrity()


class FailingError(Exception):
    """Raised where a step fails."""


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_a_step_that_fails_before_the_replay_changes_no_row(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the model, called and captured, and when a row begins."""
    model = build_model(family)
    requests, expected = requests_on(model, monkeypatch)
    requests.start(0, 1)

    def fail(*_: Any, **__: Any) -> None:
        raise FailingError

    def check_failure(error: type[BaseException]) -> None:
        held = [cache.get_seq_length() for cache in requests.batch.rows if cache is not None]
        with pytest.raises(error):
            requests.step(0, 1)
        assert held == [cache.get_seq_length() for cache in requests.batch.rows if cache is not None]

    hook = model.lm_head.register_forward_pre_hook(fail)  # behind all layers
    check_failure(FailingError)
    hook.remove()
    requests.step(0, 1)
    requests.step(0, 1)
    cache = requests.batch.rows[1]
    assert cache is not None
    with monkeypatch.context() as patch:

        def refuse(*_: Any) -> None:
            raise CapacityError("expected more memory, got none; raise cpu_memory")

        patch.setattr(cache.paged_layers[0].cache_state.sequences, "begin", refuse)
        check_failure(CapacityError)
    for _ in range(3):
        requests.step(1, 0)
    requests.check(expected)
    for number in (0, 1):
        requests.leave(number).check_integrity()


def test_a_step_that_fails_behind_the_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are rolled back. Windows have been overwritten: those caches say so, until they are reset."""
    for family in ("llama", "gemma3_text"):
        model = build_model(family)
        requests, expected = requests_on(model, monkeypatch)
        requests.start(0, 1)
        requests.step(0, 1)
        requests.step(0, 1)

        def fail(step: Any) -> None:
            raise FailingError

        with monkeypatch.context() as patch:
            patch.setattr(row_program, "index_completed_rows", fail)
            with pytest.raises(FailingError):
                requests.step(0, 1)
        if family == "llama":
            requests.tokens = [tokens[:2] for tokens in requests.tokens]
            requests.step(0, 1)
            requests.check(expected)
        else:
            with pytest.raises(CacheStateError, match="overwritten"):
                requests.step(0, 1)


def test_a_cache_that_left_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs, graphs and kernels hold no cache, neither with other rows nor without any."""
    model = build_model("gemma3_text")
    requests, _ = requests_on(model, monkeypatch)
    requests.start(0, 1)
    for _ in range(3):
        requests.step(0, 1)
    for number in (0, 1):
        left = requests.leave(number)
        held = weakref.ref(state_of(left)), weakref.ref(left)
        del left
        gc.collect()
        assert [reference() for reference in held] == [None, None]
        if number == 0:
            requests.step(1)


def test_a_changed_model_is_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama")
    requests, _ = requests_on(model, monkeypatch)
    requests.start(0, 1)
    for _ in range(3):
        requests.step(0, 1)
    replays = FakeRecorder.replays
    assert replays == 2
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    requests.step(0, 1)
    assert FakeRecorder.replays == replays
    requests.step(0, 1)
    requests.step(0, 1)
    assert FakeRecorder.replays == replays + 2


def test_what_cannot_be_captured_runs_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model("llama")
    requests, expected = requests_on(model, monkeypatch)

    def refuse(self: Any, step: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeRecorder, "record", refuse)
    requests.start(0, 1)
    for _ in range(3):
        requests.step(0, 1)
    requests.check(expected)
    assert "decodes eagerly, not as a CUDA graph: capturing failed: operation not permitted" in caplog.text
