"""`SpinCache.fork`: an independent continuation that shares pages until one side writes them.

A fork and its original go on with other tokens. At full budget both equal copies of a DynamicCache that do the same. At a
sparse budget both equal deep copies. Memory of forks is in `test_memory_of_forks.py`, random histories in tests/differential.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_hf import Bisection, Fitted, OptionError, OptionTypeError, Quest, RetroInfer, ShadowKV, SpinCache
from tests.support.cache_driver import CacheDriver, RandomKV, poisoned_memory
from tests.support.clustering_methods import Clumped, clustering_often, little_slack
from tests.support.compare import Trace, assert_same
from tests.support.forks import SHAPE, TIERS, document, sparse_family
from tests.support.inspection import state_of
from tests.support.memory import SMALL_ZONES
from tests.support.runs import advance, decode, generate
from tests.support.seer_gates import gates_for
from tests.support.subjects import SpinSubject, Subject, dense_subject
from tests.support.zoo import build_model, left_padded, random_tokens, subject_model

FAMILIES = ["llama", "gemma3_text", "gpt_oss", "qwen3_next", "gemma3n_text", "deepseek_v3"]
METHODS: dict[str, Any] = {
    "shadowkv": ShadowKV(), "quest": Quest(), "bisection": clustering_often(Bisection, 64, 24)(),
    "retroinfer": clustering_often(RetroInfer, 64, 24)(), "clusters": Clumped(), "fitted": clustering_often(Fitted, 64, 24)(),
}  # fmt: skip


def copy_of(cache: Any) -> Any:
    return cache.fork() if isinstance(cache, SpinCache) else copy.deepcopy(cache)


# ------------------------------------------------------------------------------------------------ against a DynamicCache


def continued(subject: Subject, between: Callable[[], None]) -> Trace:
    """One prompt that goes on in three ways, in turns; the third way begins from the second."""
    trace, cache = Trace(), subject.new()
    ids, mask = left_padded([61, 50])
    token = advance(subject, cache, ids, trace, "prompt", mask.bool(), attention_mask=mask)
    runs = [(cache, token, mask), (copy_of(cache), token, mask)]
    for turn in range(3):
        for number, (held, token, mask) in enumerate(runs):
            new = random_tokens(2, [1, 7, 20][turn], seed=10 * turn + number)
            mask = torch.cat([mask, torch.ones_like(new)], 1)
            token = advance(subject, held, new, trace, f"run {number}, turn {turn}", attention_mask=mask)
            for step in range(4):
                trace.add_tokens(f"run {number}, turn {turn}, step {step}", token)
                mask = torch.cat([mask, torch.ones_like(token)], 1)
                token = advance(subject, held, token, trace, f"run {number}, {turn}, {step}", attention_mask=mask)
            runs[number] = held, token, mask
            between()
        if turn == 0:
            runs.append((copy_of(runs[1][0]), *runs[1][1:]))
    return trace


@pytest.mark.sweep
@pytest.mark.parametrize("tier", [{}, {"gpu_memory": "90kB"}], ids=["resident", "tiered"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_sides_equal_dynamic_caches(family: str, tier: dict[str, Any]) -> None:
    with poisoned_memory():
        subject = SpinSubject(family, **SMALL_ZONES, **tier)
        ours = continued(subject, lambda: [cache.check_integrity() for cache in subject.caches] and None)
    assert_same(ours, continued(dense_subject(family), lambda: None))


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_from_forks_of_a_prefix(family: str) -> None:
    """One document, three questions; the document's cache stays as it was and is asked last."""
    subject, oracle = SpinSubject(family), dense_subject(family)
    traces = []
    for side in (subject, oracle):
        trace, document = Trace(), side.new()
        prefix = random_tokens(1, 53)
        advance(side, document, prefix, trace, "prefix")
        for question in range(3):
            ids = torch.cat([prefix, random_tokens(1, 9 - question, seed=question + 1)], dim=1)
            held = document if question == 2 else copy_of(document)
            trace.add_generated(f"question {question}", generate(side, ids, held, new_tokens=9))
            assert question == 2 or document.get_seq_length() == 53
        traces.append(trace)
    assert_same(*traces)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma3n_text", "deepseek_v3"])
