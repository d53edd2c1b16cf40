"""Steps that attend to everything, by whole segments, against the reference backend; and which steps do."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

import pytest
import torch

from spin_hf import Bisection, Fitted, Quest, ShadowKV, SpinCache
from spin_hf.kernels import device_limits
from spin_hf.kernels.triton_launchers import launchers
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.inspection import kernels_of
from tests.support.interpreted_kernels import forward_steps, interpret_kernels
from tests.support.zoo import build_model

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches of steps, by name."""
    made: list[str] = []
    for name in ("attend_segments", "attend_pages"):

        def noted(*args: Any, name: str = name, launch: Any, **options: Any) -> None:
            if args[0] is launchers.launch_now:
                made.append(name)
            launch(*args, **options)

        monkeypatch.setattr(launchers, name, partial(noted, launch=getattr(launchers, name)), raising=False)
    return made


@pytest.mark.sweep(keep=[0, 3, 5, 6])
@pytest.mark.parametrize(
    ("family", "padding", "options"),
    [
        ("llama", "none", {"method": "shadowkv"}),
        ("llama", "left", {"method": Bisection()}),
        ("llama", "holes", {"method": Quest(1)}),
        ("gpt_oss", "left", {"method": "shadowkv"}),  # sink logits
        ("gemma2", "none", {"method": Fitted()}),  # softcap
        ("llama", "left", {"method": "shadowkv", "budget": 8, "dense_below": 100}),
        ("llama", "none", {"method": "shadowkv", "budget": 1.0, "dense_below": 66}),  # the last steps are sparse
    ],
)
def test_steps_of_models(
    family: str, padding: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    """Also the summaries of pages that such steps complete, and calls of several tokens between them."""
    model, steps = build_model(family).eval(), [1, 1, 1, 3, 1, 1, 1, 1]
    expected = forward_steps(model, SpinCache(model, **options), padding, steps)
    interpret_kernels(monkeypatch)
    cache = SpinCache(model, **options)
    actual = forward_steps(model, cache, padding, steps)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert "attend_segments" in launched
    cache.check_integrity()


@pytest.mark.parametrize(("dims", "group", "dtype"), [((64, 48), 5, torch.float32), ((80, 16), 1, torch.float16)])
@pytest.mark.parametrize("length", [3, 255, 256, 700])
def test_sizes(
    length: int,
    dims: tuple[int, int],
    group: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    launched: list[str],
) -> None:
    """Fewer tokens than a segment has, whole segments, several segments per split, and splits without any."""
    shape = Shape(kv_heads=2, group=group, key_dim=dims[0], value_dim=dims[1])
    kv = RandomKV.random(shape, 2, length + 3, seed=length).to(dtype)
    outs = []
    for interpreted in (False, True):
        driver = CacheDriver(shape, method=ShadowKV(), budget=1000)
        if interpreted:
            interpret_kernels(monkeypatch)
        driver.step(kv, 0, length)
        outs.append(torch.cat([driver.step(kv, at, at + 1)[0] for at in range(length, length + 3)], 1).float())
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-3)
    assert launched == ["attend_segments"] * 3
    driver.cache.check_integrity()


def test_the_faster_way_is_taken(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """By what selecting leaves out of all sequences; not while pages are in host memory; and an option says otherwise."""
    interpret_kernels(monkeypatch)
    monkeypatch.setattr(device_limits, "bytes_per_us", lambda device: 184 * 256 / ShadowKV().recipe.overhead_us)
    shape = Shape(kv_heads=2, group=1, key_dim=16, value_dim=16)  # 256 bytes a token
    kv = RandomKV.random(shape, 2, 120, seed=0)

    def launches_of_steps(**options: Any) -> list[str]:
        driver = CacheDriver(shape, budget=16, recent_window=8, **options)
        driver.step(kv, 0, 98)  # selecting saves as much for two sequences of 100 tokens as for one of 184
        launched.clear()
        for at in range(98, 102):
            driver.step(kv, at, at + 1)
        assert kernels_of(driver.cache)
        return list(launched)

    assert launches_of_steps() == ["attend_segments"] * 2 + ["attend_pages"] * 2
    assert launches_of_steps(dense_below=0) == ["attend_pages"] * 4
    assert launches_of_steps(dense_below=101) == ["attend_segments"] * 3 + ["attend_pages"]
    assert launches_of_steps(gpu_memory=30_000) == ["attend_pages"] * 4


@pytest.mark.parametrize("method", [Fitted(), Bisection()], ids=["fitted", "bisection"])
def test_tokens_are_clustered_when_a_step_selects(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not behind a prompt that the next steps read whole. The queries of its end are held until then."""
    interpret_kernels(monkeypatch)
    shape = Shape(kv_heads=1, group=2, key_dim=16, value_dim=16)
    kv = RandomKV.random(shape, 1, 1310, seed=0)
    driver = CacheDriver(shape, method=method, budget=64, recent_window=16, dense_below=1304)
    driver.step(kv, 0, 1300)
    (state,) = [layer.state for layer in driver.cache.paged_layers]
    for at in range(1300, 1304):
        driver.step(kv, at, at + 1)
        assert state.observation_queries is not None
        assert (state.clustered_pages, state.stale_pages) == (0, (0, (at + 1) // 4))
    driver.step(kv, 1304, 1305)
    assert state.observation_queries is None
    assert state.clustered_pages
    assert state.stale_pages is None
    driver.cache.check_integrity()


def test_weights_and_gradients_of_steps_that_read_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from all tokens too, since no page is summarised then. Of "auto" the reference backend does not know."""
    model = build_model("llama").train()
    ids = torch.randint(3, 100, (2, 61), generator=torch.Generator().manual_seed(1))
    found = []
    for dense_below in (100, "auto"):
        if dense_below == "auto":
            interpret_kernels(monkeypatch)
            monkeypatch.setattr(device_limits, "bytes_per_us", lambda device: 1e9)
        cache = SpinCache(model, "fitted", budget=16, recent_window=8, dense_below=dense_below)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)
            held = model(ids[:, :1], past_key_values=cache, output_attentions=True).attentions
        loss = model(ids[:, 1:2], past_key_values=cache).logits.square().sum()
        weight = model.model.layers[0].self_attn.q_proj.weight
        found.append((*held, *torch.autograd.grad(loss, [weight])))
        cache.check_integrity()
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
