"""A cache that clusters tokens often, and which of its pages are clustered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spin_hf.storage.token_permutation import TokenPermutation
from tests.support.cache_driver import CacheDriver, Shape
from tests.support.clustering_methods import Clumped
from tests.support.inspection import state_of

SHAPE = Shape(layers=3, kv_heads=2, group=2, value_dim=6)
LENGTH = 400
OPTIONS: dict[str, Any] = dict(budget=1000, num_sink_tokens=4, recent_window=9)


def new_driver(**options: Any) -> CacheDriver:
    return CacheDriver(SHAPE, **({"method": Clumped()} | OPTIONS | options))


def clustered(driver: CacheDriver, layer: int = 0) -> TokenPermutation:
    found = driver.cache.layers[layer].store.permutation
    assert found is not None
    return found


def moved(driver: CacheDriver, layer: int = 0) -> Tensor:
    """Pages [B, N] that are clustered in some head: they do not hold consecutive positions."""
    pages = state_of(driver.cache).sequences.num_pages
    positions = clustered(driver, layer).positions(0, pages)
    return (positions != torch.arange(pages * 8).view(pages, 8)).any(3).any(1)


def span_ends(driver: CacheDriver) -> list[int]:
    """Where the spans that are clustered together end, in pages."""
    return state_of(driver.cache).sequences.spans.stops
