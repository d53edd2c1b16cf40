"""A cache filled under `torch.inference_mode()` continues outside of it, and the other way round, as a `DynamicCache` does.

All tensors that a cache stores are ordinary ones, in whichever mode they are made. The test checks every tensor that can be
reached from the cache.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from spin_hf import SpinCache
from tests.support.clustering_methods import little_slack
from tests.support.graph_recorder import FakeRecorder, capture_on_cpu
from tests.support.inspection import state_of
from tests.support.memory import SMALL_ZONES
from tests.support.zoo import build_model, random_tokens, subject_model

IDS = random_tokens(2, 330, seed=4)
EVERYTHING = 1 << 20


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    with little_slack():
        yield


def tensors_of(held: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """All tensors that can be reached from an object of the package, or of transformers' caches."""
    seen = set() if seen is None else seen
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        for each in held.values():
            yield from tensors_of(each, seen)
    elif isinstance(held, (list, tuple, set)):
        for each in held:
            yield from tensors_of(each, seen)
    elif type(held).__module__.startswith(("spin_hf", "transformers.cache_utils")):
        yield from tensors_of(getattr(held, "__dict__", {}), seen)


def feed(model: Any, cache: Any, start: int, stop: int, inside: bool, mask: Tensor | None = None) -> Tensor:
    with torch.inference_mode() if inside else torch.no_grad():
        logits = model(IDS[:, start:stop], past_key_values=cache, attention_mask=mask).logits
    return logits.clone()


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {"method": "shadowkv"},
    "paged": {"method": "shadowkv", "gpu_memory": "200kB", **SMALL_ZONES},
    "int8": {"method": "shadowkv", "gpu_memory": "200kB", "cpu_dtype": "int8", **SMALL_ZONES},
    "bisection": {"method": "bisection", **SMALL_ZONES},
    "fitted": {"method": "fitted", **SMALL_ZONES},
    "retroinfer": {"method": "retroinfer", **SMALL_ZONES},
    "sparse": {"method": "shadowkv", "budget": 32, **SMALL_ZONES},
}
BETWEEN: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda cache: cache,
    "copy": deepcopy,
    "crop": lambda cache: cache.crop(-1) or cache,
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])) or cache,
    "reset": lambda cache: cache.reset() or cache,
    "release": lambda cache: (cache.release_gpu_memory() and None) or cache,
}


@pytest.mark.parametrize(("name", "inside"), [*((name, True) for name in OPTIONS), ("as it is", False)])
def test_goes_on_in_the_other_mode(name: str, inside: bool) -> None:
    """Prompt, token and an operation in one mode; then the other: equal to one that saw a single mode."""
    model = subject_model("llama")
    for between in BETWEEN.values():
        caches = [SpinCache(model.config, **{"budget": EVERYTHING, **OPTIONS[name]}) for _ in range(2)]
        outputs = []
        for number, cache in enumerate(caches):
            there = inside if number else False
            feed(model, cache, 0, 270, there)
            feed(model, cache, 270, 271, there)
            with torch.inference_mode(there):
                cache = between(cache)
            assert not any(tensor.is_inference() for tensor in tensors_of(state_of(cache))), name
            at = cache.get_seq_length()
            there = not inside if number else False
            outputs.append([feed(model, cache, at, at + count, there) for count in (20, 1, 1)])
            cache.check_integrity()
        for ours, theirs in zip(outputs[1], outputs[0], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next"])
def test_layers_that_are_not_paged(family: str) -> None:
    """transformers' own layers too hold what they are given in any mode."""
    model = subject_model(family)
    outputs = []
    for cache, inside in (
        (DynamicCache(config=model.config), False),
        (SpinCache(model.config, budget=EVERYTHING), True),
    ):
        feed(model, cache, 0, 40, inside)
        feed(model, cache, 40, 41, inside)
        cache.reorder_cache(torch.tensor([1, 0]))
        outputs.append([feed(model, cache, at, at + 1, False) for at in (41, 42)])
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_padding_and_gradients() -> None:
    """A padded batch; and a forward that records gradients after one under inference mode."""
    model = subject_model("llama")
    mask = torch.ones((2, 61), dtype=torch.int64)
    mask[0, :9] = 0
    cache = SpinCache(model.config, "shadowkv", budget=EVERYTHING)
    feed(model, cache, 0, 60, True, mask[:, :60])
    feed(model, cache, 60, 61, False, mask)
    logits = model(
        IDS[:, 61:62], past_key_values=cache, attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1)
    ).logits
    assert torch.isfinite(logits).all()
    cache.check_integrity()


def test_from_cache() -> None:
    model = subject_model("llama")
    source, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
    feed(model, source, 0, 60, True)
    feed(model, expected, 0, 60, False)
    with torch.inference_mode():
        cache = SpinCache.from_cache(source, model.config, "shadowkv", budget=EVERYTHING)
    ours, theirs = feed(model, cache, 60, 61, False), feed(model, expected, 60, 61, False)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_a_model_loaded_inside() -> None:
    with torch.inference_mode():
        model = build_model("llama")
    cache, dense = SpinCache(model.config, "shadowkv", budget=EVERYTHING), DynamicCache(config=model.config)
    for start, stop in ((0, 60), (60, 61), (61, 62)):
        ours, theirs = (feed(model, each, start, stop, False) for each in (cache, dense))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu captures graphs")
@pytest.mark.parametrize("inside", [True, False])
def test_captured_steps(inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers, tables and graphs that one mode made serve the other."""
    capture_on_cpu(monkeypatch)
    model = build_model("llama")
    options: dict[str, Any] = {"method": "shadowkv", "budget": 16, "recent_window": 8}
    outputs = []
    for modes in ([False] * 6, [inside, inside, not inside, not inside, inside, not inside]):
        cache = SpinCache(model, **options)
        feed(model, cache, 0, 22, modes[0])
        outputs.append([feed(model, cache, 22 + at, 23 + at, mode) for at, mode in enumerate(modes)])
        cache.crop(-2)
        outputs[-1].append(feed(model, cache, 26, 27, not inside))
        cache.check_integrity()
        assert not any(tensor.is_inference() for tensor in tensors_of(state_of(cache)))
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert FakeRecorder.replays > 4
