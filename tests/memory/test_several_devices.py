"""Caps, budgets and plans of a cache whose layers are on two devices; the second is that of tests/support/second_device.py."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spin_hf import BudgetError, CapacityError, SpinCache, plan
from spin_hf.memory import gpu_memory, watermarks
from spin_hf.memory import plan as plans
from spin_hf.memory.layer_places import num_layers, places
from tests.support.families import VOCAB_SIZE
from tests.support.inspection import forward_of, state_of
from tests.support.second_device import FIRST, SECOND, split_layers
from tests.support.tuning import tune
from tests.support.zoo import random_tokens

PROMPT = 600
IDS = random_tokens(1, PROMPT + 4, seed=5)
OPTIONS: dict[str, Any] = {"method": "shadowkv", "budget": 16, "recent_window": 8}


def _model(layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _filled(model: Any, **options: Any) -> SpinCache:
    return _fill(SpinCache(model, **OPTIONS | options), model)


@torch.no_grad()
def _fill(cache: SpinCache, model: Any) -> SpinCache:
    model(IDS[:, :PROMPT], past_key_values=cache)
    for at in range(PROMPT, IDS.shape[1]):
        model(IDS[:, at : at + 1], past_key_values=cache)
    cache.check_integrity()
    return cache


def _frames(cache: SpinCache) -> list[int | None]:
    """Page frames of each layer; None where all pages are in the compute tier."""
    stores = [layer.store for layer in cache.paged_layers]
    return [None if store.frames is None else store.num_frames for store in stores if store is not None]


def test_a_cap_is_for_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = _frames(_filled(_model(1), gpu_memory="150kB"))
    assert alone != [None]
    shared = _frames(_filled(_model(2), gpu_memory="150kB"))
    assert shared[0] is not None
    assert alone[0] is not None
    assert shared[0] < alone[0]
    split_layers(monkeypatch, 1)
    assert _frames(_filled(_model(2), gpu_memory="150kB")) == alone * 2


def test_a_budget_is_what_is_free_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages stay on the device with room for them, and are loaded into frames on the other."""
    model = _model(3)
    split_layers(monkeypatch, 1)
    tune(monkeypatch, margin_bytes=0)
    total, cache = {FIRST: 1 << 30, SECOND: 400_000}, SpinCache(model, **OPTIONS)
    gpu = forward_of(cache).gpu
    with patch.object(watermarks, "free_gpu_memory", lambda device: total[device] - gpu.held(device)):
        _fill(cache, model)
        assert set(gpu.caps) == {FIRST, SECOND}
        frames = _frames(cache)
        assert frames[0] is None
        assert frames[1] is not None
        assert frames[1] == frames[2]
        assert total[SECOND] // 2 < gpu.held(SECOND) < total[SECOND]
        held = gpu.held(FIRST), gpu.held(SECOND)
        assert cache.release_gpu_memory() > 0
        assert gpu.held(FIRST) < held[0]
        assert gpu.held(SECOND) <= held[1]


def test_layers_are_counted_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    split_layers(monkeypatch, 1)
    model = _model(3)
    known = SpinCache(model, **OPTIONS)
    state = state_of(known)
    assert (num_layers(state, FIRST), num_layers(state, SECOND)) == (1, 2)
    unknown = SpinCache(model.config, **OPTIONS)
    state = state_of(unknown)
    assert places(state) is None
    assert num_layers(state, SECOND) == 3  # all may come to lie there
    with torch.no_grad():
        model(IDS[:, :40], past_key_values=unknown)
    assert places(state) == [FIRST, SECOND, SECOND]
    assert num_layers(state, SECOND) == 2


def test_host_memory_is_shared_by_the_layers_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both layers' pages go to host memory, so a cap that holds one layer's is too small."""
    split_layers(monkeypatch, 1)
    model = _model(2)
    one = _filled(model, gpu_memory="150kB").stats().cpu_bytes // 2
    with pytest.raises(CapacityError, match="in 2 layers"):
        _filled(model, gpu_memory="150kB", cpu_memory=one + 1000)


def test_a_batch_is_refused_before_any_layer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the device that is short of memory."""
    split_layers(monkeypatch, 1)
    model, reached = _model(2), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: reached.append(1))
    cache = SpinCache(model, **OPTIONS, gpu_memory=20_000)
    with pytest.raises(BudgetError, match="gpu_memory=20000"), torch.no_grad():
        model(IDS, past_key_values=cache)
    assert not reached


def test_plan_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(3)
    whole = plan(model, context_length=PROMPT, **OPTIONS)
    assert whole.device_parts == {}
    split_layers(monkeypatch, 1)
    made = plan(model, context_length=PROMPT, **OPTIONS)
    assert made.gpu_bytes == whole.gpu_bytes
    assert made.device_parts == {"cpu": whole.gpu_bytes // 3, "cpu:1": whole.gpu_bytes // 3 * 2}
    assert "cpu:1" in str(made)
    monkeypatch.setattr(plans, "free_gpu_memory", {FIRST: 1 << 30, SECOND: 400_000}.get)
    monkeypatch.setattr(gpu_memory.watermarks, "free_gpu_memory", {FIRST: 1 << 30, SECOND: 400_000}.get)
    tune(monkeypatch, margin_bytes=0)
    tight = plan(model, context_length=PROMPT, **OPTIONS)
    assert tight.fits
    assert tight.page_frames > 0
    assert tight.device_parts["cpu"] == made.device_parts["cpu"]
    assert tight.device_parts["cpu:1"] < made.device_parts["cpu:1"]
