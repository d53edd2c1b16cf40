"""Kernels sorted by name, bytes counted from shapes and counters, and the dense rival's kernels against SDPA."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import spin_hf.kernels
from benchmarks.speed import dense_graph, step_profile
from benchmarks.speed.spin_rows import Traffic
from spin_hf import SpinCache
from tests.support.tuning import tune
from tests.support.zoo import build_model

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="interprets kernels on the CPU")


def test_kernels_are_told_apart_from_the_model() -> None:
    events = [
        ("score_kernel", 20, 400.0),
        ("score_kernel_other", 20, 40.0),
        ("gemm", 70, 1000.0),
        ("plan_kernel", 10, 30.0),
    ]
    took, launches, others = step_profile.per_layer(
        events, ["plan_kernel", "score_kernel", "score_kernel_other"], 10, 2
    )
    assert took == pytest.approx({"score_kernel": 20.0, "score_kernel_other": 2.0, "plan_kernel": 1.5})
    assert launches == {"score_kernel": 2.0, "score_kernel_other": 2.0, "plan_kernel": 1.0}
    assert others == pytest.approx(50.0)


def test_names_are_those_of_the_kernels_that_are_launched() -> None:
    names = step_profile.kernel_names()
    assert {"score_kernel", "attend_kernel", "gate_queries_kernel"} <= set(names)
    assert all(name.isidentifier() for name in names)


@interpreted
def test_bytes_are_those_of_the_pages_and_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    from spin_hf.kernels.triton_launchers import launchers

    monkeypatch.setattr(spin_hf.kernels, "launchers", lambda device: launchers)
    tune(monkeypatch, programs=4)
    model = build_model("llama").eval()
    cache = SpinCache(model, "shadowkv", budget=16, recent_window=8, gpu_memory=60_000)
    tokens = torch.randint(3, 100, (1, 201), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(tokens[:, :200], past_key_values=cache)
        traffic = Traffic(cache)
        model(tokens[:, 200:], past_key_values=cache)
    moved = step_profile.bytes_per_layer(cache, traffic.since(), 1)
    config, store = model.config, cache.layers[0].store
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    page = store.page_size * (store.key_dim + store.value_dim) * 4
    counts = traffic.since()
    landmark = moved["summaries"] / (201 // store.page_size) / heads
    assert landmark in (store.key_dim * 4, store.key_dim * 2, store.key_dim + 4)  # float32, or int8 with its scale
    assert counts["QUERIES"] == heads * layers
    assert moved["attended"] == round(traffic.row(1)["attended_tokens"] * heads * page / store.page_size)
    assert 0 < moved["loaded"] <= moved["attended"] + 3 * heads * page  # whole pages
    assert traffic.row(1)["loads_mib_per_token"] == round(moved["loaded"] * layers / 2**20, 3)
    rates = step_profile.rates({"score_kernel": 2.0, "attend_kernel": 4.0}, {"summaries": 2000, "attended": 8000})
    assert rates == {"score": 1.0, "attend": 2.0, "all": round(10000 / 6 / 1e3, 1)}


@interpreted
@pytest.mark.parametrize(("length", "splits"), [(200, 2), (200, 32), (1, 4), (64, 1)])
def test_dense_decoding_is_exact(length: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    query, keys, values = make(1, 4, 1, 16), make(1, 2, length, 16), make(1, 2, length, 16)
    function: Any = dense_graph.flash_decode
    monkeypatch.setattr(function, "attends", True, raising=False)
    monkeypatch.setattr(function, "splits", splits, raising=False)  # more splits than tiles leave some empty
    actual, _ = function(SimpleNamespace(), query, keys, values, None, 0.25)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(actual, expected.transpose(1, 2), rtol=0, atol=1e-5)
