"""Threads that capture, replay, load from host memory and drop caches at the same time give the tokens of a run alone."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from spin_hf import SpinCache
from tests.support.threads import in_threads
from tests.support.zoo import build_model, random_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

OPTIONS: dict[str, dict[str, Any]] = {
    "whole": {"method": "shadowkv", "budget": 1 << 20},
    "sparse": {"method": "shadowkv", "budget": 64, "recent_window": 16},
    "paged": {"method": "shadowkv", "budget": 64, "recent_window": 16, "gpu_memory": "3MB"},
}


def _inputs(number: int, length: int) -> dict[str, torch.Tensor]:
    ids = random_tokens(1, length, seed=number).cuda()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _generate(model: Any, cache: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(**inputs, past_key_values=cache, max_new_tokens=40, do_sample=False)
    return tokens


@pytest.mark.parametrize("options", OPTIONS)
def test_threads_with_their_own_models(options: str) -> None:
    count = 4
    models = [build_model("llama").cuda().eval() for _ in range(count)]
    inputs = [_inputs(number, 1500 + 40 * number) for number in range(count)]
    expected = [
        _generate(model, SpinCache(model, **OPTIONS[options]), given)
        for model, given in zip(models, inputs, strict=True)
    ]
    if options == "whole":
        for model, given, tokens in zip(models, inputs, expected, strict=True):
            assert torch.equal(_generate(model, DynamicCache(config=model.config), given), tokens)
    got: dict[int, list[torch.Tensor]] = {number: [] for number in range(count)}

    def work(number: int) -> None:
        for _ in range(3):  # each captures anew, while others replay or let go of host memory
            cache = SpinCache(models[number], **OPTIONS[options])
            got[number].append(_generate(models[number], cache, inputs[number]))
            cache.check_integrity()
            circle: list[Any] = [cache]
            circle.append(circle)

    in_threads(count, work)
    for number in range(count):
        for tokens in got[number]:
            assert torch.equal(tokens, expected[number])
    gc.collect()


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS)
def test_two_caches_in_turn_and_one_goes(options: str) -> None:
    """On one model, each with graphs of its own; memory of the one that goes is taken by the next while steps are under way."""
    model = build_model("llama").cuda().eval()
    ids = random_tokens(2, 1600, seed=9).cuda()

    def feed(cache: SpinCache, start: int, stop: int) -> torch.Tensor:
        logits: torch.Tensor = model(ids[:, start:stop], past_key_values=cache, logits_to_keep=1).logits
        return logits

    alone = SpinCache(model, **OPTIONS[options])
    feed(alone, 0, 1500)
    expected = [feed(alone, at, at + 1) for at in range(1500, 1520)]
    caches: list[Any] = [SpinCache(model, **OPTIONS[options]) for _ in range(2)]
    for cache in caches:
        feed(cache, 0, 1500)
    for at in range(1500, 1520):
        if at == 1510:
            caches[0] = None
            caches.append(SpinCache(model, **OPTIONS[options]))
            feed(caches[2], 0, 1500)  # steps read a part only, as those of the others did
            for before in range(1500, at):
                feed(caches[2], before, before + 1)
        for cache in [cache for cache in caches if cache is not None]:
            torch.testing.assert_close(feed(cache, at, at + 1), expected[at - 1500], rtol=0, atol=1e-4)
    for cache in caches[1:]:
        cache.check_integrity()
