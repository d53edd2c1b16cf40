"""Memory caps over a cache's life: `stats()` stays below them, no call is refused that fits, and nothing is lost.

`tests/attention` compares outputs with and without a cap. Here it is about the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from spin_hf import BatchSizeError, CapacityError
from tests.support.cache_driver import CacheDriver, RandomKV, Shape, smallest_gpu_memory

SHAPE = Shape(layers=2, kv_heads=2, group=1, key_dim=4, value_dim=4)
OPTIONS: dict[str, Any] = dict(budget=24, num_sink_tokens=4, recent_window=10)


def feed(driver: CacheDriver, kv: RandomKV, stops: list[int]) -> None:
    start = driver.cache.get_seq_length()
    for stop in stops:
        driver.step(kv, start, stop)
        start = stop


@pytest.mark.parametrize("slack", [1.0, 1.5, 3.0, 10.0])
def test_bytes_stay_below_the_cap(slack: float) -> None:
    kv = RandomKV.random(SHAPE, 3, 530, seed=0)
    stops = [100, 250, 255, 257, 300, 511, 513, 530]
    cap = int(slack * smallest_gpu_memory(lambda cap: feed(CacheDriver(SHAPE, **OPTIONS, gpu_memory=cap), kv, stops)))
    driver = CacheDriver(SHAPE, **OPTIONS, gpu_memory=cap)
    seen = set()
    for stop in stops:
        feed(driver, kv, [stop])
        stats = driver.cache.stats()
        assert stats.gpu_bytes <= cap
        pages = 3 * SHAPE.layers * SHAPE.kv_heads * -(-stop // 8)
        assert stats.pages == pages
        whole = pages * 8 * (SHAPE.key_dim + SHAPE.value_dim) * 4
        assert stats.gpu_bytes > whole or stats.cpu_bytes >= whole
        seen.add(stats.cpu_bytes > 0)
    assert seen == {1.0: {True}, 10.0: {False}}.get(slack, seen)


def test_the_cpu_tier_has_its_own_cap() -> None:
    kv = RandomKV.random(SHAPE, 1, 300, seed=0)
    driver = CacheDriver(SHAPE, **OPTIONS)
    feed(driver, kv, [256])
    needed = driver.cache.stats().gpu_bytes  # pages and summaries of one segment
    tight = smallest_gpu_memory(lambda cap: feed(CacheDriver(SHAPE, **OPTIONS, gpu_memory=cap), kv, [256]))
    assert tight < needed
    pages = SHAPE.layers * SHAPE.kv_heads * 32 * 8 * (SHAPE.key_dim + SHAPE.value_dim) * 4
    driver = CacheDriver(SHAPE, **OPTIONS, gpu_memory=tight, cpu_memory=pages)
    feed(driver, kv, [200, 256])
    assert driver.cache.stats().cpu_bytes == pages
    with pytest.raises(CapacityError, match="cpu_memory"):
        feed(driver, kv, [257])
    assert driver.cache.get_seq_length() == 256
    driver.cache.check_integrity()


@pytest.mark.parametrize("emptied_by", ["reset", "crop"])
def test_an_emptied_cache_has_room_for_another_batch(emptied_by: str) -> None:
    """What a larger batch would need does not count once it is gone."""
    many, long = RandomKV.random(SHAPE, 5, 40, seed=0), RandomKV.random(SHAPE, 1, 600, seed=1)

    def run(cap: int, first: Callable[[CacheDriver], None] | None = None) -> None:
        driver = CacheDriver(SHAPE, **OPTIONS, gpu_memory=cap)
        if first is not None:
            first(driver)
        feed(driver, long, [590, 591, 600])

    def emptied(driver: CacheDriver) -> None:
        feed(driver, many, [40])
        driver.cache.reset() if emptied_by == "reset" else driver.cache.crop(-40)

    alone = smallest_gpu_memory(run)
    batch = smallest_gpu_memory(lambda cap: feed(CacheDriver(SHAPE, **OPTIONS, gpu_memory=cap), many, [40]))
    pool = 2 * SHAPE.layers * SHAPE.kv_heads * 32 * (SHAPE.key_dim + 1) * 4  # two more segments' summaries are kept
    run(max(alone + pool, batch), emptied)


def test_selecting_nothing_is_refused() -> None:
    driver = CacheDriver(SHAPE, **OPTIONS)
    kv = RandomKV.random(SHAPE, 2, 50, seed=0)
    feed(driver, kv, [40])
    with pytest.raises(BatchSizeError):
        driver.cache.batch_select_indices(torch.tensor([], dtype=torch.int64))
    feed(driver, kv, [41, 50])
    driver.cache.check_integrity()
