"""int8 pages in the cpu tier: contents, operations and errors.

exact data    multiples of a power of two, which int8 holds exactly: all results are those of unconverted pages, bit for bit
any data      against attention in float64 over keys and values that a quantiser of this file rounded
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from spin_hf import Bisection, Fitted, Quest, RetroInfer, ShadowKV, SpinCache
from tests.support.cache_driver import CacheDriver, RandomKV, Shape, poisoned_memory, smallest_gpu_memory
from tests.support.clustering_methods import Clumped, clustering_often, little_slack
from tests.support.inspection import lower_cap, state_of

SHAPE = Shape(layers=2, kv_heads=2, group=2, key_dim=16, value_dim=8)
OPTIONS: dict[str, Any] = dict(budget=24, num_sink_tokens=4, recent_window=10)
METHODS = {
    "shadowkv": ShadowKV(), "quest": Quest(0), "clumped": Clumped(), "bisection": clustering_often(Bisection, 32, 16)(2),
    "retroinfer": clustering_often(RetroInfer, 32, 16)(), "fitted": clustering_often(Fitted, 32, 16)(),
}  # fmt: skip
PLENTY = 300_000
"""Bytes of a cap with page frames for every step here, but not for all pages."""
TIGHT = 150_000
"""For two sequences of fewer tokens."""


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory(), little_slack():
        yield


def feed(driver: CacheDriver, kv: RandomKV, stops: list[int], valid: Tensor | None = None) -> list[Tensor]:
    """Outputs of steps up to each of `stops`, layer by layer."""
    outputs, start = [], driver.cache.get_seq_length()
    for stop in stops:
        outputs += driver.step(kv, start, stop, None if valid is None else valid[:, :stop])
        start = stop
    return outputs


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def life(driver: CacheDriver, kv: RandomKV, valid: Tensor | None) -> list[Tensor]:
    """A prompt, steps of one and of several tokens, crops into pages, other sequences, copies."""
    outputs = feed(driver, kv, [300, 301, 302, 309, 310], valid)
    driver.cache.crop(-7)
    driver.cache.check_integrity()
    outputs += feed(driver, kv, [304, 312], valid)
    driver.cache.reorder_cache(torch.tensor([1, 0]))
    kv, valid = kv.rows([1, 0]), None if valid is None else valid[[1, 0]]
    outputs += feed(driver, kv, [313, 325], valid)
    driver.cache.check_integrity()
    driver.cache.batch_repeat_interleave(2)
    rows = [0, 0, 1, 1]
    outputs += feed(driver, kv.rows(rows), [326, 337], None if valid is None else valid[rows])
    driver.cache.check_integrity()
    twin = replace_cache(driver)
    outputs += feed(twin, kv.rows(rows), [338, 345], None if valid is None else valid[rows])
    driver.cache.crop(-60)
    outputs += feed(driver, kv.rows(rows), [280, 281], None if valid is None else valid[rows])
    driver.cache.check_integrity()
    return outputs


def replace_cache(driver: CacheDriver) -> CacheDriver:
    twin = CacheDriver(SHAPE, **OPTIONS)
    twin.cache = deepcopy(driver.cache)
    return twin


@pytest.mark.sweep
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_exact_data_is_as_without(method: str, padded: bool) -> None:
    kv = RandomKV.random(SHAPE, 2, 350, seed=0).exact_in_int8()
    valid = None
    if padded:
        valid = torch.ones((2, 350), dtype=torch.bool)
        valid[0, :21], valid[1, 100:130] = False, False
    options: dict[str, Any] = dict(**OPTIONS, method=METHODS[method], gpu_memory=PLENTY)
    drivers = [CacheDriver(SHAPE, **options, cpu_dtype=dtype) for dtype in ("auto", "int8")]
    plain, int8 = (life(driver, kv, valid) for driver in drivers)
    assert_equal(int8, plain)
    as_it_is, in_int8 = (driver.cache.stats() for driver in drivers)
    assert as_it_is.loads == in_int8.loads > 0
    assert as_it_is.gpu_bytes == in_int8.gpu_bytes
    assert in_int8.cpu_bytes * 24 * 4 == as_it_is.cpu_bytes * (24 + 8)
    for ours, theirs in zip(drivers[1].cache.layers, drivers[0].cache.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


@pytest.mark.sweep
@pytest.mark.parametrize("summary_dtype", ["auto", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_page_frames_changes_nothing(method: str, summary_dtype: str) -> None:
    """Down to the frames of one step. With fewer, a step reads in waves, whose sum is rounded differently."""
    kv = RandomKV.random(SHAPE, 2, 350, seed=1)
    options: dict[str, Any] = dict(**OPTIONS, method=METHODS[method], summary_dtype=summary_dtype, cpu_dtype="int8")
    runs, more = (
        [],
        PLENTY * (17 if method in ("bisection", "fitted") else 20) // 16,
    )  # with a little more, small pages all stay
    for cap in (PLENTY, more):
        driver = CacheDriver(SHAPE, **options, gpu_memory=cap)
        runs.append((life(driver, kv, None), driver.cache.stats()))
    (ours, few), (theirs, many) = runs
    assert few.loads > many.loads > 0
    assert_equal(ours, theirs)

    def run(cap: int) -> list[Tensor]:
        driver = CacheDriver(SHAPE, **options, gpu_memory=cap)
        outputs = life(driver, kv, None)
        assert driver.cache.stats().loads > few.loads
        return outputs

    for fewest, outputs in zip(at_the_smallest_cap(run), theirs, strict=True):
        torch.testing.assert_close(fewest, outputs, rtol=0, atol=2e-6)


def at_the_smallest_cap(run: Callable[[int], list[Tensor]]) -> list[Tensor]:
    kept: list[list[Tensor]] = []
    smallest_gpu_memory(lambda cap: kept.append(run(cap)))
    return kept[-1]


@pytest.mark.parametrize("method", METHODS)
def test_pages_that_move_later(method: str) -> None:
    """They are then as if they had always been there, and so are their summaries."""
    kv = RandomKV.random(SHAPE, 2, 350, seed=2)
    options: dict[str, Any] = dict(**OPTIONS, method=METHODS[method], cpu_dtype="int8")
    early = CacheDriver(SHAPE, **options, gpu_memory=TIGHT)
    late = CacheDriver(SHAPE, **options, gpu_memory=10**9)
    feed(early, kv, [250])
    feed(late, kv, [250])
    assert early.cache.stats().cpu_bytes > 0
    assert late.cache.stats().cpu_bytes == 0
    exact = late.cache.layers[0].keys
    assert torch.equal(exact, kv.keys[0][:, :, :250])
    lower_cap(late.cache, TIGHT)
    state_of(late.cache).sequences.fit()  # as `GpuMemory` does when a cap changes: before tokens are clustered
    stops = [251, 256, 257, 270, 271, 280, 290, 291]
    assert_equal(feed(late, kv, stops), feed(early, kv, stops))
    assert late.cache.stats().cpu_bytes == early.cache.stats().cpu_bytes
    late.cache.check_integrity()
    assert not torch.equal(late.cache.layers[0].keys[:, :, :250], exact)
    for ours, theirs in zip(late.cache.layers, early.cache.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)


def test_what_stays_in_the_compute_tier_is_as_it_is() -> None:
    kv = RandomKV.random(SHAPE, 2, 350, seed=3)
    plain, int8 = CacheDriver(SHAPE, **OPTIONS), CacheDriver(SHAPE, **OPTIONS, cpu_dtype="int8", gpu_memory="1GiB")
    assert_equal(life(int8, kv, None), life(plain, kv, None))
    assert int8.cache.stats().cpu_bytes == 0


def quantised(states: Tensor) -> Tensor:
    """float64 [..., D], in 127 steps of the largest number up and down."""
    scale = states.double().abs().amax(-1, keepdim=True) / 127
    return (states.double() / scale).round() * scale


def dense(kv: RandomKV, layer: int, stop: int) -> Tensor:
    """Attention in float64 of token stop - 1 over all tokens, with the keys and values of `kv`: [B, 1, heads, Dv]."""
    group = kv.shape.group
    keys, values = (x[layer][:, :, :stop].double().repeat_interleave(group, 1) for x in (kv.keys, kv.values))
    query = kv.queries[layer][:, :, stop - 1 : stop].double()
    return ((query @ keys.transpose(2, 3) * kv.shape.key_dim**-0.5).softmax(-1) @ values).transpose(1, 2)


def test_what_is_lost() -> None:
    """Outputs are those of rounded tokens, but for numbers in the middle of two steps; a per cent from the exact ones."""
    kv = RandomKV.random(replace(SHAPE, key_dim=64, value_dim=64), 2, 340, seed=4)
    rounded = replace(kv, keys=[*map(quantised, kv.keys)], values=[*map(quantised, kv.values)])
    options: dict[str, Any] = dict(OPTIONS, budget=1 << 20, gpu_memory=600_000)
    int8, plain = CacheDriver(kv.shape, **options, cpu_dtype="int8"), CacheDriver(kv.shape, **options)
    losses = []
    for stop in (330, 331, 332, 340):
        ours, theirs = (feed(driver, kv, [stop]) for driver in (int8, plain))
        for layer in range(2):
            if stop == 330:  # a prompt attends to its own tokens as they are
                assert torch.equal(ours[layer], theirs[layer])
                continue
            expected = dense(rounded, layer, stop)
            torch.testing.assert_close(ours[layer][:, -1:].double(), expected, rtol=0, atol=2e-4)
            exact = dense(kv, layer, stop)
            torch.testing.assert_close(theirs[layer][:, -1:].double(), exact, rtol=0, atol=5e-6)
            losses.append(float((ours[layer][:, -1:] - exact).norm() / exact.norm()))
    assert int8.cache.stats().loads > 0
    assert 1e-4 < max(losses) < 0.02


def test_taking_over() -> None:
    shape = replace(SHAPE, value_dim=SHAPE.key_dim)  # as the config says
    kv, dynamic = RandomKV.random(shape, 2, 350, seed=5), DynamicCache()
    for layer in range(2):
        dynamic.update(kv.keys[layer][:, :, :300], kv.values[layer][:, :, :300], layer)
    options: dict[str, Any] = dict(**OPTIONS, method="shadowkv", gpu_memory=PLENTY, cpu_dtype="int8")
    prefilled, taken = CacheDriver(shape, **options), CacheDriver(shape, **options)
    taken.cache = SpinCache.from_cache(dynamic, taken.config, **options)
    feed(prefilled, kv, [300])
    taken.cache.check_integrity()
    assert_equal(feed(taken, kv, [301, 320, 321]), feed(prefilled, kv, [301, 320, 321]))
    assert taken.cache.stats().cpu_bytes == prefilled.cache.stats().cpu_bytes > 0


def test_a_frame_that_differs_is_found() -> None:
    kv, driver = (
        RandomKV.random(SHAPE, 1, 350, seed=6),
        CacheDriver(SHAPE, **OPTIONS, gpu_memory=60_000, cpu_dtype="int8"),
    )
    feed(driver, kv, [300, 301])
    driver.cache.check_integrity()
    frames = driver.cache.layers[0].store.frames
    h, slot = (frames.held(0) >= 0).nonzero()[0].tolist()
    frames.frames[h * frames.num_slots + slot, 0] += 1e-3
    with pytest.raises(Exception, match="a frame differs"):
        driver.cache.check_integrity()