def test_from_one_sequence_to_a_batch(family: str) -> None:
    subject, oracle = SpinSubject(family), dense_subject(family)
    traces = []
    for side in (subject, oracle):
        trace, document = Trace(), side.new()
        advance(side, document, random_tokens(2, 53), trace, "document")
        if side is subject:
            batch = document.fork(num_sequences=3)
        else:
            batch = copy.deepcopy(document)
            batch.batch_repeat_interleave(3)
        token = advance(side, batch, random_tokens(6, 4, seed=1), trace, "questions")
        decode(side, batch, token, trace, "answers", 9)
        decode(side, document, random_tokens(2, 1, seed=2), trace, "the document", 5)
        traces.append(trace)
    assert_same(*traces)


# ------------------------------------------------------------------------------------------------- against a deep copy


@pytest.mark.sweep
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("method", METHODS)
def test_sparse_steps_equal_those_of_deep_copies(method: str, tier: str) -> None:
    """Every operation, on either side, in turn. All caches are checked after each."""
    with poisoned_memory(), little_slack():
        caches = sparse_family(METHODS[method], **TIERS[tier])
        caches.pairs[0].append(270, 0, rows=2)
        assert caches.fork(0)
        for turn, (name, *arguments) in enumerate(
            [
                ("append", 1), ("append", 40), ("crop", -3), ("append", 9), ("crop", -60), ("append", 30), ("append", 1),
                ("reorder_cache", torch.tensor([1, 0])), ("append", 1), ("reorder_cache", torch.tensor([0, 0])), ("append", 3),
                ("batch_select_indices", torch.tensor([1])), ("append", 2), ("batch_repeat_interleave", 2), ("append", 1),
                ("release_gpu_memory",), ("append", 1), ("crop", -200), ("append", 100), ("append", 1), ("reset",),
                ("append", 40), ("append", 1),
            ]
        ):  # fmt: skip
            for number, pair in enumerate(list(caches.pairs)):
                seed = 100 * turn + number
                did = pair.append(*arguments, seed) if name == "append" else pair.on_cache(name, *arguments)
                assert did, f"{name}{arguments} was refused"
                caches.check()
            if turn == 5:
                assert caches.fork(1)
        while len(caches.pairs) > 1:
            caches.end(0)
            caches.check()
            caches.pairs[0].append(1, len(caches.pairs))
            caches.check()


def test_seer_attention(tmp_path: Path) -> None:
    """Its gates are shared, its summaries are not."""
    model = build_model("llama")
    ids = random_tokens(2, 150)
    options = dict(budget=32, num_sink_tokens=4, recent_window=16)
    cache = SpinCache(model, gates_for(model, tmp_path), **options)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        fork = cache.fork()
        mirrors = copy.deepcopy(cache), copy.deepcopy(fork)
        for seed in range(4):
            for side, (held, mirror) in enumerate(zip((cache, fork), mirrors, strict=True)):
                new = random_tokens(2, 3, seed=2 * seed + side)
                assert torch.equal(model(new, past_key_values=held).logits, model(new, past_key_values=mirror).logits)
                held.check_integrity()


def test_padding_that_changes_on_one_side() -> None:
    """Pages whose tokens turn to padding are copied first, in clusters too."""
    for method in METHODS.values():
        with poisoned_memory(), little_slack():
            caches = sparse_family(method)
            caches.pairs[0].append(200, 0, rows=2)
            caches.pairs[0].append(1, 1)
            caches.fork(0)
            for side in (0, 1):
                pair = caches.pairs[side]
                valid = torch.ones((2, pair.length + 1), dtype=torch.bool)
                valid[side, 40 + 30 * side : 60 + 30 * side] = False
                assert pair.append(1, 2, valid)
                caches.check()
                valid = torch.nn.functional.pad(valid, (0, 1), value=True)
                assert pair.append(1, 3, valid)
                caches.check()


