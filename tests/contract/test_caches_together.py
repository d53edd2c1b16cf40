"""Several caches at once: in turn on one model, one freed before the other, and threads that have a model and a cache each.

Results must not depend on other caches: every run is compared, bit for bit, with the same run alone. At full budget the tokens
are also those of a `DynamicCache`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from spin_hf import SpinCache
from spin_hf.attention import implementation, interface
from spin_hf.storage import pinned_slab
from tests.support.faults import Faults, chunks_in_slabs
from tests.support.memory import SMALL_ZONES
from tests.support.threads import in_threads
from tests.support.tuning import tune
from tests.support.zoo import build_model, oracle_model, random_tokens

PROMPTS = [random_tokens(2, 70, seed=1), random_tokens(1, 83, seed=2)]
OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {"budget": 1 << 20},
    "sparse": {"budget": 32, **SMALL_ZONES},
    "paged": {"method": "shadowkv", "budget": 32, **SMALL_ZONES, "gpu_memory": "100kB"},
}


class Decoding:
    """Greedy decoding by hand, a token at a time."""

    def __init__(self, model: Any, cache: Any, prompt: Tensor) -> None:
        self.model, self.cache, self.next, self.logits = model, cache, prompt, []

    @torch.no_grad()
    def step(self, count: int = 1) -> Tensor:
        for _ in range(count):
            logits = self.model(self.next, past_key_values=self.cache).logits[:, -1]
            self.next = logits.argmax(-1, keepdim=True)
            self.logits.append(logits)
        return torch.stack(self.logits, 1)


def alone(model: Any, prompt: Tensor, steps: int, **options: Any) -> Tensor:
    return Decoding(model, SpinCache(model.config, **options), prompt).step(steps)


@pytest.mark.parametrize("options", OPTIONS)
def test_two_caches_in_turn(options: str) -> None:
    model = build_model("llama")
    expected = [alone(model, prompt, 14, **OPTIONS[options]) for prompt in PROMPTS]
    both = [Decoding(model, SpinCache(model.config, **OPTIONS[options]), prompt) for prompt in PROMPTS]
    for step in range(14):
        for each in both if step % 2 else reversed(both):
            each.step()
    for each, logits, prompt in zip(both, expected, PROMPTS, strict=True):
        assert torch.equal(torch.stack(each.logits, 1), logits)
        each.cache.check_integrity()
        if options == "whole":
            dense = oracle_model("llama")
            tokens = Decoding(dense, DynamicCache(config=dense.config), prompt).step(14).argmax(-1)
            assert torch.equal(logits.argmax(-1), tokens)


def _delete(each: Decoding) -> None:
    del each.cache
    gc.collect()


ENDS: dict[str, Callable[[Decoding], Any]] = {
    "deleted": _delete,
    "reset": lambda each: each.cache.reset(),
    "cropped": lambda each: each.cache.crop(-9),
    "reordered": lambda each: each.cache.reorder_cache(torch.tensor([1, 0])),
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("copied", [False, True])
def test_one_goes_and_the_other_stays(options: str, end: str, copied: bool) -> None:
    """A copy shares nothing with its original."""
    model = build_model("llama")
    expected = alone(model, PROMPTS[0], 12, **OPTIONS[options])
    goes = Decoding(model, SpinCache(model.config, **OPTIONS[options]), PROMPTS[0])
    goes.step(5)
    stays = Decoding(model, SpinCache(model.config, **OPTIONS[options]), PROMPTS[0])
    if copied:
        stays.cache, stays.next, stays.logits = deepcopy(goes.cache), goes.next, list(goes.logits)
    else:
        stays.step(5)
    ENDS[end](goes)
    newcomer = Decoding(model, SpinCache(model.config, **OPTIONS[options]), PROMPTS[1])  # takes what was given back
    newcomer.step(3)
    stays.step(7)
    assert torch.equal(torch.stack(stays.logits, 1), expected)
    stays.cache.check_integrity()


# ------------------------------------------------------------------------------------------------------------- threads


@pytest.fixture
def busy_threads() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("busy_threads")
@pytest.mark.parametrize("options", OPTIONS)
def test_threads_with_their_own_models(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are slabs here: the prefetcher makes them in its own thread, and caches that are dropped return them."""
    tune(monkeypatch, min_chunk_segments=1, max_chunk_segments=1)
    slabs = chunks_in_slabs(Faults(), monkeypatch)
    count, steps = 4, 4
    models = [build_model("llama") for _ in range(count)]
    prompts = [random_tokens(1, 250 + 2 * number, seed=number) for number in range(count)]
    inputs = [{"input_ids": prompt, "attention_mask": torch.ones_like(prompt)} for prompt in prompts]

    def generate(number: int) -> Tensor:
        cache = SpinCache(models[number].config, **OPTIONS[options])
        tokens = models[number].generate(
            **inputs[number], past_key_values=cache, max_new_tokens=steps + 2 * number, do_sample=False
        )
        cache.check_integrity()
        return tokens  # type: ignore[no-any-return]

    expected = [generate(number) for number in range(count)]
    got: dict[int, list[Tensor]] = {number: [] for number in range(count)}

    def work(number: int) -> None:
        for _ in range(2):
            got[number].append(generate(number))
            circle: list[Any] = [SpinCache(models[number].config)]
            circle.append(circle)  # is found by the garbage collector, in any thread

    in_threads(count, work)
    for number in range(count):
        for tokens in got[number]:
            assert torch.equal(tokens, expected[number])
        if options == "whole":
            dense = oracle_model("llama").generate(**inputs[number], max_new_tokens=steps + 2 * number, do_sample=False)
            assert torch.equal(expected[number], dense)
    gc.collect()
    pinned_slab.HostSlab(pinned_slab.PAGE, slabs)  # gives back what the reserve's thread was the last to hold
    gc.collect()
    assert not slabs.registered
    assert not slabs.open_bytes
    assert all(model.config._attn_implementation != implementation.NAME for model in models)


@pytest.mark.usefixtures("busy_threads")
def test_threads_count_caches_of_one_model() -> None:
    """The last one to go restores the config, in whichever thread."""
    model = build_model("llama")
    before = model.config._attn_implementation

    def work(number: int) -> None:
        for _ in range(20):
            cache = SpinCache(model.config)
            assert model.config._attn_implementation == implementation.NAME
            del cache

    in_threads(4, work)
    assert model.config._attn_implementation == before


@pytest.mark.usefixtures("busy_threads")
def test_handles_are_not_given_twice() -> None:
    class Layer:
        pass

    kept: list[Any] = []

    def work(number: int) -> None:
        for _ in range(2000):
            layer: Any = Layer()
            layer.handle = interface.register_layer(layer)
            kept.append(layer)

    in_threads(4, work)
    assert len({layer.handle for layer in kept}) == len(kept)
    assert all(interface._layers[layer.handle] is layer for layer in kept)
