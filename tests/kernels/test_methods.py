"""The interpreted kernels of other methods against their oracle, and with int8 summaries against the reference."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from spin_hf import Quest

from ..attention.conversation import play, random_world, single_steps, without_near_ties
from ..attention.oracle import Rules
from ..cache.tiny import Driver, Shape, World, poisoned_memory
from .test_decode import _interpret

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]

QUEST = Rules(budget=32, num_sink_tokens=4, recent_window=10, quest=True)


@pytest.fixture(autouse=True)
def _kernels_in_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    _interpret(monkeypatch)
    with poisoned_memory():
        yield


def served(driver: Driver) -> Driver:
    """`driver`, whose cache the kernels served."""
    assert driver.cache._shared.counted()["QUERIES"] == driver.cache.stats().sparse_queries > 0
    return driver


def with_holes(length: int) -> torch.Tensor:
    """Left padding, a long hole, and many short ones: [3, length]."""
    valid = torch.ones((3, length), dtype=torch.bool)
    valid[0, 33:90], valid[1, : length - 40 : 3], valid[2, :41] = False, False, False
    return valid


@pytest.mark.parametrize(
    ("shape", "dense_layers", "prompt"),
    [(Shape(group=3), 0, 150), (Shape(layers=2, kv_heads=1), 1, 95), (Shape(kv_heads=1), 0, 33)],
)
def test_quest(shape: Shape, dense_layers: int, prompt: int) -> None:
    """Through pages that the steps complete, which become candidates."""

    def run(seed: int) -> None:
        world, rules = random_world(shape, 2, prompt + 20, seed), replace(QUEST, dense_layers=dense_layers)
        served(play(world, rules, single_steps(prompt, prompt + 20)))

    without_near_ties(run)


@pytest.mark.parametrize("budget", [32, 0.3])
def test_quest_with_padding_and_several_queries(budget: float) -> None:
    def run(seed: int) -> None:
        valid, rules = with_holes(180), replace(QUEST, budget=budget, dense_layers=1)
        steps = [(stop, valid[:, :stop]) for stop in (160, 161, 165, 166, 180)]
        served(play(random_world(Shape(layers=2, kv_heads=1), 3, 180, seed), rules, steps))

    without_near_ties(run)


def test_quest_paged() -> None:
    """The layer that attends to everything reads more pages than there are frames."""

    def run(seed: int) -> None:
        world, rules = random_world(Shape(layers=2, kv_heads=1), 1, 190, seed), replace(QUEST, dense_layers=1)
        driver = served(play(world, rules, single_steps(180, 190), gpu_memory=22_000))
        stats, (whole, chosen) = driver.cache.stats(), driver.cache._shared.layers
        assert 0 < chosen.store.frames.num_slots < 180 // 16
        assert stats.loads > 10 * (180 // 16 - whole.store.frames.num_slots)
        assert stats.evictions > 0

    without_near_ties(run)


def compare(monkeypatch: pytest.MonkeyPatch, world: World, steps: list[tuple[int, Any]], **options: Any) -> None:
    """Kernels and reference attend to the same."""
    drivers = [Driver(world.shape, **options) for _ in range(2)]
    start = 0
    for stop, valid in steps:
        ours = drivers[0].step(world, start, stop, valid)
        with monkeypatch.context() as patch:
            patch.setattr("spin_hf.kernels.launchers", lambda device: None)
            expected = drivers[1].step(world, start, stop, valid)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        start = stop
    stats, reference = served(drivers[0]).cache.stats(), drivers[1].cache.stats()
    assert (stats.sparse_queries, stats.attended_tokens) == (reference.sparse_queries, reference.attended_tokens)
    drivers[0].cache.check_integrity()


def test_quest_by_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(kv_heads=2, group=3, key_dim=32, value_dim=16)
    steps = [(160, None), (161, None), (164, None), *((stop, None) for stop in range(165, 180))]
    options: dict[str, Any] = {"budget": 48, "recent_window": 10, "summary_dtype": "int8"}
    compare(monkeypatch, random_world(shape, 1, 180, 0), steps, method=Quest(0), **options)
