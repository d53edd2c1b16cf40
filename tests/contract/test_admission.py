"""A batch that exceeds the caps is refused before the model computes anything. The error names the largest batch that fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spin_hf import BudgetError, CapacityError, SpinCache, enable, plan
from tests.support.families import FAMILIES
from tests.support.memory import SMALL_ZONES
from tests.support.zoo import build_model, left_padded, random_tokens, subject_model

PAGED = [name for name, family in FAMILIES.items() if family.paged]
HYBRID = ["llama", "gemma3_text", "qwen3_next"]
LENGTH = 60


class Untouched:
    """No layer of the model may be called."""

    def __init__(self, model: Any) -> None:
        self.handles = [layer.register_forward_pre_hook(self._called) for layer in _layers(model)]

    def _called(self, *args: Any) -> None:
        raise AssertionError("a layer was computed")

    def __enter__(self) -> None:
        return None

    def __exit__(self, *args: Any) -> None:
        for handle in self.handles:
            handle.remove()


def _layers(model: Any) -> Any:
    inner = getattr(model, "model", None) or getattr(model, "transformer", None) or model.gpt_neox
    return inner.layers if hasattr(inner, "layers") else inner.h


@torch.no_grad()
def prefill(model: Any, cache: SpinCache, rows: int) -> None:
    model(random_tokens(rows, LENGTH), past_key_values=cache)


@pytest.mark.parametrize("family", PAGED)
def test_refused_before_anything_is_computed(family: str) -> None:
    model = subject_model(family)
    cap = plan(model, context_length=LENGTH, batch_size=2, **SMALL_ZONES).smallest_gpu_memory
    cache = SpinCache(model, gpu_memory=cap, **SMALL_ZONES)
    for rows in (3, 5):
        with Untouched(model), pytest.raises(BudgetError) as caught:
            prefill(model, cache, rows)
        error = caught.value
        needed = plan(model, context_length=LENGTH, batch_size=rows, **SMALL_ZONES).smallest_gpu_memory
        assert (error.needed_bytes, error.available_bytes, error.fitting_batch_size) == (needed, cap, 2)
        for word in (str(needed), f"gpu_memory={cap}", "a batch of 2"):
            assert word in str(error)
        assert (cache.get_seq_length(), cache.stats().gpu_bytes) == (0, 0)
        cache.check_integrity()
    prefill(model, cache, 2)
    assert cache.get_seq_length() == LENGTH
    cache.check_integrity()


@pytest.mark.parametrize(("method", "large"), [("bisection", True), ("shadowkv", False)])
def test_large_summaries_have_a_remedy_of_their_own(method: str, large: bool) -> None:
    model = subject_model("llama")
    cap = plan(model, method=method, context_length=LENGTH, **SMALL_ZONES).smallest_gpu_memory
    with pytest.raises(BudgetError) as caught:
        prefill(model, SpinCache(model, method, gpu_memory=cap - 1, **SMALL_ZONES), 1)
    assert ('smaller summaries, such as "shadowkv"' in str(caught.value)) == large


@pytest.mark.parametrize("family", HYBRID)
def test_a_cache_that_was_used_before(family: str) -> None:
    """Its layers have pages then, and refuse the batch themselves."""
    model = subject_model(family)
    cap = plan(model, context_length=LENGTH, batch_size=2, **SMALL_ZONES).smallest_gpu_memory
    cache = SpinCache(model, gpu_memory=cap, **SMALL_ZONES)
    prefill(model, cache, 2)
    cache.reset()
    with Untouched(model), pytest.raises(BudgetError, match="a batch of 2"):
        prefill(model, cache, 3)
    prefill(model, cache, 2)
    cache.check_integrity()


@pytest.mark.parametrize("family", HYBRID)
def test_cpu_memory(family: str) -> None:
    model = subject_model(family)
    made = plan(model, context_length=LENGTH, batch_size=4, **SMALL_ZONES)
    host = plan(
        model, context_length=LENGTH, batch_size=4, gpu_memory=made.smallest_gpu_memory, **SMALL_ZONES
    ).cpu_bytes
    cache = SpinCache(model, gpu_memory=made.smallest_gpu_memory, cpu_memory=host // 2, **SMALL_ZONES)
    with Untouched(model), pytest.raises(CapacityError) as caught:
        prefill(model, cache, 4)
    assert (caught.value.needed_bytes, caught.value.available_bytes) == (host, host // 2)
    assert caught.value.fitting_batch_size == 2
    prefill(model, cache, 2)


def test_not_even_one_sequence() -> None:
    model = subject_model("llama")
    with Untouched(model), pytest.raises(BudgetError, match="not even one sequence") as caught:
        prefill(model, SpinCache(model, gpu_memory=1000, **SMALL_ZONES), 2)
    assert caught.value.fitting_batch_size == 0


def test_beams_count() -> None:
    model = subject_model("llama")
    cap = plan(model, context_length=LENGTH, batch_size=2, **SMALL_ZONES).smallest_gpu_memory
    with Untouched(model), pytest.raises(BudgetError) as caught, enable(model, gpu_memory=cap, **SMALL_ZONES):
        tokens, mask = left_padded([LENGTH, 20])
        model.generate(tokens, attention_mask=mask, num_beams=2, max_new_tokens=3)
    assert caught.value.fitting_batch_size == 2


def test_a_config_that_names_its_dtype() -> None:
    """A cache made from it knows no parameters. The dtype may be another one: then the first layer refuses the batch."""
    model = build_model("llama").to(torch.bfloat16)
    for named, early in ((torch.bfloat16, True), (torch.float32, False)):
        model.config.dtype = named
        cap = plan(model, context_length=LENGTH, batch_size=2, **SMALL_ZONES).smallest_gpu_memory
        cache = SpinCache(model.config, gpu_memory=cap, **SMALL_ZONES)
        with Untouched(model), pytest.raises(BudgetError if early else AssertionError):
            prefill(model, cache, 3)
        with pytest.raises(BudgetError, match="a batch of 2"):
            prefill(model, cache, 3)
        prefill(model, cache, 2)


def test_never_one_refusal_too_many() -> None:
    """Where autocast or a quantised module decides the dtype of keys, a batch that fits is admitted."""
    batch: dict[str, Any] = dict(context_length=LENGTH, batch_size=2, dtype=torch.bfloat16)
    model = build_model("gpt2")
    cap = plan(model, **batch, **SMALL_ZONES).smallest_gpu_memory
    with torch.autocast("cpu", torch.bfloat16):
        prefill(model, SpinCache(model, gpu_memory=cap, **SMALL_ZONES), 2)
    model = build_model("llama")
    cap = plan(model, **batch, **SMALL_ZONES).smallest_gpu_memory
    model.to(torch.bfloat16).lm_head.float()
    model.lm_head.register_forward_pre_hook(lambda module, arguments: (arguments[0].float(),))
    prefill(model, SpinCache(model, gpu_memory=cap, **SMALL_ZONES), 2)
