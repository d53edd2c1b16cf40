"""Clustered pages give what DynamicCache gives, in every mode of `generate`.

Zones and spans are small: prompts of 40 tokens are clustered before the first token is decoded, and two or three times more as
they grow.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest

from spin_hf import Bisection, Fitted, Method, RetroInfer
from spin_hf.indexing import cluster
from tests.support.all_modes import MODES
from tests.support.clustering_methods import Clumped, clustering_often, little_slack
from tests.support.compare import Trace, assert_same
from tests.support.memory import SMALL_ZONES, with_tight_gpu_memory
from tests.support.subjects import SpinSubject, dense_subject

FAMILIES = ("llama", "gemma2", "gpt_oss", "gemma3n_text")
FEW_MODES = ("greedy", "holes", "beam_search", "crop", "mask_4d")
CASES = [(family, mode) for family in FAMILIES for mode in MODES if family == "llama" or mode in FEW_MODES]
LOADING = [mode for mode in MODES if mode != "compiled"]


SmallRetroInfer = clustering_often(RetroInfer, 64, 24)
SmallBisection = clustering_often(Bisection, 64, 24)
SmallFitted = clustering_often(Fitted, 64, 24)


@pytest.fixture(autouse=True)
def spans() -> Iterator[list[int]]:
    """The spans that were clustered: where each ended."""
    made: list[int] = []
    add = cluster._add_spans

    def adding(state: Any, method: Any, stops: list[int], may_move: Any, *more: Any) -> None:
        made.extend(stops)
        assert bool(may_move.any())
        add(state, method, stops, may_move, *more)

    with little_slack(), patch.object(cluster, "_add_spans", adding):
        yield made


@functools.cache
def expected(family: str, mode: str) -> Trace:
    return MODES[mode](dense_subject(family))


def check(subject: SpinSubject, spans: list[int]) -> None:
    assert spans
    for cache in subject.caches:
        cache.check_integrity()


@pytest.mark.sweep
@pytest.mark.parametrize(("family", "mode"), CASES)
def test_everything_attended_to(family: str, mode: str, spans: list[int]) -> None:
    subject = SpinSubject(family, method=Clumped(), **SMALL_ZONES)
    assert_same(MODES[mode](subject), expected(family, mode))
    check(subject, spans)


@pytest.mark.parametrize("mode", LOADING)
def test_everything_selected(mode: str, spans: list[int]) -> None:
    """A budget below the context that still covers all candidates: the method selects, and selects all."""
    subject = SpinSubject("llama", method=Clumped(), budget=110, num_sink_tokens=4, recent_window=16)
    assert_same(MODES[mode](subject), expected("llama", mode))
    check(subject, spans)


@pytest.mark.sweep
@pytest.mark.parametrize("mode", [*FEW_MODES, "assisted", "multi_turn", "from_cache", "left_padding", "compiled"])
@pytest.mark.parametrize("budget", [110, 1 << 20])
@pytest.mark.parametrize("method", [SmallRetroInfer(), SmallBisection(), SmallFitted()], ids=lambda method: method.name)
def test_methods_that_estimate(method: Method, mode: str, budget: int, spans: list[int]) -> None:
    """With room for everything nothing is left to be estimated."""
    subject = SpinSubject("llama", method=method, budget=budget, num_sink_tokens=4, recent_window=16)
    assert_same(MODES[mode](subject), expected("llama", mode))
    check(subject, spans)


@pytest.mark.parametrize("mode", LOADING)
def test_paged(mode: str, spans: list[int]) -> None:
    def run(cap: int) -> SpinSubject:
        spans.clear()
        subject = SpinSubject("llama", method=Clumped(), gpu_memory=cap, **SMALL_ZONES)
        assert_same(MODES[mode](subject), expected("llama", mode))
        return subject

    subject = with_tight_gpu_memory(run)
    check(subject, spans)
    assert sum(cache.stats().evictions for cache in subject.caches) > 0
