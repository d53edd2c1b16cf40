"""Captured decode steps with a fake graph: the same tokens and state as eager steps, and cases that are not captured."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spin_hf import Bisection, SpinCache
from spin_hf.backends.descriptors import Descriptors
from spin_hf.graph import runner
from tests.support.clustering_methods import clustering_often, little_slack
from tests.support.graph_recorder import FakeRecorder, capture_on_cpu, eagerly
from tests.support.inspection import kernels_of, lower_cap, state_of
from tests.support.tuning import tuned
from tests.support.zoo import PAD_TOKEN_ID, build_model

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu captures graphs"),
]

PROMPT = 41
OPTIONS: dict[str, Any] = {"method": "shadowkv", "budget": 16, "recent_window": 8}


def _inputs(padded: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 100, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :11], mask[0, :11] = PAD_TOKEN_ID, 0
    return {"input_ids": ids, "attention_mask": mask}


def _generate(model: Any, cache: SpinCache, padded: bool = False) -> Any:
    return model.generate(
        **_inputs(padded), past_key_values=cache, return_dict_in_generate=True, output_logits=True,
        max_new_tokens=5, do_sample=False,
    )  # fmt: skip


@pytest.mark.sweep(keep=[1, 3])
@pytest.mark.parametrize(
    ("family", "padded"),
    [
        ("llama", False),
        ("llama", True),
        ("gemma3_text", False),  # windows
        ("qwen3_next", False),  # linear attention
        ("opt", False),  # would size a mask by the context's length
        ("opt", True),
    ],
)
def test_the_same_as_eager(family: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(family).eval()
    recorder = capture_on_cpu(monkeypatch)
    ones = torch.ones

    def ones_of_a_known_size(*size: Any, **kwargs: Any) -> torch.Tensor:
        assert not any(isinstance(length, torch.Tensor) for length in size), (
            "waits for the device, so cannot be captured"
        )
        return ones(*size, **kwargs)

    monkeypatch.setattr(torch, "ones", ones_of_a_known_size)
    with eagerly(model):
        eager = SpinCache(model, **OPTIONS)
        expected = _generate(model, eager, padded)
    assert not recorder.replays
    cache = SpinCache(model, **OPTIONS)
    actual = _generate(model, cache, padded)
    assert recorder.replays == 3  # one token by the prefill, one eagerly
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)
    assert str(cache.stats()) == str(eager.stats())
    cache.check_integrity()


@pytest.mark.sweep(keep=[2])
@pytest.mark.parametrize(("padded", "gpu_memory"), [(False, "auto"), (True, "auto"), (False, "140kB")])
def test_methods_that_cluster(padded: bool, gpu_memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans grow between captured steps, and pages that the steps complete are summarised after them; against the formulas."""
    model = build_model("llama").eval()
    options = {**OPTIONS, "method": clustering_often(Bisection, 32, 16)(2), "gpu_memory": gpu_memory}

    def generate(cache: SpinCache) -> Any:
        return model.generate(
            **_inputs(padded), past_key_values=cache, return_dict_in_generate=True, output_logits=True,
            max_new_tokens=18, do_sample=False,
        )  # fmt: skip

    with little_slack():
        reference = SpinCache(model.config, **options)
        expected = generate(reference)
        recorder = capture_on_cpu(monkeypatch)
        cache = SpinCache(model, **options)
        actual = generate(cache)
    assert recorder.replays >= 12  # where frames move to make room for more tokens it is captured anew
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)
    stats, counted = cache.stats(), reference.stats()
    assert (stats.sparse_queries, stats.attended_tokens) == (counted.sparse_queries, counted.attended_tokens)
    assert len(state_of(cache).sequences.spans.stops) > 1
    cache.check_integrity()


