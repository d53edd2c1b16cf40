"""All ways of `generate` for all families: the long run.

`test_generation.py` explains the comparison, and has greedy runs with a tight `gpu_memory`.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.generate_ways import FULL, RUNS, SMALL, assert_same, expected, smallest, with_spin

pytestmark = pytest.mark.slow

each_run = pytest.mark.parametrize(("name", "way"), [pytest.param(*run, id="-".join(run)) for run in RUNS])
other_runs = pytest.mark.parametrize(
    ("name", "way"), [pytest.param(*run, id="-".join(run)) for run in RUNS if run[1] != "greedy"]
)


@each_run
def test_untiered(name: str, way: str) -> None:
    ours, caches = with_spin(name, way, **FULL)
    assert_same(ours, expected(name, way))
    for cache in caches:
        cache.check_integrity()


@other_runs
def test_tiered(name: str, way: str) -> None:
    ours, caches = with_spin(name, way, gpu_memory=smallest(name, way, **FULL), **FULL)
    assert_same(ours, expected(name, way))
    for cache in caches:
        cache.check_integrity()
        assert cache.stats().evictions, "nothing was evicted: the cap was not tight"


METHODS = ("bisection", "shadowkv", "retroinfer", "quest", "fitted")


@pytest.mark.parametrize(
    ("name", "way", "method"),
    [pytest.param(*run, METHODS[i % 4], id="-".join((*run, METHODS[i % 4]))) for i, run in enumerate(RUNS)],
)
def test_small_budgets(name: str, way: str, method: str) -> None:
    """Finite logits of the right shapes, with room for all pages and with almost none."""
    options = dict(SMALL, method=method)
    for more in ({}, {"gpu_memory": smallest(name, way, **options)}):
        ours, caches = with_spin(name, way, **options, **more)
        for mine, other in zip(ours, expected(name, way), strict=True):
            assert all(bool(torch.isfinite(logits).all()) for logits in mine.logits)
            assert len(mine.logits) == len(other.logits) or way == "lookup"
            assert mine.logits[0].shape == other.logits[0].shape
            assert mine.sequences.shape == other.sequences.shape
        for cache in caches:
            cache.check_integrity()
