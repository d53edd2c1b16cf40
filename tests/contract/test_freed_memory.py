"""`del cache` frees its pages at once. GPU memory must not wait for the garbage collector."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from spin_hf import PromptStore, SpinCache, enable
from tests.support.freed_memory import weak_arrays, without_gc
from tests.support.inspection import state_of
from tests.support.memory import SMALL_ZONES, with_tight_gpu_memory
from tests.support.zoo import build_model, random_tokens

MODEL = build_model("llama")
TOKENS = random_tokens(1, 90)
METHODS = ["fitted", "bisection", "shadowkv", "retroinfer", "quest"]


def generated(**options: Any) -> SpinCache:
    cache = SpinCache(MODEL, budget=32, **SMALL_ZONES, **options)
    MODEL.generate(TOKENS, past_key_values=cache, max_new_tokens=4, do_sample=False)
    return cache


def capped() -> SpinCache:
    return with_tight_gpu_memory(lambda cap: generated(gpu_memory=cap))


def interrupted() -> SpinCache:
    """A forward of it has failed."""
    cache = generated()

    def fail(*_: Any) -> None:
        raise ValueError("in a layer")

    hook = MODEL.model.layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="in a layer"):
        MODEL(TOKENS[:, :1], past_key_values=cache)
    hook.remove()
    return cache


def taken_over() -> SpinCache:
    dynamic = DynamicCache(config=MODEL.config)
    with torch.no_grad():
        MODEL(TOKENS, past_key_values=dynamic)
    return SpinCache.from_cache(dynamic, MODEL)


def beams() -> SpinCache:
    cache = SpinCache(MODEL)
    MODEL.generate(TOKENS, past_key_values=cache, max_new_tokens=3, num_beams=2, do_sample=False)
    return cache


WAYS: dict[str, Callable[[], SpinCache]] = {
    **{method: lambda method=method: generated(method=method) for method in METHODS},  # type: ignore[misc]
    "sparse prompt": lambda: generated(prefill="sparse", prefill_chunk_size=32),
    "page frames": capped,
    "beams": beams,
    "a fork": lambda: generated().fork(),
    "a copy": lambda: copy.deepcopy(generated()),
    "several sequences": lambda: generated().fork(3),
    "from a DynamicCache": taken_over,
    "a failed forward": interrupted,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_deleted_cache(way: str) -> None:
    with without_gc():
        cache = WAYS[way]()
        held = weak_arrays(cache)
        del cache
        assert not any(reference() for reference in held)


def test_a_loaded_cache(tmp_path: Path) -> None:
    generated().save_pretrained(tmp_path / "saved")
    with without_gc():
        cache = SpinCache.from_pretrained(tmp_path / "saved", MODEL, budget=32, **SMALL_ZONES)
        held = weak_arrays(cache)
        del cache
        assert not any(reference() for reference in held)


def test_the_cache_of_a_call_of_an_enabled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    held, store = [], PromptStore(block_tokens=8)
    keep = PromptStore.keep

    def keeping(self: PromptStore, cache: SpinCache, *args: Any) -> None:
        keep(self, cache, *args)
        held.extend(weak_arrays(cache))

    monkeypatch.setattr(PromptStore, "keep", keeping)
    with without_gc():
        with enable(MODEL, store=store):
            MODEL.generate(TOKENS, max_new_tokens=3, do_sample=False)
        assert held
        assert not any(reference() for reference in held)


def test_a_state_that_outlives_its_cache_holds_no_pages() -> None:
    cache = generated()
    state, held = state_of(cache), weak_arrays(cache)
    with without_gc():
        del cache
        assert not any(reference() for reference in held)
    assert not state.layers
