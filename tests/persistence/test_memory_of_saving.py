"""Saving takes a few MiB beside the pages; loading takes the pages once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from spin_hf import SpinCache
from tests.support.cache_driver import Shape
from tests.support.saved_caches import shards_of

SHAPE = Shape(layers=2, kv_heads=4, group=1, key_dim=64, value_dim=64)
TOKENS = 32_768
MARGIN = 48 << 20
"""Pieces of all threads, and what the allocator keeps."""
needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")


def resident(name: str) -> int:
    """Bytes in memory now (VmRSS) or at most since the last reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(name)]
    return 1024 * int(line.split()[1])


def reset() -> int:
    """Reset the peak; returns the bytes that are in memory now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


@needs_proc
@pytest.mark.parametrize("gpu_memory", ["auto", "24MiB"])
def test_peaks(gpu_memory: str, tmp_path: Path) -> None:
    config, dynamic = SHAPE.config(), DynamicCache()
    for layer in range(SHAPE.layers):
        dynamic.update(*torch.randn(2, 1, SHAPE.kv_heads, TOKENS, SHAPE.key_dim).unbind(), layer)
    cache = SpinCache.from_cache(dynamic, config, "shadowkv", gpu_memory=gpu_memory)
    cache.layers[0].keys  # noqa: B018
    del dynamic
    cache.save_pretrained(tmp_path / "first")  # computes the summaries
    before = reset()
    cache.save_pretrained(tmp_path / "second", max_shard_bytes="16MiB")
    assert resident("VmHWM") - before < MARGIN
    size = sum(file.stat().st_size for file in shards_of(tmp_path / "second"))
    assert size > 2 * MARGIN
    before = reset()
    restored = SpinCache.from_pretrained(tmp_path / "second", config, gpu_memory=gpu_memory)
    assert (restored.stats().cpu_bytes > 0) == (gpu_memory != "auto")
    frames = 24 << 20 if gpu_memory != "auto" else 0
    assert resident("VmHWM") - before < size + frames + MARGIN
    assert torch.equal(restored.layers[1].values, cache.layers[1].values)
