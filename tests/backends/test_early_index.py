"""Clustering is compiled for runs as long as those of the prompt, to the next power of two. The runs are read from caches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from spin_hf import Bisection, ShadowKV
from spin_hf.backends.early_index import tokens_to_cluster
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.inspection import state_of

SHAPE = Shape(kv_heads=1, group=1, key_dim=8, value_dim=8)


class Short(Bisection):
    """Spans of 256 tokens."""

    span_tokens: ClassVar[int] = 256
    cluster_interval: ClassVar[int] = 64


def of_prompt(method: Any, tokens: int) -> tuple[int, list[int]]:
    """Tokens that are expected in the longest run, and those of all runs."""
    kv, driver = (
        RandomKV.random(SHAPE, 1, tokens + 1, 0),
        CacheDriver(SHAPE, method=method, budget=64, recent_window=16),
    )
    driver.step(kv, 0, tokens)
    state: Any = state_of(driver.cache)
    expected = tokens_to_cluster(SimpleNamespace(state=state), tokens)  # type: ignore[arg-type]
    driver.step(kv, tokens, tokens + 1)
    spans, size = state.sequences.spans, state.sequences.page_size
    return expected, [int(spans.clustered[0, first:stop].sum()) * size for first, stop in spans.bounds]


@pytest.mark.parametrize("tokens", [141, 150, 331, 800, 1203])
def test_runs_of_a_prompt(tokens: int) -> None:
    expected, runs = of_prompt(Short(), tokens)
    assert bool(runs) == (expected > 0)
    if runs:
        assert (expected - 1).bit_length() == (max(runs) - 1).bit_length()


def test_methods_without_clusters() -> None:
    assert of_prompt(ShadowKV(), 200) == (0, [])