@pytest.mark.parametrize("method", METHODS)
def test_one_side_goes_to_the_cpu_tier(method: str) -> None:
    """Its pages become int8, and its summaries those of int8 pages. The other side keeps its own."""
    with poisoned_memory(), little_slack():
        driver = CacheDriver(
            SHAPE, method=METHODS[method], budget=16, **SMALL_ZONES, gpu_memory=180_000, cpu_dtype="int8"
        )
        kv = RandomKV.random(SHAPE, 1, 700, 0)
        driver.step(kv, 0, 200)
        driver.step(kv, 200, 201)
        fork, mirror = copy.copy(driver), copy.copy(driver)
        fork.cache, mirror.cache = driver.cache.fork(), copy.deepcopy(driver.cache)
        fork.step(kv, 201, 600)
        fork.step(kv, 600, 601)
        assert fork.cache.stats().cpu_bytes > driver.cache.stats().cpu_bytes == 0
        sequences = state_of(fork.cache).sequences
        assert len(sequences.refcounts) <= sequences.segments_in_use + 1, (
            "pages were copied before they were converted, or again after that"
        )
        for cache in (driver.cache, fork.cache):
            cache.check_integrity()
        for stop in range(202, 240):
            assert torch.equal(driver.step(kv, stop - 1, stop)[0], mirror.step(kv, stop - 1, stop)[0])
        driver.cache.check_integrity()


@pytest.mark.sweep
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("method", ["bisection", "retroinfer", "clusters", "fitted"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_crop_into_clusters_on_one_side(method: str, tier: str, side: int) -> None:
    """It puts tokens back in order, in copies of the pages."""
    with poisoned_memory(), little_slack():
        caches = sparse_family(METHODS[method], **TIERS[tier])
        caches.pairs[0].append(270, 0)
        for step in range(4):
            caches.pairs[0].append(1, step)
        caches.fork(0)
        other = caches.pairs[1 - side]
        other.append(1, 5)
        before = state_of(other.cache).sequences.spans.num_pages
        assert before > 20
        caches.pairs[side].on_cache("crop", -150)
        caches.check()
        for step in range(10):
            other.append(1, 10 + step)
            caches.check()
        assert state_of(other.cache).sequences.spans.num_pages >= before


def test_chains_and_trees() -> None:
    """Forks of forks, of which ancestors end first, last and in between."""
    for order in ([0, 0, 0, 0], [0, 1, 0, 0], [3, 2, 1, 0]):
        with poisoned_memory():
            caches = sparse_family(ShadowKV())
            caches.pairs[0].append(300, 0)
            for depth in range(3):
                caches.fork(len(caches.pairs) - 1)  # of the newest
                caches.pairs[-1].append(70, depth)
                caches.check()
            caches.fork(1)
            for index in order:
                caches.end(index)
                for number, pair in enumerate(caches.pairs):
                    pair.on_cache("crop", -20)
                    pair.append(45, number)
                    caches.check()


# ------------------------------------------------------------------------------------------------------------- the rest


def test_an_empty_cache() -> None:
    """Its fork is another empty cache; one that was reset gives up its memory to the other side."""
    driver = CacheDriver(SHAPE)
    other = copy.copy(driver)
    other.cache = driver.cache.fork(4)
    kv = RandomKV.random(SHAPE, 1, 40, 0)
    assert torch.equal(driver.step(kv, 0, 40)[0], other.step(kv, 0, 40)[0])
    for cache in (driver.cache, other.cache):
        cache.reset()
        fork = cache.fork()
        assert fork.get_seq_length() == 0
        fork.check_integrity()


@pytest.mark.parametrize("number", [0, -1, 1.5, "2"])
def test_numbers_of_sequences_that_are_none(number: Any) -> None:
    cache = CacheDriver(SHAPE).cache
    with pytest.raises((OptionError, OptionTypeError), match="num_sequences: expected"):
        cache.fork(number)


def test_counters_go_on() -> None:
    driver = document(gpu_memory=400_000)
    assert driver.cache.fork().stats().loads == driver.cache.stats().loads > 0


def test_in_inference_mode() -> None:
    """Made within, used without, and the other way round."""
    model, ids = subject_model("qwen3_next"), random_tokens(1, 60)
    expected: list[Tensor] = []
    for first, second in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        cache = SpinCache(model)
        with first():
            model(ids, past_key_values=cache)
            fork = cache.fork()
        with second():
            expected += [model(ids[:, :5], past_key_values=held).logits for held in (fork, cache)]
        fork.check_integrity()
    for logits in expected:
        torch.testing.assert_close(logits, expected[0])


def test_an_interrupted_forward_is_rolled_back_first() -> None:
    model, ids = subject_model("llama"), random_tokens(1, 60)
    cache = SpinCache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    state_of(cache).sequences.begin(1, 3, None)  # a step that no layer has seen
    fork = cache.fork()
    assert fork.get_seq_length() == cache.get_seq_length() == 60
    fork.check_integrity()
