"""Clustering that fails: for lack of room, by an exception, by a method that loses tokens; and what `check_integrity` finds."""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from spin_hf import CacheStateError, ShadowKV
from spin_hf.attention.methods.clustering import TokenClusters
from spin_hf.indexing import cluster
from tests.support.cache_driver import RandomKV
from tests.support.clustered_pages import SHAPE, moved, new_driver, span_ends
from tests.support.clustering_methods import Backwards, Clumped, Shuffled
from tests.support.inspection import state_of
from tests.support.tuning import tune


def test_no_room_for_copies(kv: RandomKV, caplog: pytest.LogCaptureFixture) -> None:
    """A span that beams share in part is not clustered where there is no memory for copies; one warning is logged."""
    driver = new_driver()
    with patch.object(cluster, "grow", lambda state: None):
        driver.step(kv.rows([0]), 0, 270)
        driver.cache.batch_repeat_interleave(2)
        driver.step(kv.rows([0, 0]), 270, 380)
    used = state_of(driver.cache).sequences.segments_in_use
    for layer in driver.cache.layers:
        object.__setattr__(layer.store.budget, "gpu_memory", 1)
    with patch.object(Clumped, "span_tokens", 400), caplog.at_level(logging.WARNING, "spin_hf"):
        cluster.grow(state_of(driver.cache))
    assert "no room" in caplog.text
    assert span_ends(driver) == [(380 - 17) // 8]
    assert not moved(driver).any()
    assert state_of(driver.cache).sequences.segments_in_use == used
    driver.cache.check_integrity()


class InjectedError(Exception):
    """What the tests raise."""


@pytest.mark.parametrize("error", [InjectedError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["form_clusters", "index_pages"])
@pytest.mark.parametrize(("tokens_at_once", "call"), [(1 << 15, 1), (1 << 15, 2), (72, 1), (72, 4), (72, 8)])
def test_interrupted(
    kv: RandomKV,
    where: str,
    tokens_at_once: int,
    call: int,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the first layer, in the second, in another span: every layer is as before or clustered, and all results are right.

    The next step clusters the layers that are missing.
    """
    tune(monkeypatch, cluster_tokens=tokens_at_once, index_bytes=1)  # layer by layer
    driver = new_driver(method=Shuffled())
    driver.step(kv, 0, 200)
    before = getattr(Shuffled, where)
    calls = 0

    def failing(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return before(self, *args)

    with patch.object(Shuffled, where, failing), pytest.raises(error):
        driver.step(kv, 200, 201)
    driver.cache.check_integrity()
    if where == "index_pages":
        before_it, layer = divmod(call - 1, SHAPE.layers)
        first, stop = [0, 8, 15, 22][before_it], span_ends(driver)[-1]
        assert moved(driver, layer)[:, max(1, first) : stop].all()  # its summaries were made since
        assert not any(moved(driver, behind)[:, first:stop].any() for behind in range(layer + 1, SHAPE.layers))
        assert moved(driver, 0)[:, 1:first].all()
    assert driver.cache.get_seq_length() == 200
    for layer in range(SHAPE.layers):
        assert torch.equal(driver.cache.layers[layer].keys, kv.keys[layer][:, :, :200])
    twin = new_driver(method=ShadowKV())
    twin.step(kv, 0, 200)
    outputs = [d.step(kv, 200, 201) for d in (driver, twin)]
    for ours, theirs in zip(*outputs, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-5
    driver.cache.check_integrity()
    undisturbed = new_driver(method=Shuffled())
    undisturbed.step(kv, 0, 200)
    undisturbed.step(kv, 200, 201)
    assert span_ends(driver) == span_ends(undisturbed)
    assert all(torch.equal(moved(driver, layer), moved(undisturbed, layer)) for layer in range(SHAPE.layers))


@pytest.mark.parametrize("wrong", ["twice", "short", "gap", "overlap", "beyond", "few", "several"])
def test_a_method_that_loses_tokens(kv: RandomKV, wrong: str) -> None:
    @dataclass(frozen=True)
    class Losing(Backwards):
        def form_clusters(self, keys: Tensor, observation_queries: Tensor | None) -> TokenClusters:
            places = torch.arange(keys.shape[2]).expand(keys.shape[:3])
            if wrong in ("twice", "short"):
                return TokenClusters(places // 2 if wrong == "twice" else places[:, :, 1:])
            pages = torch.ones((*keys.shape[:2], keys.shape[2] // 8), dtype=torch.int64)
            if wrong == "several":
                return TokenClusters(places, pages)
            if wrong == "few":
                return TokenClusters(places, pages[:, :, 1:])
            at, number = {"gap": (2, 0), "overlap": (2, 2), "beyond": (-1, 2)}[wrong]
            pages[:, 1, at] = number
            return TokenClusters(places, pages)

    Losing.multi_page_clusters = wrong != "several"
    driver = new_driver(method=Losing())
    driver.step(kv, 0, 200)
    with pytest.raises(CacheStateError, match=r"expected .*form_clusters.*correct the method"):
        driver.step(kv, 200, 201)
    driver.cache.check_integrity()


def test_integrity_sees_lost_positions(kv: RandomKV) -> None:
    driver = new_driver()
    driver.step(kv, 0, 200)
    driver.step(kv, 200, 201)
    for name in ("_shifts", "_partition"):
        broken = deepcopy(driver.cache)
        array = getattr(broken.layers[1].store.permutation, name)
        array.chunks[0][3] += 1
        with pytest.raises(CacheStateError, match="integrity"):
            broken.check_integrity()
    driver.cache.check_integrity()


def test_integrity_sees_a_clustered_page_in_the_recent_window(kv: RandomKV) -> None:
    driver = new_driver()
    driver.step(kv, 0, 200)
    driver.step(kv, 200, 201)
    with patch.object(cluster, "in_order", lambda state, valid, length: state.sequences.spans):
        driver.cache.crop(-20)
    with pytest.raises(CacheStateError, match="run of positions"):
        driver.cache.check_integrity()
