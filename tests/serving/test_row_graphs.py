"""Captured steps of rows, with the recorder of `tests/support/graph_recorder.py` in place of CUDA graphs."""

from __future__ import annotations

import os
import random
import sys
import weakref
from typing import Any

import pytest
import torch

from spin_hf import CacheStateError, CapacityError, Fitted, RequestLoop, SpinCache
from spin_hf.serving import row_batch, row_program, row_steps
from tests.support.freed_memory import weak_arrays, without_gc
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
    """The first step of a size runs eagerly, the second is captured; later rows replay.

    Windows fill up before the third step: the graph for full windows, which has no mask, is another one.
    """
    model = build_model(family)
    has_windows = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
    requests, expected = requests_on(model, monkeypatch)
    requests.start(0, 1)
    requests.step(0, 1)
    assert FakeRecorder.replays == 0
    requests.step(1, 0, on_device=True)
    requests.step(0, 1)
    assert FakeRecorder.replays == 2 - has_windows
    left = requests.leave(0)
    requests.start(2)
    requests.step(2, 1)
    requests.step(1, 2, on_device=True)
    assert FakeRecorder.replays == 4 - has_windows, "no capture for a row that joins"
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
    with without_gc():
        for number in (0, 1):
            left = requests.leave(number)
            held = [weakref.ref(state_of(left)), weakref.ref(left), *weak_arrays(left)]
            del left
            assert not any(reference() for reference in held)
            if number == 0:
                requests.step(1)


def test_a_closed_loop_holds_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor caches, if its thread has failed."""
    model = build_model("llama")
    capture_on_cpu(monkeypatch)
    with without_gc():
        loop = RequestLoop(model, max_rows=2, share_prefixes=False, **OPTIONS)
        scheduler = loop.scheduler
        request = loop.unchecked(random_tokens(1, 40)[0].tolist(), max_new_tokens=9)
        scheduler.waiting.append(request)
        for _ in range(5):
            scheduler.turn()
        assert request.cache is not None
        graphs = [graph for program in scheduler.batch._steps._programs.values() for graph in program.graphs.values()]
        held = [weakref.ref(graph) for graph in graphs if graph is not None]
        assert held
        held += weak_arrays(request.cache)
        del graphs
        scheduler.decoder.settle()
        scheduler.close()
        request.end("error")
        scheduler.running.clear()
        del request
        assert not any(reference() for reference in held)


def test_a_changed_model_is_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama")
    requests, _ = requests_on(model, monkeypatch)
    requests.start(0, 1)
    for _ in range(3):
        requests.step(0, 1)
    replays = FakeRecorder.replays
    assert replays == 2
    cache = requests.batch.rows[0]
    assert cache is not None
    token, twin = int(requests.logits[0].argmax()), cache.fork()
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
    requests.step(0, 1)
    assert FakeRecorder.replays == replays + 1, "the replay that was rolled back"
    with eagerly(model), torch.no_grad():
        expected = model(torch.tensor([[token]]), past_key_values=twin).logits[0, -1]
    torch.testing.assert_close(requests.logits[0], expected, rtol=0, atol=1e-4)
    requests.step(0, 1)
    requests.step(0, 1)
    assert FakeRecorder.replays == replays + 3


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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next"])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_schedules(family: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows join, leave, come back, pause, change places and numbers of places, and step in any order."""
    chooser, model = random.Random(seed), build_model(family)
    prompts = [random_tokens(1, chooser.randint(5, 60), seed=number) for number in range(7)]
    expected = [alone(model, prompt, 30, **OPTIONS) for prompt in prompts]
    capture_on_cpu(monkeypatch)
    requests = Requests(model, prompts, 5, **OPTIONS)
    left: dict[int, SpinCache] = {}
    for _ in range(60):
        waiting = [number for number in range(7) if number not in requests.row and len(requests.tokens[number]) < 28]
        what = chooser.random()
        if waiting and len(requests.row) < 5 and (what < 0.3 or not requests.row):
            number = chooser.choice(waiting)
            if number in left:
                requests.row[number] = requests.batch.join(left.pop(number))
            else:
                requests.start(number)
        elif requests.row and what < 0.4:
            number = chooser.choice(list(requests.row))
            left[number] = requests.leave(number)
            if chooser.random() < 0.5 and len(requests.tokens[number]) < 28:
                with eagerly(model):
                    requests.go_on_alone(number, left[number], 1)
        stepping = [number for number in requests.row if len(requests.tokens[number]) < 28 and chooser.random() < 0.8]
        if stepping:
            chooser.shuffle(stepping)
            requests.step(*stepping, on_device=chooser.random() < 0.5)
    requests.check(expected)
    assert sum(map(len, requests.tokens)) > 60
    for cache in [*left.values(), *(requests.leave(number) for number in list(requests.row))]:
        cache.check_integrity()


def test_rows_whose_codes_need_more_shared_memory_attend_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A GPU that cannot encode the pages which rows complete: each row uses its own kernels, and a warning says so."""
    model, prompt = build_model("llama"), random_tokens(1, 40)
    options = OPTIONS | {"method": "fitted"}
    expected = alone(model, prompt, 2, **options)
    capture_on_cpu(monkeypatch)
    monkeypatch.setattr(row_steps.device_limits, "shared_memory", lambda device: 1 << 10)
    monkeypatch.setattr(row_batch, "may_be_captured", lambda model: True)
    requests = Requests(model, [prompt], 2, **options)
    requests.start(0)
    requests.step(0)
    requests.step(0)
    requests.check([expected])
    assert FakeRecorder.replays == 0
    assert "has no kernels for its layers" in caplog.text


def test_other_options_need_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """When all rows have left, others may have another method and budget. Graphs of the first ones do not serve them."""
    model, prompt = build_model("llama"), random_tokens(1, 90)
    requests, _ = requests_on(model, monkeypatch)
    requests.start(0)
    for _ in range(3):
        requests.step(0)
    requests.leave(0)
    caches = [SpinCache(model, "quest", budget=16, recent_window=16) for _ in range(2)]
    with torch.no_grad(), eagerly(model):
        first, _ = (model(prompt, past_key_values=cache).logits[0, -1] for cache in caches)
        expected = model(first.argmax()[None, None], past_key_values=caches[1]).logits[0, -1]
    row = requests.batch.join(caches[0])
    logits = requests.batch.step({row: int(first.argmax())})
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-4)
    assert requests.batch.leave(row).stats().sparse_queries == caches[1].stats().sparse_queries > 0


def test_rows_that_the_budget_covers_are_not_clustered(monkeypatch: pytest.MonkeyPatch) -> None:
    """They select all pages beside rows that select some: by the same graph, and without clusters and summaries."""
    monkeypatch.setattr(Fitted, "cluster_interval", 64)
    model, prompts = build_model("llama"), [random_tokens(1, length, seed=length) for length in (230, 165)]
    options: dict[str, Any] = dict(method="fitted", budget=170, recent_window=16, dense_below=0)
    expected = [alone(model, prompt, 10, **options) for prompt in prompts]
    capture_on_cpu(monkeypatch)
    requests = Requests(model, prompts, 2, **options)
    requests.start(0, 1)
    caches = [cache for cache in requests.batch.rows if cache is not None]
    for number in range(1, 11):
        requests.step(0, 1)
        clustered = [state_of(cache).sequences.spans.num_pages > 0 for cache in caches]
        assert clustered == [True, 165 + number > 170]
    requests.check(expected)
    for number in (0, 1):
        requests.leave(number).check_integrity()
