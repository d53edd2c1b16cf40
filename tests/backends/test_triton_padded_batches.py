"""Padded batches, whose sequences have page frames in proportion to their real tokens: kernels against the reference."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.interpreted_kernels import interpret_kernels

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]

OPTIONS: dict[str, Any] = dict(budget=24, num_sink_tokens=4, recent_window=10)


def test_sequences_with_shares_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that are appended to, loaded and evicted; frames that are released and allocated again."""
    interpret_kernels(monkeypatch, _HAND_TILE=8, _SLOT_TILE=16)
    kv = RandomKV.random(Shape(kv_heads=1), 2, 590, seed=0)
    valid = torch.ones((2, 590), dtype=torch.bool)
    valid[0, :430] = False
    drivers = [CacheDriver(kv.shape, **OPTIONS, gpu_memory=cap) for cap in (34_000, "auto")]
    start, seen = 0, []
    for stop in (560, 561, 563, 564, 565, 566, 567):
        ours = drivers[0].step(kv, start, stop, valid[:, :stop])
        with monkeypatch.context() as patch:
            patch.setattr("spin_hf.kernels.launchers", lambda device: None)
            expected = drivers[1].step(kv, start, stop, valid[:, :stop])
        real = valid[:, start:stop]
        torch.testing.assert_close(ours[0][real], expected[0][real], rtol=0, atol=1e-5)
        start = stop
        seen.append(drivers[0].cache.layers[0].store.frames.slots)
        if stop == 563:
            assert drivers[0].cache.release_gpu_memory(5_000) >= 5_000
        if stop == 565:
            drivers[0].cache._passes.gpu._steps_left = 1
    for short, long in seen:
        assert short < long
    assert sum(seen[3]) < sum(seen[0]) == sum(seen[-1])
    stats = drivers[0].cache.stats()
    assert drivers[0].cache._passes.backends.counted()["QUERIES"] == stats.sparse_queries > 0
    assert stats.evictions > 0
    assert stats.mandatory_frames + stats.buffer_frames == sum(seen[-1])
    drivers[0].cache.check_integrity()
