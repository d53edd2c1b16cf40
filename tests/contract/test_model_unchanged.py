"""A model is what it was: without a SpinCache, beside one, and after the last one is gone.

"Exactly" means bit for bit here: calls without a SpinCache must reach the implementation that the config named before.
"""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from spin_hf import SpinCache
from tests.support.compare import Trace, assert_identical, assert_same
from tests.support.runs import advance, generate
from tests.support.subjects import DenseSubject, SpinSubject, Subject
from tests.support.zoo import build_model, left_padded, random_tokens

FAMILIES = ("llama", "gemma3_text", "deepseek_v3", "qwen3_next", "gpt2")
MODELS = [(family, attention) for family in FAMILIES for attention in ("sdpa", "eager")] + [("gpt_oss", "eager")]
each_model = pytest.mark.parametrize(("family", "attention"), MODELS)


class Fixed(Subject):
    """A subject over a given model and kind of cache."""

    def __init__(self, family: str, model: PreTrainedModel, make: Any) -> None:
        super().__init__(family, model)
        self._make = lambda: make(model)  # type: ignore[method-assign]


def use_without_spin(family: str, model: PreTrainedModel) -> Trace:
    """Everything that one does with a model and no SpinCache."""
    trace = Trace()
    ids, mask = left_padded([49, 41])
    subject = Fixed(family, model, lambda model: DynamicCache(config=model.config))
    trace.add_generated("no cache given", generate(subject, ids, None, attention_mask=mask, new_tokens=6))
    trace.add_generated(
        "no cache used", generate(subject, ids, None, attention_mask=mask, new_tokens=4, use_cache=False)
    )
    trace.add_generated("DynamicCache", generate(subject, ids, subject.new(), attention_mask=mask, new_tokens=6))
    trace.add_generated("beams", generate(subject, ids, None, attention_mask=mask, new_tokens=6, num_beams=2))
    static = StaticCache(config=model.config, max_cache_len=80)
    trace.add_generated("StaticCache", generate(subject, ids, static, attention_mask=mask, new_tokens=6))
    with torch.no_grad():
        trace.add_logits("no padding", model(random_tokens(2, 33)).logits)
        trace.add_logits("bool mask", model(ids, attention_mask=mask.bool(), use_cache=False).logits, valid=mask)
    return trace


@each_model
def test_beside_and_after_a_spin_cache(family: str, attention: str) -> None:
    model = build_model(family, attention)
    config_before, before = model.config.to_dict(), use_without_spin(family, model)
    assert model.config._attn_implementation == attention

    cache = SpinCache(model)
    assert_identical(use_without_spin(family, model), before)
    with_spin = generate(Fixed(family, model, None), random_tokens(2, 49), cache)
    assert with_spin.past_key_values is cache
    assert_identical(use_without_spin(family, model), before)

    del cache, with_spin
    gc.collect()
    assert model.config._attn_implementation == attention
    assert model.config.to_dict() == config_before
    assert not {"forward", "generate"} & model.__dict__.keys()
    assert_identical(use_without_spin(family, model), before)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_saved_config_says_nothing_of_spin(family: str, tmp_path: Any) -> None:
    model = build_model(family)
    cache = SpinCache(model)
    assert "spin" not in model.config.to_json_string(use_diff=False)
    model.save_pretrained(tmp_path)
    assert "spin" not in (tmp_path / "config.json").read_text()
    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    del cache


@pytest.mark.parametrize("given", ["model", "config"])
def test_the_switch_is_said_once(given: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build_model("llama")
    with caplog.at_level(logging.INFO, logger="spin_hf"):
        caches = [SpinCache(model if given == "model" else model.config) for _ in range(3)]
    said = [record for record in caplog.records if record.name.startswith("spin_hf")]
    assert [record.levelno for record in said] == [logging.INFO]
    assert "'sdpa' -> 'spin'" in said[0].getMessage()
    del caches


def test_loaded_with_spin() -> None:
    """attn_implementation="spin" at load time: with a SpinCache, and without one as if it were not there."""
    model, plain = build_model("llama", "spin"), build_model("llama")
    assert_same(use_without_spin("llama", model), use_without_spin("llama", plain))
    subject, oracle = Fixed("llama", model, lambda model: SpinCache(model, budget=1 << 20)), DenseSubject("llama")
    trace, expected = Trace(), Trace()
    trace.add_generated("spin", generate(subject, random_tokens(1, 50), subject.new()))
    expected.add_generated("spin", generate(oracle, random_tokens(1, 50), oracle.new()))
    assert_same(trace, expected)
    gc.collect()
    assert model.config._attn_implementation == "spin"


def test_the_users_choice_while_a_cache_lives_stays() -> None:
    model = build_model("llama", "sdpa")
    cache = SpinCache(model)
    model.set_attn_implementation("eager")
    assert_identical(use_without_spin("llama", model), use_without_spin("llama", build_model("llama", "eager")))
    del cache
    gc.collect()
    assert model.config._attn_implementation == "eager"
    later = SpinCache(model)
    assert model.config._attn_implementation == "spin"
    assert_identical(use_without_spin("llama", model), use_without_spin("llama", build_model("llama", "eager")))
    del later
    gc.collect()
    assert model.config._attn_implementation == "eager"


def _interleaved(first: Subject, second: Subject) -> Trace:
    """Two conversations with other prompts, batch sizes and lengths, one step of each in turn."""
    trace, caches = Trace(), (first.new(), second.new())
    tokens = [
        advance(subject, cache, random_tokens(rows, length, seed=rows), trace, f"prompt of {rows}")
        for subject, cache, rows, length in zip((first, second), caches, (1, 3), (57, 70), strict=True)
    ]
    for step in range(10):
        for index, (subject, cache) in enumerate(zip((first, second), caches, strict=True)):
            trace.add_tokens(f"{index} step {step}", tokens[index])
            tokens[index] = advance(subject, cache, tokens[index], trace, f"{index} step {step}")
    return trace


@pytest.mark.parametrize("family", FAMILIES)
def test_two_caches_used_in_turn(family: str) -> None:
    expected = _interleaved(DenseSubject(family), DenseSubject(family))
    spin = SpinSubject(family)
    assert_same(_interleaved(spin, spin), expected)
    for cache in spin.caches:
        cache.check_integrity()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spin_cache_and_a_dynamic_cache_used_in_turn(family: str) -> None:
    spin = SpinSubject(family)
    dynamic = Fixed(family, spin.model, lambda model: DynamicCache(config=model.config))
    expected = _interleaved(DenseSubject(family), DenseSubject(family))
    assert_same(_interleaved(spin, dynamic), expected)
    assert_same(_interleaved(dynamic, spin), expected)


def test_models_that_share_a_config() -> None:
    """Two models built from one config object: the switch counts the caches of both."""
    model = build_model("llama")
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    assert twin.config is model.config
    before = use_without_spin("llama", model)
    first, second = SpinCache(model), SpinCache(twin)
    del first
    gc.collect()
    assert model.config._attn_implementation == "spin"
    assert_identical(use_without_spin("llama", model), before)
    del second
    gc.collect()
    assert model.config._attn_implementation == "sdpa"
