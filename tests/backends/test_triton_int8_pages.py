"""The interpreted kernels with int8 pages: they write the same bytes as the reference, and all else agrees."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_hf import Bisection, Quest, RetroInfer, ShadowKV, SpinCache
from spin_hf.storage.page_layout import Int8Layout
from tests.support.cache_driver import CacheDriver, RandomKV, Shape, poisoned_memory
from tests.support.clustering_methods import clustering_often, little_slack
from tests.support.inspection import counted_by_kernels, forward_of, lower_cap
from tests.support.interpreted_kernels import forward_steps, interpret_kernels
from tests.support.zoo import build_model

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]

SHAPE = Shape(kv_heads=1, group=3, key_dim=40, value_dim=24)
METHODS = {
    "shadowkv": ShadowKV(), "quest": Quest(0), "bisection": clustering_often(Bisection, 32, 16)(2),
    "retroinfer": clustering_often(RetroInfer, 32, 16)(),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory(), little_slack():
        yield


def pages_of(driver: CacheDriver) -> tuple[Tensor, list[Tensor]]:
    """Rows of all pages of the only layer, as keys and values, or codes and scales."""
    store, length = driver.cache.layers[0].store, driver.cache.get_seq_length()
    rows = store.rows(0, store.sequences.num_pages)
    assert isinstance(store.backing_layout, Int8Layout)
    return rows, [part.flatten(2, 3)[:, :, :length] for part in store.backing_layout.split(store.backing.take(rows))]


@pytest.mark.sweep(keep=[1, 3])
@pytest.mark.parametrize(
    ("method", "padded", "summary_dtype"),
    [
        ("shadowkv", False, "auto"), ("shadowkv", True, "int8"), ("quest", True, "auto"), ("bisection", False, "auto"),
        ("retroinfer", False, "auto"),
    ],
)  # fmt: skip
def test_kernels_do_what_the_reference_does(
    method: str, padded: bool, summary_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt, a single token, a crop into a page, and several tokens at once, which complete it."""
    interpret_kernels(monkeypatch)
    kv, valid = RandomKV.random(SHAPE, 2, 160, seed=3), None
    if padded:
        valid = torch.ones((2, 160), dtype=torch.bool)
        valid[0, :21], valid[1, 60:71] = False, False
    drivers = [
        CacheDriver(
            SHAPE, method=METHODS[method], budget=32, recent_window=8, summary_dtype=summary_dtype, gpu_memory=100_000,
            cpu_dtype="int8",
        )
        for _ in range(2)
    ]  # fmt: skip
    start = 0
    for stop in (141, 142, 145, 148):
        known = None if valid is None else valid[:, :stop]
        ours = drivers[0].step(kv, start, stop, known)
        with monkeypatch.context() as patch:
            patch.setattr("spin_hf.kernels.launchers", lambda device: None)
            expected = drivers[1].step(kv, start, stop, known)
        real = torch.ones_like(ours[0][..., 0, 0], dtype=torch.bool) if known is None else known[:, start:]
        torch.testing.assert_close(ours[0][real], expected[0][real], rtol=0, atol=1e-5)
        for mine, theirs in zip(*(pages_of(driver)[1] for driver in drivers), strict=True):
            assert torch.equal(mine, theirs)
        start = stop
        if stop == 142:
            for driver in drivers:
                driver.cache.crop(-2)
            start = 140
    stats = drivers[0].cache.stats()
    assert counted_by_kernels(drivers[0].cache)["QUERIES"] == stats.sparse_queries > 0
    assert stats.loads > 0
    assert stats.hit_rate > 0
    drivers[0].cache.check_integrity()  # frames are what loads give


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rounding_is_to_the_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of all sizes, zeros, numbers too small for a scale, and some that are not finite."""
    interpret_kernels(monkeypatch)
    generator = torch.Generator().manual_seed(0)

    def draw(dim: int) -> Tensor:
        states = torch.randn((2, 1, 90, dim), generator=generator)
        states *= 10 ** torch.empty((2, 1, 90, 1)).uniform_(-6, 4, generator=generator)
        states[:, :, 7], states[:, :, 8, 0], states[1, :, 20, 3], states[0, :, 33, 5] = 0, 0, float("nan"), float("inf")
        states[:, :, 12] = 1e-45
        return states.to(dtype)

    driver = CacheDriver(SHAPE, budget=1 << 20, recent_window=8, gpu_memory=60_000, cpu_dtype="int8")
    keys, values = draw(SHAPE.key_dim), draw(SHAPE.value_dim)
    driver.cache.update(keys, values, 0)
    driver.cache.layers[0].take_pending()
    driver.cache.layers[0].append(keys, values, None)
    forward_of(driver.cache).commit()
    _, held = pages_of(driver)
    form = driver.cache.layers[0].store.backing_layout
    finite = torch.ones(90, dtype=torch.bool)
    finite[[20, 33]] = False
    for ours, theirs in zip(held, form.encode(keys, values), strict=True):
        assert torch.equal(ours[:, :, finite], theirs[:, :, finite])
    for ours, given in zip(form.decode(held), (keys, values), strict=True):
        lost = ~given.isfinite().all(-1)
        assert bool(lost.any())
        assert not ours[lost].isfinite().any()
        assert bool(ours[~lost].isfinite().all())


def test_pages_move_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real model, whose cache outgrows its cap: kernels of the other form take over."""
    model = build_model("llama").eval()
    options: dict[str, Any] = {"method": "shadowkv", "budget": 24, "recent_window": 8, "cpu_dtype": "int8"}

    def run() -> tuple[Tensor, SpinCache]:
        cache = SpinCache(model, **options, gpu_memory=1 << 20)
        with torch.no_grad():
            first = forward_steps(model, cache, "left", [1])
            assert cache.stats().cpu_bytes == 0
            lower_cap(cache, 60_000)
            ids = torch.randint(3, 100, (2, 3), generator=torch.Generator().manual_seed(3))
            mask = torch.ones((2, 65), dtype=torch.long)
            mask[0, :11] = 0
            more = [
                model(input_ids=ids[:, i : i + 1], attention_mask=mask[:, : 63 + i], past_key_values=cache).logits
                for i in range(3)
            ]
        return torch.cat([first, *more], 1), cache

    expected, reference = run()
    reference.check_integrity()
    interpret_kernels(monkeypatch)
    actual, cache = run()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert cache.stats().cpu_bytes == reference.stats().cpu_bytes > 0
    cache.check_integrity()
