"""A model does not change: without a SpinCache, beside one, and after the last one is gone.

"Exactly" means bit for bit here: calls without a SpinCache must reach the implementation that the config named before.
"""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation import ContinuousBatchingConfig

from spin_hf import AttentionError, SpinCache
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


@pytest.mark.sweep
@each_model
def test_beside_and_after_a_spin_cache(family: str, attention: str) -> None:
    model = build_model(family, attention)
    config_before, before = model.config.to_dict(), use_without_spin(family, model)
    assert model.config._attn_implementation == attention

    cache = SpinCache(model)
    assert model.config._attn_implementation == attention
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


@pytest.mark.parametrize("given", ["model", "config"])
def test_the_users_choice_while_a_cache_lives_stays(given: str) -> None:
    model = build_model("llama", "sdpa")
    cache = SpinCache(model if given == "model" else model.config)
    model.set_attn_implementation("eager")
    assert_identical(use_without_spin("llama", model), use_without_spin("llama", build_model("llama", "eager")))
    del cache
    gc.collect()
    assert model.config._attn_implementation == "eager"
    later = SpinCache(model if given == "model" else model.config)
    assert model.config._attn_implementation == ("eager" if given == "model" else "spin")
    assert_identical(use_without_spin("llama", model), use_without_spin("llama", build_model("llama", "eager")))
    del later
    gc.collect()
    assert model.config._attn_implementation == "eager"


def test_an_implementation_chosen_after_a_cache_was_made() -> None:
    """A cache of the model accepts it. A cache of the config refuses, as it relies on the config."""
    model, expected = build_model("llama"), Trace()
    oracle = DenseSubject("llama")
    expected.add_generated("spin", generate(oracle, random_tokens(1, 50), oracle.new()))
    cache = SpinCache(model, budget=1 << 20)
    model.set_attn_implementation("eager")
    trace = Trace()
    trace.add_generated("spin", generate(Fixed("llama", model, None), random_tokens(1, 50), cache))
    assert_same(trace, expected)
    assert model.config._attn_implementation == "eager"
    del cache
    gc.collect()
    of_config = SpinCache(model.config, budget=1 << 20)
    model.set_attn_implementation("sdpa")
    with pytest.raises(AttentionError, match=r"'sdpa'.*set_attn_implementation"):
        model(random_tokens(1, 9), past_key_values=of_config)


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


@pytest.mark.parametrize("given", ["models", "their config"])
def test_models_that_share_a_config(given: str) -> None:
    """Two models built from one config object: the switch counts what holds it for both."""
    model = build_model("llama")
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    assert twin.config is model.config
    before, inside = use_without_spin("llama", model), "sdpa" if given == "models" else "spin"
    first, second = (SpinCache(each if given == "models" else each.config) for each in (model, twin))
    del first
    gc.collect()
    assert model.config._attn_implementation == inside
    assert_identical(use_without_spin("llama", model), before)
    with torch.no_grad():
        twin(random_tokens(1, 20), past_key_values=second)
        assert model.config._attn_implementation == inside
        twin(random_tokens(1, 1), past_key_values=second)  # whose model is known by now
    assert model.config._attn_implementation == "sdpa"
    del second
    gc.collect()
    assert model.config._attn_implementation == "sdpa"


def test_continuous_batching_beside_a_cache() -> None:
    """`generate_batch` puts its own name into the config and refuses others."""
    model, prompts = build_model("llama"), [[5, 6, 7, 8, 9], [11, 12, 13]]
    config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=-1)

    def tokens() -> list[list[int]]:
        batch = ContinuousBatchingConfig(num_blocks=8, block_size=32, max_batch_tokens=32)
        results = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=batch, progress_bar=False
        )
        return [result.generated_tokens for result in results.values()]

    before = tokens()
    assert [len(each) for each in before] == [4, 4]
    cache = SpinCache(model, budget=1 << 20)
    generate(Fixed("llama", model, None), random_tokens(1, 50), cache)
    assert tokens() == before


def test_attention_weights_beside_a_cache() -> None:
    model = build_model("llama", "eager")
    before = model(random_tokens(1, 20), output_attentions=True).attentions
    cache = SpinCache(model, budget=1 << 20)
    generate(Fixed("llama", model, None), random_tokens(1, 50), cache)
    for weights, expected in zip(model(random_tokens(1, 20), output_attentions=True).attentions, before, strict=True):
        assert torch.equal(weights, expected)
