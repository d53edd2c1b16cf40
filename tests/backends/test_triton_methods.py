"""The interpreted kernels of other methods against their oracle, and with int8 summaries against the reference."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_hf import Bisection, Method, Quest, RetroInfer, ShadowKV
from tests.support.cache_driver import CacheDriver, RandomKV, Shape, poisoned_memory
from tests.support.conversation import compare_with_oracle, random_pages, single_steps, without_near_ties
from tests.support.inspection import counted_by_kernels
from tests.support.interpreted_kernels import interpret_kernels
from tests.support.oracle import Rules
from tests.support.seer_gates import RULES, compare_above, method_of, rules_for

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]

QUEST = Rules(budget=32, num_sink_tokens=4, recent_window=10, quest=True)


@pytest.fixture(autouse=True)
def _kernels_in_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    interpret_kernels(monkeypatch)
    with poisoned_memory():
        yield


def served(driver: CacheDriver) -> CacheDriver:
    """`driver`, whose cache the kernels served."""
    assert counted_by_kernels(driver.cache)["QUERIES"] == driver.cache.stats().sparse_queries > 0
    return driver


def with_holes(length: int) -> torch.Tensor:
    """Left padding, a long hole, and many short ones: [3, length]."""
    valid = torch.ones((3, length), dtype=torch.bool)
    valid[0, 33:90], valid[1, : length - 40 : 3], valid[2, :41] = False, False, False
    return valid


@pytest.mark.sweep(keep=[1])
@pytest.mark.parametrize(
    ("shape", "dense_layers", "prompt"),
    [(Shape(group=3), 0, 150), (Shape(layers=2, kv_heads=1), 1, 95), (Shape(kv_heads=1), 0, 33)],
)
def test_quest(shape: Shape, dense_layers: int, prompt: int) -> None:
    """Through pages that the steps complete, which become candidates."""

    def run(seed: int) -> None:
        kv, rules = random_pages(shape, 2, prompt + 20, seed), replace(QUEST, dense_layers=dense_layers)
        served(compare_with_oracle(kv, rules, single_steps(prompt, prompt + 20)))

    without_near_ties(run)


@pytest.mark.sweep(keep=[1])
@pytest.mark.parametrize("budget", [32, 0.3])
def test_quest_with_padding_and_several_queries(budget: float) -> None:
    def run(seed: int) -> None:
        valid, rules = with_holes(180), replace(QUEST, budget=budget, dense_layers=1)
        steps = [(stop, valid[:, :stop]) for stop in (160, 161, 165, 166, 180)]
        served(compare_with_oracle(random_pages(Shape(layers=2, kv_heads=1), 3, 180, seed), rules, steps))

    without_near_ties(run)


@pytest.mark.sweep
@pytest.mark.parametrize("method", [ShadowKV(), Quest(dense_layers=0), RetroInfer(), Bisection()], ids=lambda m: m.name)
@pytest.mark.parametrize("count", [1, 4])
def test_chunks_of_padding_only(method: Method, count: int) -> None:
    """Behind nothing but padding a query attends to nothing, and what comes then is as without the padding."""
    padding, shape = 6 * method.page_size, Shape(kv_heads=1)
    options: dict[str, Any] = dict(method=method, budget=8, num_sink_tokens=4, recent_window=10)
    kv, valid = random_pages(shape, 1, padding + 24, 0), torch.ones((1, padding + 24), dtype=torch.bool)
    valid[:, :padding] = False
    padded, bare = CacheDriver(shape, **options), CacheDriver(shape, **options)
    for start in range(0, padding, count):
        padded.step(kv, start, start + count, valid[:, : start + count])
    for start in range(padding, padding + 24):
        (ours,) = padded.step(kv, start, start + 1, valid[:, : start + 1])
        (theirs,) = bare.step(kv.tokens(slice(padding, None)), start - padding, start - padding + 1)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)
    served(padded).cache.check_integrity()


def test_quest_paged() -> None:
    """The layer that attends to everything reads more pages than there are frames."""

    def run(seed: int) -> None:
        kv, rules = random_pages(Shape(layers=2, kv_heads=1), 1, 190, seed), replace(QUEST, dense_layers=1)
        driver = served(compare_with_oracle(kv, rules, single_steps(180, 190), gpu_memory=22_000))
        stats, (whole, chosen) = driver.cache.stats(), driver.cache.paged_layers
        assert 0 < chosen.store.frames.num_slots < 180 // 16
        assert stats.loads > 10 * (180 // 16 - whole.store.frames.num_slots)
        assert stats.evictions > 0

    without_near_ties(run)


def compare(monkeypatch: pytest.MonkeyPatch, kv: RandomKV, steps: list[tuple[int, Any]], **options: Any) -> None:
    """Kernels and reference attend to the same."""
    drivers = [CacheDriver(kv.shape, **options) for _ in range(2)]
    start = 0
    for stop, valid in steps:
        ours = drivers[0].step(kv, start, stop, valid)
        with monkeypatch.context() as patch:
            patch.setattr("spin_hf.kernels.launchers", lambda device: None)
            expected = drivers[1].step(kv, start, stop, valid)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        start = stop
    stats, reference = served(drivers[0]).cache.stats(), drivers[1].cache.stats()
    assert (stats.sparse_queries, stats.attended_tokens) == (reference.sparse_queries, reference.attended_tokens)
    drivers[0].cache.check_integrity()


def test_quest_by_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(kv_heads=2, group=3, key_dim=32, value_dim=16)
    steps = [(160, None), (161, None), (164, None), *((stop, None) for stop in range(165, 180))]
    options: dict[str, Any] = {"budget": 48, "recent_window": 10, "summary_dtype": "int8"}
    compare(monkeypatch, random_pages(shape, 1, 180, 0), steps, method=Quest(0), **options)


@pytest.mark.sweep(keep=[1])
@pytest.mark.parametrize(("page_size", "group", "prompt"), [(32, 3, 250), (16, 1, 33), (64, 2, 380)])
def test_seer(page_size: int, group: int, prompt: int, tmp_path: Path) -> None:
    """Through pages that the steps complete, in two layers with gates of their own."""
    shape = Shape(layers=2, kv_heads=1, group=group)
    rules = rules_for(shape, tmp_path, replace(RULES, budget=2 * page_size), page_size=page_size)

    def run(seed: int) -> None:
        steps = single_steps(prompt, prompt + 20)
        served(
            compare_with_oracle(
                random_pages(shape, 2, prompt + 20, seed), rules, steps, method=method_of(rules, tmp_path)
            )
        )

    without_near_ties(run)


@pytest.mark.sweep(keep=[2])
@pytest.mark.parametrize(("budget", "threshold"), [(64, None), (0.3, None), (128, 0.2), (96, 0.4)])
def test_seer_with_padding_and_several_queries(budget: float, threshold: float | None, tmp_path: Path) -> None:
    """Of the last budget all candidates of a sequence with holes are chosen, whatever the threshold."""
    shape = Shape(kv_heads=1)
    rules = rules_for(shape, tmp_path, replace(RULES, budget=budget))
    assert rules.seer is not None
    rules = replace(rules, seer=replace(rules.seer, threshold=threshold))

    def run(seed: int) -> None:
        valid = with_holes(300)
        valid[0] = True
        valid[0, 32:192] = False  # five pages of padding, and few candidates
        steps = [(stop, valid[:, :stop]) for stop in (270, 271, 277, 278, 289, 300)]
        served(compare_with_oracle(random_pages(shape, 3, 300, seed), rules, steps, method=method_of(rules, tmp_path)))

    without_near_ties(run)


@pytest.mark.parametrize("threshold", [0.02, 0.2])
def test_threshold_of_seer(threshold: float, tmp_path: Path) -> None:
    served(compare_above(threshold, 405, tmp_path))


def test_seer_paged(tmp_path: Path) -> None:
    rules = rules_for(Shape(kv_heads=1), tmp_path)

    def run(seed: int) -> None:
        kv = random_pages(Shape(kv_heads=1), 2, 408, seed)
        driver = compare_with_oracle(
            kv, rules, single_steps(400, 408), method=method_of(rules, tmp_path), gpu_memory=40_000
        )
        assert served(driver).cache.stats().loads > 0

    without_near_ties(run)


def test_seer_by_int8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shape = Shape(kv_heads=2, group=3, key_dim=32, value_dim=16)
    rules = rules_for(shape, tmp_path, gate_dim=32)
    steps = [(250, None), (251, None), (254, None), *((stop, None) for stop in range(255, 265))]
    options: dict[str, Any] = {"budget": 64, "recent_window": 10, "summary_dtype": "int8"}
    compare(monkeypatch, random_pages(shape, 1, 270, 0), steps, method=method_of(rules, tmp_path), **options)


@pytest.mark.parametrize("padded", [False, True])
def test_bisection_that_looks_at_everything(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages wanted are the budget times that, which is more than 32 bits hold."""
    shape, valid = Shape(kv_heads=1, group=2, key_dim=16, value_dim=16), torch.arange(113)[None] >= 21
    steps = [(stop, valid[:, :stop] if padded else None) for stop in (112, 113)]
    options: dict[str, Any] = {"budget": 16, "recent_window": 10, "method": Bisection(rerank_factor=2**60)}
    compare(monkeypatch, random_pages(shape, 1, 113, 0), steps, **options)
