"""Memory that runs out around a captured step, with a fake graph: the step is rolled back, and the next attempt is right.

The host's share of a step allocates little (descriptors, scratch that grows, copies of outputs), and the model's allocations
belong to the capture. Each of these is a point here. An error after the last layer of an eager forward is detected as well.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from typing import Any

import pytest
import torch

from spin_hf import Bisection, CacheStateError, SpinCache
from spin_hf.errors import CapacityError
from spin_hf.forward_pass import ForwardPass
from spin_hf.graph import runner
from tests.support.clustering_methods import clustering_often, little_slack
from tests.support.faults import Faults
from tests.support.graph_recorder import FakeRecorder, capture_on_cpu
from tests.support.inspection import unpaged_layers
from tests.support.zoo import build_model, random_tokens

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu captures graphs"),
]

OPTIONS: dict[str, Any] = {"method": "shadowkv", "budget": 16, "recent_window": 8}
IDS = random_tokens(2, 60, seed=5)
PROMPT = 22


@pytest.fixture(autouse=True)
def _captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    capture_on_cpu(monkeypatch)
    monkeypatch.setattr(runner, "host_state", tuple)  # the mode that injects faults is part of it
    with little_slack():
        yield


@torch.no_grad()
def _feed(model: Any, cache: SpinCache, start: int, count: int = 1) -> torch.Tensor:
    logits: torch.Tensor = model(IDS[:, start : start + count], past_key_values=cache).logits
    return logits


def _at(model: Any, tokens: int, **options: Any) -> SpinCache:
    """A cache of a given number of tokens, decoded one by one after the prompt; its next step is replayed, or captured."""
    cache = SpinCache(model, **OPTIONS | options)
    _feed(model, cache, 0, PROMPT)
    for at in range(PROMPT, tokens):
        _feed(model, cache, at)
    return cache


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "prompt": ("llama", 0, {}),
    "first step": ("llama", PROMPT, {}),
    "captured": ("llama", PROMPT + 1, {}),
    "completes a page": ("llama", PROMPT + 1, {"method": clustering_often(Bisection, 32, 16)(2)}),
    "replayed": ("llama", PROMPT + 3, {}),
}


@pytest.mark.sweep(keep=[0, 3])
@pytest.mark.parametrize("case", CASES)
def test_memory_runs_out_around_a_step(case: str) -> None:
    family, tokens, options = CASES[case]
    model = build_model(family)
    count = PROMPT if tokens == 0 else 1

    def start() -> SpinCache:
        return _at(model, tokens, **options) if tokens else SpinCache(model, **OPTIONS | options)

    faults, undisturbed = Faults(), start()
    with faults.armed(None):
        expected = _feed(model, undisturbed, tokens, count)
    points = faults.count
    after = _feed(model, undisturbed, tokens + count)
    cache, failed, places = start(), 0, set()
    for turn, point in enumerate([0, points // 4, points // 2, points - points // 4, points - 1]):
        got = None
        with (
            faults.armed(point, lasting=bool(turn % 2)),
            suppress(CapacityError, torch.OutOfMemoryError),
        ):
            got = _feed(model, cache, tokens, count)
        if got is None:
            failed += 1
            places.add(faults.failed[0])
            assert cache.get_seq_length() == cache.stats().tokens == tokens, places
            cache.check_integrity()
            continue
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)  # eager, and captured next time
        cache = start()
    torch.testing.assert_close(_feed(model, cache, tokens, count), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(_feed(model, cache, tokens + count), after, rtol=0, atol=1e-5)
    cache.check_integrity()
    assert failed >= (3 if case not in ("captured", "completes a page") else 1), places


def test_the_logits_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes after the last layer, where a DynamicCache would already have counted the tokens."""
    model = build_model("gemma3_text")  # windows are put back too
    cache = SpinCache(model, **OPTIONS)
    _feed(model, cache, 0, PROMPT)
    twin = deepcopy(cache)
    windows = [layer.keys.clone() for layer in unpaged_layers(cache)]
    with monkeypatch.context() as patched:
        patched.setattr(model.lm_head, "forward", _out_of_memory)
        for count in (7, 1):
            with pytest.raises(torch.OutOfMemoryError):
                _feed(model, cache, PROMPT, count)
            assert cache.get_seq_length() == PROMPT
            assert all(torch.equal(a.keys, b) for a, b in zip(unpaged_layers(cache), windows, strict=True))
    for at, count in ((PROMPT, 7), (PROMPT + 7, 1)):
        assert torch.equal(_feed(model, cache, at, count), _feed(model, twin, at, count))
    cache.check_integrity()


def _out_of_memory(*args: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory (injected)")


def test_capturing_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama")
    cache = _at(model, PROMPT + 1)
    record = FakeRecorder.record
    monkeypatch.setattr(FakeRecorder, "record", _out_of_memory)
    _feed(model, cache, PROMPT + 1)
    monkeypatch.setattr(FakeRecorder, "record", record)
    for at in range(PROMPT + 2, PROMPT + 5):
        _feed(model, cache, at)
    assert FakeRecorder.replays
    assert cache.calls.steps is not None
    assert cache.calls.steps.refused is None


def test_a_replay_that_overwrote_states_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recurrent states are gone once the step is launched: that is said, and `reset` begins anew."""
    model = build_model("qwen3_next")
    cache = _at(model, PROMPT + 3)
    assert FakeRecorder.replays
    with monkeypatch.context() as patched:
        patched.setattr(ForwardPass, "finish", lambda self, **named: _out_of_memory())
        with pytest.raises(torch.OutOfMemoryError):
            _feed(model, cache, PROMPT + 3)
    with pytest.raises(CacheStateError, match="reset"):
        _feed(model, cache, PROMPT + 3)
    cache.reset()
    expected = _feed(model, SpinCache(model, **OPTIONS), 0, PROMPT)
    assert torch.equal(_feed(model, cache, 0, PROMPT), expected)


def test_two_caches_in_turn_and_one_goes() -> None:
    """Each has its own graphs and buffers."""
    model = build_model("llama")

    def run(cache: SpinCache, at: int) -> torch.Tensor:
        return _feed(model, cache, at)

    alone = SpinCache(model, **OPTIONS)
    _feed(model, alone, 0, PROMPT)
    expected = [run(alone, at) for at in range(PROMPT, PROMPT + 5)]
    caches: list[Any] = [SpinCache(model, **OPTIONS) for _ in range(2)]
    for cache in caches:
        _feed(model, cache, 0, PROMPT)
    for at in range(PROMPT, PROMPT + 5):
        if at == PROMPT + 3:
            caches[0] = None
            caches.append(SpinCache(model, **OPTIONS))
            _feed(model, caches[2], 0, at)
        for cache in [cache for cache in caches if cache is not None]:
            torch.testing.assert_close(run(cache, at), expected[at - PROMPT], rtol=0, atol=1e-5)
    for cache in caches[1:]:
        cache.check_integrity()
