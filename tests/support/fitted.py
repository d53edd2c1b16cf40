"""Small caches with `Fitted`, which clusters often enough for short conversations."""

from __future__ import annotations

from typing import Any

from spin_hf import Fitted, SpinCache
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.clustering_methods import clustering_often
from tests.support.inspection import state_of

SHAPE = Shape(layers=2, kv_heads=2, group=2, key_dim=8, value_dim=6)
ZONES: dict[str, Any] = dict(budget=16, num_sink_tokens=4, recent_window=8)
Small = clustering_often(Fitted, 64, 24)


def new_driver(kv: RandomKV, tokens: int, **options: Any) -> CacheDriver:
    """A cache that has read a prompt and one token more, so that it is clustered."""
    driver = CacheDriver(kv.shape, **({"method": Small()} | ZONES | options))
    driver.step(kv, 0, tokens - 1)
    driver.step(kv, tokens - 1, tokens)
    return driver


def fits_of(cache: SpinCache) -> list[Any]:
    """Fitted tensors of all layers."""
    return [layer.fitted for layer in state_of(cache).layers]
