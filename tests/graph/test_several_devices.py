"""Captured steps of a cache on two devices, with a fake graph and second device, and of models with accelerate's hooks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module

from spin_hf import SpinCache
from spin_hf.graph import runner
from tests.support.clustering_methods import little_slack
from tests.support.graph_recorder import FakeRecorder, capture_on_cpu, eagerly
from tests.support.inspection import kernels_of
from tests.support.second_device import FIRST, SECOND, split_layers
from tests.support.stale_graph import OPTIONS, small_model
from tests.support.zoo import build_model, random_tokens

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu captures graphs"),
]

PROMPT, STEPS = 41, 3
IDS = random_tokens(2, PROMPT + 4 * STEPS, seed=3)
EVERYWHERE = {"": "cpu"}


@pytest.fixture(autouse=True)
def _captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    capture_on_cpu(monkeypatch)
    with little_slack():
        yield


def _cache(model: Any, ids: torch.Tensor = IDS, **options: Any) -> SpinCache:
    cache = SpinCache(model, **OPTIONS | options)
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
    return cache


@torch.no_grad()
def _steps(model: Any, cache: SpinCache, count: int = STEPS, ids: torch.Tensor = IDS) -> torch.Tensor:
    start = int(cache.get_seq_length())
    steps = (ids[:, at : at + 1] for at in range(start, start + count))
    return torch.cat([model(step, past_key_values=cache).logits for step in steps], 1)


def _graphs(cache: SpinCache) -> int:
    assert cache.calls.steps is not None
    return sum(step is not None for step in cache.calls.steps.captured.values())


def _dispatched(device_map: dict[str, str] | None = None, **options: Any) -> Any:
    model = small_model()
    model.hf_device_map = device_map or EVERYWHERE
    return dispatch_model(
        model, model.hf_device_map, force_hooks=True, skip_keys=["past_key_values", "cache"], **options
    )


# ------------------------------------------------------------------------------------------------------ two devices


@pytest.mark.sweep(keep=[0, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "fitted"},
        {"method": "bisection"},
        {"gpu_memory": "60kB"},
        {"method": "fitted", "gpu_memory": "200kB"},
        {"budget": 0.25},
    ],
)
def test_two_devices_decode_as_one_does(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured steps on both sides: fitted pages differ between captured and eager steps if few are selected."""
    count, ids = 3, IDS[:1]
    logits, models = [], [small_model(), small_model()]
    for model in models:
        if model is models[1]:
            split_layers(monkeypatch, 1)
        cache, before = _cache(model, ids, **options), FakeRecorder.replays
        logits.append(_steps(model, cache, count, ids))
        assert FakeRecorder.replays == before + count - 1
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
    assert [step.device for step in kernels_of(cache)] == [FIRST, SECOND]
    assert _graphs(cache) == 1
    cache.check_integrity()


def test_steps_of_two_devices_are_replayed_before_the_model_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    split_layers(monkeypatch, 1)
    model = small_model()
    cache = _cache(model)
    _steps(model, cache, 2)
    found = []
    optimistic = runner.GraphRunner._replay_optimistically
    monkeypatch.setattr(
        runner.GraphRunner,
        "_replay_optimistically",
        lambda *args: found.append(optimistic(*args)) or found[-1],
    )
    _steps(model, cache, 3)
    assert len(found) == 3
    assert runner._NOT_REPLAYED not in found


def test_a_later_cache_takes_over_the_kernels_of_both_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    split_layers(monkeypatch, 1)
    model = small_model()
    first = _cache(model)
    expected, taken = _steps(model, first), kernels_of(first)
    second = _cache(model)
    before = FakeRecorder.replays
    torch.testing.assert_close(_steps(model, second), expected, rtol=0, atol=1e-4)
    assert FakeRecorder.replays == before + STEPS  # no eager step, no capture
    assert kernels_of(second) == taken
    _steps(model, first)
    assert not set(kernels_of(first)) & set(taken)
    first.check_integrity()
    second.check_integrity()


@pytest.mark.slow  # beside tests/integration/test_devices_are_not_mixed.py
def test_a_saved_cache_goes_on_where_the_layers_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    cache = _cache(model)
    cache.save_pretrained(tmp_path)
    expected = _steps(model, cache)
    split_layers(monkeypatch, 1)
    monkeypatch.setattr("spin_hf.persistence.reader.layer_devices", lambda model, count: [FIRST, SECOND][:count])
    loaded = SpinCache.from_pretrained(tmp_path, model)
    torch.testing.assert_close(_steps(model, loaded), expected, rtol=0, atol=1e-4)
    loaded.check_integrity()


