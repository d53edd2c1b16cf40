"""Captured steps that caches of one model take over from each other, with a fake graph.

The fake runs the layers of the cache that replays. So these tests show which kernels and graphs a cache uses, and that their
buffers say what its own would; tests/gpu/test_shared_steps.py shows that a real graph finds everything by descriptors.
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_hf import SpinCache
from spin_hf.backends import backend_set, kernel_pool
from spin_hf.errors import CapacityError
from tests.support.clustering_methods import little_slack
from tests.support.graph_recorder import FakeRecorder, capture_on_cpu, eagerly
from tests.support.inspection import counted_by_kernels, forward_of, kernels_of
from tests.support.seer_gates import gates_for
from tests.support.zoo import PAD_TOKEN_ID, build_model, random_tokens

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu captures graphs"),
]

PROMPT, STEPS = 41, 4
OPTIONS: dict[str, Any] = {"method": "shadowkv", "budget": 16, "recent_window": 8}
IDS = random_tokens(2, PROMPT + 8 * STEPS, seed=3)


@pytest.fixture(autouse=True)
def _captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    capture_on_cpu(monkeypatch)
    with little_slack():
        yield


def _model(family: str = "llama") -> Any:
    model = build_model(family).eval()
    if family == "llama":
        del model.model.layers[2:]  # interpreted kernels are slow
        model.config.num_hidden_layers = 2
    return model


@torch.no_grad()
def _feed(model: Any, cache: SpinCache, start: int, count: int, ids: torch.Tensor = IDS, **inputs: Any) -> torch.Tensor:
    """Logits of `count` steps of one token behind `start`."""
    steps = (ids[:, at : at + 1] for at in range(start, start + count))
    return torch.cat([model(step, past_key_values=cache, **inputs).logits for step in steps], 1)


@torch.no_grad()
def _read(model: Any, ids: torch.Tensor = IDS, **options: Any) -> SpinCache:
    cache = SpinCache(model, **OPTIONS | options)
    model(ids[:, :PROMPT], past_key_values=cache)
    return cache


def _graphs(cache: SpinCache) -> int:
    assert cache.calls.steps is not None
    return sum(step is not None for step in cache.calls.steps.captured.values())


MODES: dict[str, dict[str, Any]] = {
    "shadowkv": {},
    "tiered": {"gpu_memory": "60kB"},
    "bisection": {"method": "bisection"},
    "quest": {"method": "quest"},
    "fraction": {"budget": 0.25},
}


@pytest.mark.sweep(keep=[0, 2])
@pytest.mark.parametrize("mode", MODES)
def test_the_second_cache_is_replayed_from_its_first_step(mode: str) -> None:
    model, options = _model(), MODES[mode]
    other = IDS.flip(1)
    with eagerly(model):
        alone = _read(model, other, **options)
        expected = _feed(model, alone, PROMPT, STEPS, other)
    first = _read(model, **options)
    _feed(model, first, PROMPT, 3)
    before, graphs = FakeRecorder.replays, _graphs(first)
    second = _read(model, other, **options)
    actual = _feed(model, second, PROMPT, STEPS, other)
    assert FakeRecorder.replays == before + STEPS
    assert graphs == _graphs(second) == 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    second.check_integrity()
    stats, counted = second.stats(), alone.stats()
    assert (stats.sparse_queries, stats.attended_tokens) == (counted.sparse_queries, counted.attended_tokens)
    assert first.stats().sparse_queries == 3 * 2 * 2 * 2  # steps, layers, sequences, KV heads


def test_another_cache_has_seen_another_model() -> None:
    """In between: as a reference model that is the same model with its adapter disabled. The first cache gets its kernels back.

    Their graph then belongs to weights that the model has no longer, while the first cache finds the model unchanged.
    """
    model = _model()
    first = _read(model)
    _feed(model, first, PROMPT, 3)
    (kernels,), weight = kernels_of(first), model.lm_head.weight
    model.lm_head.weight = torch.nn.Parameter(weight.detach() * 2)
    second = _read(model)
    _feed(model, second, PROMPT, 3)
    assert kernels_of(second) == [kernels]
    del second
    gc.collect()
    model.lm_head.weight = weight
    before = FakeRecorder.replays
    _feed(model, first, PROMPT + 3, 1)
    assert kernels_of(first) == [kernels]
    assert FakeRecorder.replays == before  # eager: the graphs are gone
    _feed(model, first, PROMPT + 4, 2)
    assert FakeRecorder.replays == before + 2


@pytest.mark.parametrize("padded", [False, True])
def test_caches_in_turn_have_kernels_of_their_own(padded: bool) -> None:
    """The one that has lost its kernels makes new ones at its next step, and loses them no more."""
    model, inputs = _model(), {}
    ids = IDS.clone()
    if padded:
        ids[0, :11] = PAD_TOKEN_ID
    prompts, caches = (ids, ids.flip(0)), []
    with eagerly(model):
        expected = [_feed(model, _padded(model, each, padded), PROMPT, 6, each, **inputs) for each in prompts]
    actual: list[list[torch.Tensor]] = [[], []]
    caches = [_padded(model, each, padded) for each in prompts]
    kernels = []
    for at in range(PROMPT, PROMPT + 6):
        for index, cache in enumerate(caches):
            actual[index].append(_feed(model, cache, at, 1, prompts[index]))
            kernels.append(kernels_of(cache)[0])
    assert len(set(kernels)) == 2
    assert kernels[-2:] * 2 == kernels[-4:]
    for logits, alone in zip(actual, expected, strict=True):
        torch.testing.assert_close(torch.cat(logits, 1), alone, rtol=0, atol=1e-4)
    for cache in caches:
        cache.check_integrity()


@torch.no_grad()
def _padded(model: Any, ids: torch.Tensor, padded: bool) -> SpinCache:
    cache = SpinCache(model, **OPTIONS)
    mask = (ids[:, :PROMPT] != PAD_TOKEN_ID).long() if padded else None
    model(ids[:, :PROMPT], past_key_values=cache, attention_mask=mask)
    return cache


def test_a_cache_that_goes_on_counts_on() -> None:
    """Counters and clock hands of a cache follow it from kernels to kernels."""
    model = _model()
    first = _read(model, gpu_memory="60kB")
    undisturbed = deepcopy(first)
    expected = torch.cat([_feed(model, undisturbed, at, 1) for at in range(PROMPT, PROMPT + 6)], 1)
    actual = [_feed(model, first, PROMPT, 3)]
    _feed(model, _read(model, gpu_memory="60kB"), PROMPT, 2)
    actual.append(_feed(model, first, PROMPT + 3, 3))
    torch.testing.assert_close(torch.cat(actual, 1), expected, rtol=0, atol=1e-4)
    stats, expected_stats = first.stats(), undisturbed.stats()
    assert (stats.attended_tokens, stats.sparse_queries) == (
        expected_stats.attended_tokens,
        expected_stats.sparse_queries,
    )
    assert stats.loads > 0
    first.check_integrity()


def test_counts_are_kept_where_kernels_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """For another batch size; a step is tried twice before there is room."""
    model = _model()
    cache = _read(model)
    _feed(model, cache, PROMPT, 3)
    held, ids = counted_by_kernels(cache), IDS.repeat_interleave(2, 0)
    cache.batch_repeat_interleave(2)

    def no_room(*args: Any) -> None:
        raise CapacityError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(backend_set, "StepKernels", no_room)
        for _ in range(2):
            with pytest.raises(CapacityError, match="no room"):
                _feed(model, cache, PROMPT + 3, 1, ids)
            assert counted_by_kernels(cache) == held
    _feed(model, cache, PROMPT + 3, 1, ids)
    assert counted_by_kernels(cache)["QUERIES"] == held["QUERIES"] * 5 // 3  # four sequences instead of two


def test_what_a_graph_depends_on_is_not_shared() -> None:
    model = _model()
    first = _read(model)
    _feed(model, first, PROMPT, 3)
    other: dict[str, Any]
    for other in (
        {"budget": 20},
        {"num_sink_tokens": 8},
        {"recent_window": 16},
        {"dense_below": 30},
        {"method": "quest"},
    ):
        cache = _read(model, **other)
        _feed(model, cache, PROMPT, 1)
        assert kernels_of(cache) != kernels_of(first), other
    quantized = _read(model, summary_dtype="int8")  # the same buffers, other launches
    before = FakeRecorder.replays
    _feed(model, quantized, PROMPT, 2)
    assert FakeRecorder.replays == before + 1
    alone = _read(_model())
    assert kernels_of(alone) != kernels_of(first)


def test_gates_that_were_trained_anew_are_not_the_old_ones(tmp_path: Path) -> None:
    """Of methods that are equal, as their gates have the same path. A graph holds the addresses of gates."""
    model = _model()
    methods = [gates_for(model, tmp_path, seed=seed) for seed in (0, 1)]
    assert methods[0] == methods[1]
    gates_for(model, tmp_path, seed=0)
    first = _read(model, method=methods[0], budget=64)
    _feed(model, first, PROMPT, 3)
    gates_for(model, tmp_path, seed=1)
    with eagerly(model):
        expected = _feed(model, _read(model, method=methods[1], budget=64), PROMPT, 3)
    second = _read(model, method=methods[1], budget=64)
    torch.testing.assert_close(_feed(model, second, PROMPT, 3), expected, rtol=0, atol=1e-4)
    assert kernels_of(second) != kernels_of(first)


def test_a_busy_cache_keeps_its_kernels() -> None:
    model = _model()
    first = _read(model)
    _feed(model, first, PROMPT, 2)
    held, second = kernels_of(first), []
    with forward_of(first).backends.forward():  # as in another thread
        second.append(_read(model))
        _feed(model, second[0], PROMPT, 1)
        assert kernels_of(first) == held
    assert kernels_of(second[0]) != held


def test_a_cache_that_ends_leaves_kernels_and_no_memory() -> None:
    model = _model()
    first = _read(model)
    _feed(model, first, PROMPT, 3)
    (kernels,), store = kernels_of(first), weakref.ref(first.layers[0].store)
    del first
    gc.collect()
    assert store() is None
    assert kernels.binding.owner is None
    second = _read(model)
    before = FakeRecorder.replays
    _feed(model, second, PROMPT, 2)
    assert FakeRecorder.replays == before + 2
    assert kernels_of(second) == [kernels]
    caches = [_read(model, budget=20 + 4 * index) for index in range(kernel_pool._MOST_IDLE + 3)]
    ended = [weakref.ref(kernels_of(cache)[0]) for cache in caches]
    del caches
    gc.collect()
    _feed(model, _read(model, budget=100), PROMPT, 1)
    gc.collect()
    assert sum(each() is not None for each in ended) <= kernel_pool._MOST_IDLE


def test_a_model_that_ends_takes_its_pool_along() -> None:
    model = _model()
    cache = _read(model)
    _feed(model, cache, PROMPT, 3)
    pool, gone = weakref.ref(forward_of(cache).backends.pool), weakref.ref(model)
    del cache
    gc.collect()
    assert pool() is not None
    del model
    gc.collect()
    assert gone() is None
    assert pool() is None


def test_a_changed_model_drops_the_graphs_of_all_caches() -> None:
    model = _model()
    first = _read(model)
    _feed(model, first, PROMPT, 3)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    second = _read(model)
    with eagerly(model):
        expected = _feed(model, _read(model), PROMPT, 3)
    before = FakeRecorder.replays
    torch.testing.assert_close(_feed(model, second, PROMPT, 3), expected, rtol=0, atol=1e-4)
    assert FakeRecorder.replays == before + 2  # the first step of the changed model is eager


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next"])
def test_windows_and_linear_states_are_those_of_each_cache(family: str) -> None:
    """A graph has one set of tensors for them."""
    model = _model(family)
    prompts = [random_tokens(1, PROMPT + 12, seed=seed) for seed in (3, 4, 5)]
    with eagerly(model):
        expected = [_feed(model, _read(model, each), PROMPT, 6, each) for each in prompts]
    first = _read(model, prompts[0])
    actual = [[_feed(model, first, PROMPT, 3, prompts[0])]]
    before = FakeRecorder.replays
    second = _read(model, prompts[1])
    actual.append([_feed(model, second, PROMPT, 3, prompts[1])])
    assert FakeRecorder.replays == before + 3
    third = second.fork()
    third.reset()
    with torch.no_grad():
        model(prompts[2][:, :PROMPT], past_key_values=third)
    actual.append([_feed(model, third, PROMPT, 3, prompts[2])])
    for number, cache in enumerate((first, second, third)):  # each lost its kernels, or did not
        actual[number].append(_feed(model, cache, PROMPT + 3, 3, prompts[number]))
    for logits, alone in zip(actual, expected, strict=True):
        torch.testing.assert_close(torch.cat(logits, 1), alone, rtol=0, atol=1e-4)


def test_windows_after_a_change_of_the_batch() -> None:
    """The kernels for the old batch serve another cache, while this one lives on."""
    model = _model("gemma3_text")
    ids = random_tokens(2, PROMPT + 12, seed=6)
    with eagerly(model):
        expected = _feed(model, _read(model, ids), PROMPT, 7, ids)
    first = _read(model, ids)
    _feed(model, first, PROMPT, 3, ids)
    first.batch_select_indices(torch.tensor([1]))
    _feed(model, _read(model, ids.flip(1)), PROMPT, 3, ids.flip(1))
    torch.testing.assert_close(_feed(model, first, PROMPT + 3, 4, ids[1:]), expected[1:, 3:], rtol=0, atol=1e-4)


def test_forks_and_copies_are_replayed_at_once() -> None:
    model = _model()
    document = _read(model)
    with eagerly(model):
        expected = _feed(model, _read(model), PROMPT, STEPS)
    _feed(model, document.fork(), PROMPT, 3)
    for make in (document.fork, lambda: deepcopy(document), document.fork):
        before, twin = FakeRecorder.replays, make()
        torch.testing.assert_close(_feed(model, twin, PROMPT, STEPS), expected, rtol=0, atol=1e-4)
        assert FakeRecorder.replays == before + STEPS
        twin.check_integrity()
    document.check_integrity()


@pytest.mark.parametrize("change", ["weight", "module"])
def test_weights_that_a_model_has_lost_are_freed(change: str) -> None:
    """Also while no cache lives to notice the change."""
    model = _model()
    cache = _read(model)
    _feed(model, cache, PROMPT, 3)
    old = weakref.ref(model.lm_head.weight)
    del cache
    gc.collect()
    if change == "weight":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    else:
        model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    gc.collect()
    assert old() is None
    with eagerly(model):
        expected = _feed(model, _read(model), PROMPT, 3)
    torch.testing.assert_close(_feed(model, _read(model), PROMPT, 3), expected, rtol=0, atol=1e-4)