@pytest.mark.sweep(keep=[1])
@pytest.mark.parametrize("gpu_memory", ["auto", "140kB"])
def test_frames_that_come_and_go_between_captured_steps(gpu_memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph is captured anew, a resident context goes to the cpu tier, and tokens are those of a cache left alone."""
    model = build_model("llama").eval()
    tokens = torch.randint(3, 100, (2, 14), generator=torch.Generator().manual_seed(2))
    logits = []
    recorder = capture_on_cpu(monkeypatch)
    for disturbed in (False, True):
        with tuned(check_interval_steps=1):  # grows again at the next step
            cache = SpinCache(model, gpu_memory=gpu_memory, **OPTIONS)
        with torch.no_grad():
            model(_inputs()["input_ids"], past_key_values=cache)
        before = recorder.replays
        parts = [_loop(model, cache, tokens[:, :4])]
        for step, wanted in ((4, 2000), (6, None), (8, "2kB")):
            if disturbed:
                assert cache.release_gpu_memory(wanted) > 0 or step > 4
            parts.append(_loop(model, cache, tokens[:, step : step + 2]))
            cache.check_integrity()
        assert recorder.replays == before + 9 + disturbed  # the first cache's first step is eager
        assert len(cache.calls.steps.captured) == 1
        assert not disturbed or cache.stats().cpu_bytes > 0
        logits.append(torch.cat(parts, 1))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


@torch.no_grad()
def _loop(model: Any, cache: SpinCache, tokens: torch.Tensor) -> torch.Tensor:
    """A bare loop without positions or mask: the model derives positions from the cache."""
    return torch.cat([model(token, past_key_values=cache).logits for token in tokens.split(1, 1)], 1)


def test_a_bare_loop_with_all_that_changes_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama").eval()
    recorder = capture_on_cpu(monkeypatch)
    tokens = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(2))
    logits = []
    for mode in (eagerly(model), nullcontext()):
        with mode:
            cache = SpinCache(model, **OPTIONS)
            with torch.no_grad():
                model(_inputs()["input_ids"], past_key_values=cache)
            parts = [_loop(model, cache, tokens[:, :2])]
            cache.reorder_cache(torch.tensor([1, 0]))
            cache.crop(-1)
            twin = deepcopy(cache)
            parts += [_loop(model, each, tokens[:, 2:4]) for each in (cache, twin)]
            cache.batch_select_indices(torch.tensor([1]))
            parts.append(_loop(model, cache, tokens[:1, 4:6]).expand(2, -1, -1))
            for each in (cache, twin):
                each.check_integrity()
        logits.append(torch.cat(parts, 1))
    assert torch.equal(*logits)
    assert recorder.replays == 1 + 2 + 2 + 1  # the first step of a batch size is eager


def test_pages_that_take_another_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was captured for pages as they are is not replayed once they are int8: the step is begun again, eagerly."""
    model = build_model("llama").eval()
    recorder = capture_on_cpu(monkeypatch)
    tokens = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(2))
    logits, replays = [], []
    for mode in (eagerly(model), nullcontext()):
        with mode:
            cache = SpinCache(model, **OPTIONS, gpu_memory=1 << 20, cpu_dtype="int8")
        with torch.no_grad():
            model(_inputs()["input_ids"], past_key_values=cache)
        parts = [_loop(model, cache, tokens[:, :4])]
        assert not cache.stats().cpu_bytes
        lower_cap(cache, 60_000)
        replays.append(recorder.replays)
        parts.append(_loop(model, cache, tokens[:, 4:5]))
        replays.append(recorder.replays)
        assert cache.stats().cpu_bytes
        parts.append(_loop(model, cache, tokens[:, 5:]))
        assert cache.stats().loads
        cache.check_integrity()
        logits.append(torch.cat(parts, 1))
    assert torch.equal(*logits)
    assert replays[2] == 3  # of four
    assert replays[3] == 3
    assert recorder.replays == 3 + 7  # that eager step was the first of the new form


def test_the_forward_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_cpu(monkeypatch)
    model = build_model("llama").eval()
    one, other = SpinCache(model), SpinCache(model)
    assert "forward" in model.__dict__
    copied = deepcopy(model)
    copied.lm_head.weight.data.zero_()
    with torch.no_grad():
        assert not copied(_inputs()["input_ids"]).logits.any()
        assert model(_inputs()["input_ids"]).logits.any()
    del one
    assert "forward" in model.__dict__
    del other
    assert "forward" not in model.__dict__


@torch.no_grad()
def test_a_forward_that_was_wrapped_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_cpu(monkeypatch)
    model = build_model("llama").eval()
    with eagerly(model):
        expected = _loop_after_prompt(model, SpinCache(model, **OPTIONS))
    first = SpinCache(model)
    wrapped, calls = model.forward, []
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: (calls.append(1), wrapped(*args, **kwargs))[1])
    cache = SpinCache(model, **OPTIONS)
    assert torch.equal(_loop_after_prompt(model, cache), expected)
    assert FakeRecorder.replays == 2
    assert calls
    cache.check_integrity()
    del first


def _loop_after_prompt(model: Any, cache: SpinCache) -> torch.Tensor:
    model(_inputs()["input_ids"], past_key_values=cache)
    return _loop(model, cache, torch.tensor([[5, 6, 7], [8, 9, 10]]))


def _replays_of_a_step(model: Any, cache: SpinCache) -> int:
    before = FakeRecorder.replays
    _loop(model, cache, torch.full((2, 1), 5))
    return FakeRecorder.replays - before