def test_the_length_is_read_on_the_device_of_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is told all devices, that of the inputs first."""
    recorded = []
    monkeypatch.setattr(runner, "launch_devices", lambda model, inputs: [SECOND, FIRST])
    split_layers(monkeypatch, 1)
    model = small_model()
    cache = _cache(model)
    capturing = type(cache.paged_layers[0].forward).capturing

    def watched(passes: Any, device: torch.device) -> Any:
        recorded.append(device)
        return capturing(passes, device)

    monkeypatch.setattr(type(cache.paged_layers[0].forward), "capturing", watched)
    _steps(model, cache, 3)
    (step,) = [each for each in cache.calls.steps.captured.values() if each is not None]  # type: ignore[union-attr]
    assert step.recorder.devices == [SECOND, FIRST]
    assert set(recorded) == {SECOND}


# -------------------------------------------------------------------------------------------------- accelerate's hooks


@pytest.mark.sweep(keep=[1])
@pytest.mark.parametrize("before", [True, False])
def test_hooks_that_move_states_are_captured(before: bool) -> None:
    """Whether the cache is made before its model is dispatched, or after that."""
    plain = small_model()
    with eagerly(plain):
        expected = _steps(plain, _cache(plain))
    model = _dispatched() if before else small_model()
    cache = SpinCache(model, **OPTIONS)
    if not before:
        dispatch_model(model, EVERYWHERE, force_hooks=True, skip_keys=["past_key_values", "cache"])
        cache = SpinCache(model, **OPTIONS)
    with torch.no_grad():
        model(IDS[:, :PROMPT], past_key_values=cache)
    replays = FakeRecorder.replays
    torch.testing.assert_close(_steps(model, cache), expected, rtol=0, atol=1e-4)
    assert FakeRecorder.replays == replays + STEPS - 1


def test_generate_with_a_dispatched_model() -> None:
    plain, model = build_model("qwen3").eval(), build_model("qwen3").eval()
    dispatch_model(model, EVERYWHERE, force_hooks=True, skip_keys=["past_key_values", "cache"])
    ids = {"input_ids": IDS[:, :PROMPT], "attention_mask": torch.ones_like(IDS[:, :PROMPT])}
    options: dict[str, Any] = dict(max_new_tokens=5, do_sample=False)
    with eagerly(plain):
        expected = plain.generate(**ids, past_key_values=SpinCache(plain, **OPTIONS), **options)
    before = FakeRecorder.replays
    assert torch.equal(model.generate(**ids, past_key_values=SpinCache(model, **OPTIONS), **options), expected)
    assert FakeRecorder.replays == before + 3  # one token by the prompt, one eagerly


@pytest.mark.sweep(keep=[0, 2])
@pytest.mark.parametrize("change", ["remove", "replace", "alter"])
def test_a_hook_that_changes_is_noticed(change: str) -> None:
    model = _dispatched()
    cache = _cache(model)
    _steps(model, cache, 3)
    assert _graphs(cache) == 1
    block = model.model.layers[1].mlp
    if change == "remove":
        remove_hook_from_module(block, recurse=True)
    elif change == "replace":
        add_hook_to_module(block.gate_proj, AlignDevicesHook("cpu"))
    else:
        block.gate_proj._hf_hook.io_same_device = True
    before = FakeRecorder.replays
    _steps(model, cache, 1)
    assert FakeRecorder.replays <= before + 1  # of the stale graph, which is rolled back
    assert _graphs(cache) == 0
    _steps(model, cache, 2)
    assert _graphs(cache) == 1
    cache.check_integrity()


class _Counts(ModelHook):
    calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        _Counts.calls += 1
        return args, kwargs


@pytest.mark.sweep(keep=[1])
@pytest.mark.parametrize("behind", [False, True])
def test_another_hook_decodes_eagerly(behind: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = small_model()
    hook: ModelHook = SequentialHook(AlignDevicesHook("cpu"), _Counts()) if behind else _Counts()
    add_hook_to_module(model.model.layers[1], hook)
    cache = _cache(model)
    before, replays = _Counts.calls, FakeRecorder.replays
    with caplog.at_level(logging.WARNING, "spin_hf"):
        _steps(model, cache)
    assert (_Counts.calls, FakeRecorder.replays) == (before + STEPS, replays)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "spin_hf"]
    assert "accelerate's _Counts on model.layers.1 would not be called" in message


def test_weights_on_the_disk_decode_eagerly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = small_model()
    with eagerly(plain):
        expected = _steps(plain, _cache(plain))
    names = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    model = _dispatched({**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}, offload_dir=tmp_path)
    assert next(model.model.layers[1].parameters()).is_meta
    cache, before = _cache(model), FakeRecorder.replays
    with caplog.at_level(logging.WARNING, "spin_hf"):
        torch.testing.assert_close(_steps(model, cache), expected, rtol=0, atol=1e-4)
    assert FakeRecorder.replays == before
    (message,) = [record.getMessage() for record in caplog.records if record.name == "spin_hf"]
    assert "accelerate loads the weights of model.layers.1" in message
    cache.check_integrity()
