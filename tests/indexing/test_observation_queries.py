"""The queries of a prompt's last tokens reach the method that clusters the prompt: once, of the right layer and sequence."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from spin_hf import SpinCache
from spin_hf.attention.methods.clustering import TokenClusters
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.clustering_methods import Shuffled
from tests.support.tuning import tune

SHAPE = Shape(layers=3, kv_heads=2, group=2, value_dim=6)
SCALE = 0.3
LAST = [199, 197, 195, 193]
"""Every second of the last eight tokens of a prompt of 200."""


@dataclass(frozen=True)
class Asking(Shuffled):
    num_observation_queries: ClassVar[int] = 4
    shown: ClassVar[list[tuple[Tensor, Tensor | None]]] = []

    def form_clusters(self, keys: Tensor, observation_queries: Tensor | None) -> TokenClusters:
        self.shown.append((keys, observation_queries))
        return super().form_clusters(keys, observation_queries)


@pytest.fixture(autouse=True)
def _nothing_shown() -> None:
    Asking.shown.clear()


@pytest.fixture(scope="module")
def kv() -> RandomKV:
    return RandomKV.random(SHAPE, 3, 300, seed=0)


def new_driver(**options: Any) -> CacheDriver:
    return CacheDriver(SHAPE, method=Asking(), budget=1000, num_sink_tokens=4, recent_window=9, scale=SCALE, **options)


def check(kv: RandomKV, tokens: list[int]) -> None:
    """Every span that was clustered is of one layer and sequence of `kv`, and came with the queries of these tokens."""
    of = {
        float(number): (layer, row)
        for layer, keys in enumerate(kv.keys)
        for row in range(len(keys))
        for number in keys[row, 0, :, 0]
    }
    seen = set()
    for keys, observation_queries in Asking.shown:
        assert observation_queries is not None
        assert observation_queries.shape == (len(keys), 2, 2, 4, 8)
        for span, queries in zip(keys, observation_queries, strict=True):
            layer, row = of[float(span[0, 0, 0])]
            expected = kv.queries[layer][row].unflatten(0, (2, 2))[:, :, tokens] * SCALE
            assert torch.equal(queries, expected)
            seen.add((layer, row))
    assert len(seen) == SHAPE.layers * len(kv.keys[0])


@pytest.mark.parametrize("at_once", [1, 1 << 30])
def test_a_prompt_and_what_is_generated(kv: RandomKV, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer, or all at once."""
    tune(monkeypatch, index_bytes=at_once)
    driver = new_driver()
    driver.step(kv, 0, 200)
    assert all(layer.state.observation_queries is not None for layer in driver.cache.paged_layers)
    driver.step(kv, 200, 201)
    check(kv, LAST)
    assert all(layer.state.observation_queries is None for layer in driver.cache.paged_layers)
    Asking.shown.clear()
    for position in range(201, 250):
        driver.step(kv, position, position + 1)
    assert Asking.shown
    assert all(observation_queries is None for _, observation_queries in Asking.shown)


def test_a_prompt_in_parts(kv: RandomKV) -> None:
    """It is clustered after its last piece, by the queries of that piece. A piece of 17 tokens belongs to the prompt too."""
    driver = new_driver()
    for start, stop in ((0, 100), (100, 183), (183, 200)):
        driver.step(kv, start, stop)
        assert not Asking.shown
    driver.step(kv, 200, 201)
    check(kv, LAST)
    driver.cache.check_integrity()


def test_a_verification_observes_nothing(kv: RandomKV) -> None:
    """Up to 16 tokens select their pages, after the prompt was clustered."""
    driver = new_driver()
    driver.step(kv, 0, 200)
    driver.step(kv, 200, 216)
    check(kv, LAST)
    assert all(layer.state.observation_queries is None for layer in driver.cache.paged_layers)


def test_sequences_change_places(kv: RandomKV) -> None:
    driver = new_driver()
    driver.step(kv, 0, 200)
    driver.cache.reorder_cache(torch.tensor([2, 0, 0]))
    fork = deepcopy(driver.cache)
    moved = kv.rows([2, 0, 0])
    driver.step(moved, 200, 201)
    check(kv.rows([2, 0]), LAST)
    Asking.shown.clear()
    driver.cache = fork
    driver.cache.batch_repeat_interleave(2)
    driver.step(moved.rows([0, 0, 1, 1, 2, 2]), 200, 201)
    check(kv.rows([2, 0]), LAST)


def test_tokens_taken_over() -> None:
    """They come without queries, unless a last piece of the prompt follows."""
    kv = RandomKV.random(replace(SHAPE, value_dim=SHAPE.key_dim), 3, 300, seed=0)  # values as the config says
    taken = DynamicCache(config=SHAPE.config())
    for layer in range(SHAPE.layers):
        taken.update(kv.keys[layer][:, :, :150], kv.values[layer][:, :, :150], layer)
    driver = new_driver()
    options = dict(budget=1000, num_sink_tokens=4, recent_window=9)
    driver.cache = SpinCache.from_cache(taken, SHAPE.config(), Asking(), **options)
    again = SpinCache.from_cache(taken, SHAPE.config(), Asking(), **options)
    driver.step(kv, 150, 151)
    assert Asking.shown
    assert all(observation_queries is None for _, observation_queries in Asking.shown)
    Asking.shown.clear()
    driver.cache = again
    driver.step(kv, 150, 200)
    driver.step(kv, 200, 201)
    check(kv, LAST)


def test_interrupted(kv: RandomKV, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next step clusters with the same queries."""
    tune(monkeypatch, index_bytes=1)
    driver = new_driver()
    driver.step(kv, 0, 200)
    form_clusters, calls = Asking.form_clusters, 0

    def failing(self: Asking, keys: Tensor, observation_queries: Tensor | None) -> TokenClusters:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        return form_clusters(self, keys, observation_queries)

    with monkeypatch.context() as context:
        context.setattr(Asking, "form_clusters", failing)
        with pytest.raises(MemoryError):
            driver.step(kv, 200, 201)
    driver.step(kv, 200, 201)
    check(kv, LAST)


def test_forgotten(kv: RandomKV) -> None:
    """By `reset`; a batch of another size then has its own."""
    driver = new_driver()
    driver.step(kv, 0, 200)
    driver.cache.reset()
    assert all(layer.state.observation_queries is None for layer in driver.cache.paged_layers)
    driver.step(kv.rows([1]), 0, 200)
    driver.step(kv.rows([1]), 200, 201)
    check(kv.rows([1]), LAST)