def test_kernels_in_use_are_those_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_cpu(monkeypatch)
    model = build_model("llama").eval()
    cache = SpinCache(model, **OPTIONS)
    tokens = torch.randint(3, 100, (2, 3), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        model(_inputs()["input_ids"], past_key_values=cache)
        _loop(model, cache, tokens[:, :2])
        cache.batch_select_indices(torch.tensor([0]))
        model(tokens[:1], past_key_values=cache)  # several tokens: not a step to capture, but kernels of another batch
    cache.batch_repeat_interleave(2)
    assert _replays_of_a_step(model, cache) == 1  # as before: the kernels for two sequences have waited
    assert kernels_of(cache) == [cache.layers[0].backend]
    cache.check_integrity()


def test_windows_of_a_reset_cache_and_of_one_that_records(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_cpu(monkeypatch)
    model = build_model("gemma3_text").eval()
    with torch.no_grad():
        with eagerly(model):
            expected = _loop_after_prompt(model, SpinCache(model, **OPTIONS))
        cache = SpinCache(model, **OPTIONS)
        for replays in (2, 5):  # the first step of all is eager
            cache.reset()
            torch.testing.assert_close(_loop_after_prompt(model, cache), expected, rtol=0, atol=1e-4)
            assert FakeRecorder.replays == replays
            assert cache.layers[0].get_seq_length() == PROMPT + 3
    cache.activate_past_recording()
    assert _replays_of_a_step(model, cache) == 0


def test_a_changed_model_is_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_cpu(monkeypatch)
    model = build_model("llama").eval()
    cache = SpinCache(model, **OPTIONS)
    with torch.no_grad():
        model(_inputs()["input_ids"], past_key_values=cache)
    _loop(model, cache, torch.full((2, 2), 5))
    assert _replays_of_a_step(model, cache) == 1
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    assert _replays_of_a_step(model, cache) == 1  # rolled back: the first step of a new model is eager
    assert list(cache.calls.steps.captured.values()) == [None]
    assert _replays_of_a_step(model, cache) == 1
    assert None not in cache.calls.steps.captured.values()
    model.model.layers[0].mlp = torch.nn.Identity()
    assert _replays_of_a_step(model, cache) == 1
    assert list(cache.calls.steps.captured.values()) == [None]


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda model: model.model.layers[0].register_forward_hook(lambda *args: None), "forward hook"),
        (lambda model: model.train(), "training mode"),
    ],
)
def test_what_cannot_be_captured_runs_eagerly_and_says_so(
    prepare: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = capture_on_cpu(monkeypatch)
    model = build_model("llama").eval()
    prepare(model)
    cache = SpinCache(model, **OPTIONS)
    with caplog.at_level(logging.WARNING, logger="spin_hf"):
        _generate(model, cache)
    assert not recorder.replays
    assert [record.getMessage() for record in caplog.records if reason in record.getMessage()]
    assert len(caplog.records) == 1
    cache.check_integrity()


@pytest.mark.sweep(keep=[0])
@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next"])
def test_a_capture_that_fails_loses_nothing(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = capture_on_cpu(monkeypatch)
    model = build_model(family).eval()
    with eagerly(model):
        expected = _generate(model, SpinCache(model, **OPTIONS))

    def refuse(self: FakeRecorder, step: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorder, "record", refuse)
    cache = SpinCache(model, **OPTIONS)
    with caplog.at_level(logging.WARNING, logger="spin_hf"):
        actual = _generate(model, cache)
    assert torch.equal(actual.sequences, expected.sequences)
    assert ["stream is capturing" in record.getMessage() for record in caplog.records] == [True]
    cache.check_integrity()


@torch.no_grad()
def test_the_next_descriptor_is_written_behind_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama").eval()
    recorder = capture_on_cpu(monkeypatch)
    cache = SpinCache(model, **OPTIONS)
    model(_inputs()["input_ids"], past_key_values=cache)
    written: list[int] = []
    upload = Descriptors._upload_step
    monkeypatch.setattr(
        Descriptors, "_upload_step", lambda self, fields: (written.append(recorder.replays), upload(self, fields))[1]
    )
    for _ in range(4):
        model(torch.full((2, 1), 5), past_key_values=cache)
    assert recorder.replays == 3
    assert [replays for replays in written if replays] == [1, 2, 3]  # once a step, and behind its launch


@torch.no_grad()
@pytest.mark.parametrize("computing", [True, False])
def test_the_model_is_looked_at_while_a_gpu_reads_the_prompt(computing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else with the first step. A change in between is seen all the same."""
    model = deepcopy(build_model("llama")).eval()
    recorder = capture_on_cpu(monkeypatch)
    monkeypatch.setattr(runner, "_is_computing", lambda kernels: computing)
    guards: list[str] = []
    make = runner.ModelGuard.__init__
    now = ["prompt"]
    monkeypatch.setattr(
        runner.ModelGuard, "__init__", lambda self, model: (guards.append(now[0]), make(self, model))[1]
    )
    cache = SpinCache(model, **OPTIONS)
    model(_inputs()["input_ids"], past_key_values=cache)
    now[0] = "steps"
    for _ in range(3):
        model(torch.full((2, 1), 5), past_key_values=cache)
    assert guards == ["prompt" if computing else "steps"]
    assert recorder.replays == 2
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(model.model.layers[0].mlp.up_proj.weight * 2)
    model(torch.full((2, 1), 5), past_key_values=cache)
    assert len(guards) == 2
    assert recorder.replays == 3, "replayed first, and then rolled back"
    cache.check_integrity()


def test_when_a_gpu_is_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    on = [SimpleNamespace(device=torch.device(kind)) for kind in ("cpu", "cuda:0")]
    capturing, idle = [False], [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(query=lambda: idle[0]))
    assert runner._is_computing(on)
    assert not runner._is_computing([])
    assert not runner._is_computing(on[:1])
    capturing[0] = True
    assert not runner._is_computing(on)
    capturing[0], idle[0] = False, True
    assert not runner._is_computing(on)
