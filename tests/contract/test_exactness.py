"""Exactness: in every mode of `generate` a SpinCache gives what a DynamicCache gives.

float32, CPU. Every family runs in every mode that transformers itself can run it in (`Family.limits` lists the others):

    resident    budget beyond the context, everything fits: attention over all pages
    paged       the same with the smallest `gpu_memory` accepted: pages are evicted and loaded again at every step
    selected    a budget below the context that still covers all candidates: the method selects, and selects all of them

The method is the default one. Some of the last two also run with ShadowKV, whose pages have 8 tokens.

The full product is slow. `make test` runs every mode with three families that differ in their layers, paged and selected with
one. It runs every family in modes that together pad, leave holes, reorder rows, take several tokens at once and crop: in one of
them with all pages resident, in others paged and selected.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from tests.support.all_modes import MODES
from tests.support.compare import Trace, assert_same
from tests.support.families import FAMILIES
from tests.support.memory import SMALL_ZONES, with_tight_gpu_memory
from tests.support.subjects import SpinSubject, dense_subject

# transformers 5.17 copies shared keys while Dynamo traces, so they lose their layer: an error there, see the last test.
COPIES_SHARED_KEYS = Version(transformers.__version__) < Version("5.18")
REFUSED = [("gemma3n_text", "compiled")] if COPIES_SHARED_KEYS else []
RUNNABLE = [
    (family, mode)
    for family, entry in FAMILIES.items()
    for mode in MODES
    if mode not in entry.limits() and (family, mode) not in REFUSED
]
PAGED = [(family, mode) for family, mode in RUNNABLE if FAMILIES[family].paged and mode != "compiled"]
# Selection is the same code for all families but for what these bring: softcap, sinks, shared keys, odd head sizes.
ALL_MODES = ("llama", "gemma2", "gpt_oss", "gemma3n_text", "qwen3_next", "mimo_v2_flash")
FEW_MODES = ("greedy", "beam_search", "left_padding", "holes", "multi_turn", "assisted", "crop")
SELECTED = [(family, mode) for family, mode in PAGED if family in ALL_MODES or mode in FEW_MODES]
SHADOWKV = [
    (family, mode) for family, mode in SELECTED if family == "llama" or (family in ALL_MODES and mode in FEW_MODES)
]

# Full attention alone; windows and shared keys; a recurrent state.
QUICK_FAMILIES = ("llama", "gemma3n_text", "qwen3_next")
QUICK_MODES = ("holes", "beam_search", "crop")


def cases(
    pairs: list[tuple[str, str]],
    families: Collection[str],
    modes: Collection[str],
    slow: Collection[tuple[str, str]] = (),
) -> Any:
    """Parameters of a test: these families in all modes and all families in these modes are quick, but for those in `slow`."""
    return pytest.mark.parametrize(
        ("family", "mode"),
        [
            pytest.param(
                *pair,
                id="-".join(pair),
                marks=() if (pair[0] in families or pair[1] in modes) and pair not in slow else pytest.mark.slow,
            )
            for pair in pairs
        ],
    )


@functools.cache
def expected(family: str, mode: str) -> Trace:
    """The results of DynamicCache."""
    return MODES[mode](dense_subject(family))


def check_caches(subject: SpinSubject) -> None:
    assert subject.caches, "the mode made no cache"
    for cache in subject.caches:
        cache.check_integrity()


@cases(RUNNABLE, QUICK_FAMILIES, ["holes"], slow=[("gemma3n_text", "compiled")])
def test_resident(family: str, mode: str) -> None:
    subject = SpinSubject(family, from_config=mode == "compiled")
    assert_same(MODES[mode](subject), expected(family, mode))
    check_caches(subject)
    for cache in subject.caches:
        stats = cache.stats()
        assert (stats.loads, stats.evictions, stats.hit_rate) == (0, 0, 1.0)
        assert bool(stats.paged_layers) == FAMILIES[family].paged


def _paged(family: str, mode: str, **options: Any) -> None:
    def run(cap: int) -> SpinSubject:
        subject = SpinSubject(family, gpu_memory=cap, **SMALL_ZONES, **options)
        assert_same(MODES[mode](subject), expected(family, mode))
        return subject

    subject = with_tight_gpu_memory(run)
    check_caches(subject)
    stats = [cache.stats() for cache in subject.caches]
    assert sum(each.loads for each in stats) > 0
    assert sum(each.evictions for each in stats) > 0
    assert all(each.cpu_bytes > 0 for each in stats)


@cases(PAGED, ["llama"], ["crop"])
def test_paged(family: str, mode: str) -> None:
    _paged(family, mode)


@cases([(family, mode) for family, mode in SHADOWKV if family == "llama"], [], QUICK_MODES)
def test_paged_with_shadowkv(family: str, mode: str) -> None:
    _paged(family, mode, method="shadowkv")


def _selected(family: str, mode: str, **options: Any) -> None:
    """Candidates are at most context - sinks - window = 124 - 68 tokens here, so a budget of 56 selects all of them."""
    subject = SpinSubject(family, budget=56, num_sink_tokens=4, recent_window=64, **options)
    assert_same(MODES[mode](subject), expected(family, mode))
    check_caches(subject)
    assert any(cache.stats().sparse_queries for cache in subject.caches)


@cases(SELECTED, ["llama"], ["beam_search"])
def test_selected(family: str, mode: str) -> None:
    _selected(family, mode)


@cases(SHADOWKV, [], ["beam_search", "crop"])
def test_selected_with_shadowkv(family: str, mode: str) -> None:
    _selected(family, mode, method="shadowkv")


@cases(REFUSED, [], MODES)
def test_refused(family: str, mode: str) -> None:
    """What would be silently wrong with this version of transformers is an error."""
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"AttentionError.*torch\.compile"):
        MODES[mode](SpinSubject(family, from_config=mode == "compiled"))
