"""The interpreted kernels read a restored cache as they read the saved one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_hf import Bisection, Quest, ShadowKV, SpinCache
from tests.support.cache_driver import CacheDriver, RandomKV, Shape, smallest_gpu_memory
from tests.support.clustering_methods import clustering_often, little_slack
from tests.support.inspection import counted_by_kernels, kernels_of
from tests.support.interpreted_kernels import interpret_kernels

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]

SHAPE = Shape(kv_heads=1, group=2, key_dim=16, value_dim=16)
METHODS = {"shadowkv": ShadowKV(), "quest": Quest(0), "bisection": clustering_often(Bisection, 32, 16)(2)}


@pytest.mark.parametrize("tiers", ["one", "two"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.sweep(keep=[3])
def test_kernels_go_on(method: str, tiers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interpret_kernels(monkeypatch)
    kv = RandomKV.random(SHAPE, 2, 110, seed=0)
    options: dict[str, Any] = dict(budget=16, num_sink_tokens=4, recent_window=8)

    def run(gpu_memory: int) -> None:
        given: dict[str, Any] = {} if tiers == "one" else {"gpu_memory": gpu_memory}
        driver = CacheDriver(SHAPE, method=METHODS[method], **options, **given)
        driver.steps(kv, 0, [100, 101, 102])
        assert (driver.cache.stats().cpu_bytes > 0) == (tiers == "two")
        driver.cache.save_pretrained(tmp_path)
        other = CacheDriver(SHAPE, method=METHODS[method])
        other.cache = SpinCache.from_pretrained(tmp_path, other.config, METHODS[method], **given)
        other.cache.check_integrity()
        ours, theirs = (each.steps(kv, 102, range(103, 108)) for each in (other, driver))
        assert kernels_of(other.cache)
        assert any(counted_by_kernels(other.cache).values())
        for one, another in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, another, rtol=0, atol=1e-6)

    with little_slack():
        run(0) if tiers == "one" else smallest_gpu_memory(run)
