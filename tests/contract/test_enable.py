"""`enable(model)`: later calls get a fresh SpinCache each, those that bring their own do not; `disable` undoes it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from spin_hf import SpinCache, disable, enable
from tests.support.zoo import assistant_model, build_model, left_padded, oracle_model, random_tokens

EVERYTHING = dict(budget=1 << 20)


@pytest.fixture
def model() -> PreTrainedModel:
    return build_model("llama")


def call(model: PreTrainedModel, **kwargs: Any) -> Any:
    ids, mask = left_padded([50, 44])
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **kwargs)


def test_every_call_gets_a_fresh_cache(model: PreTrainedModel) -> None:
    enable(model, **EVERYTHING)
    outputs = [call(model, return_dict_in_generate=True) for _ in range(2)]
    caches = [output.past_key_values for output in outputs]
    assert all(isinstance(cache, SpinCache) for cache in caches)
    assert caches[0] is not caches[1]
    assert all(cache.get_seq_length() == 57 for cache in caches)
    for output in outputs:
        assert torch.equal(output.sequences, call(oracle_model("llama")))
    disable(model)


@pytest.mark.parametrize(
    "kwargs", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}, {"prefill_chunk_size": 7}]
)
def test_generation_arguments_pass_through(model: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    with enable(model, **EVERYTHING):
        assert torch.equal(call(model, **kwargs), call(oracle_model("llama"), **kwargs))


def test_options_reach_the_cache(model: PreTrainedModel) -> None:
    with enable(model, method="shadowkv", budget=16, recent_window=8):
        stats = call(model, return_dict_in_generate=True).past_key_values.stats()
    assert 0 < stats.attended_tokens < 48
    with enable(model, budget=16), enable(model, **EVERYTHING):  # the later options count
        assert torch.equal(call(model), call(oracle_model("llama")))


def test_calls_that_choose_for_themselves(model: PreTrainedModel) -> None:
    expected = call(model)
    with enable(model, budget=8):
        own = DynamicCache(config=model.config)
        output = call(model, past_key_values=own, return_dict_in_generate=True)
        assert output.past_key_values is own
        assert torch.equal(output.sequences, expected)
        mine = SpinCache(model, **EVERYTHING)
        assert call(model, past_key_values=mine, return_dict_in_generate=True).past_key_values is mine
        assert torch.equal(call(model, use_cache=False), expected)
        assert torch.equal(call(model, cache_implementation="static"), expected)
        config = GenerationConfig(max_new_tokens=8, do_sample=False, cache_implementation="dynamic", pad_token_id=0)
        ids, mask = left_padded([50, 44])
        assert torch.equal(model.generate(ids, attention_mask=mask, generation_config=config), expected)
        output = call(model, cache_implementation="dynamic", return_dict_in_generate=True)
        assert type(output.past_key_values) is DynamicCache


def test_a_forward_without_generate_is_left_alone(model: PreTrainedModel) -> None:
    before = model(random_tokens(1, 20)).logits
    with enable(model, budget=8):
        output = model(random_tokens(1, 20), use_cache=True)
    assert torch.equal(output.logits, before)
    assert type(output.past_key_values) is DynamicCache


def test_disable_restores(model: PreTrainedModel) -> None:
    before, attributes = call(model), set(model.__dict__)
    config = model.config.to_dict()
    enable(model, budget=8)
    call(model)
    disable(model)
    gc.collect()
    assert set(model.__dict__) == attributes
    assert model.config._attn_implementation == "sdpa"
    assert model.config.to_dict() == config
    assert torch.equal(call(model), before)
    disable(model)  # nothing to undo, nothing happens


def test_the_context_manager_disables_after_an_error(model: PreTrainedModel) -> None:
    def fail(given: PreTrainedModel) -> None:
        assert given is model
        assert "generate" in model.__dict__
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), enable(model, budget=8) as given:
        fail(given)
    assert "generate" not in model.__dict__


def test_a_generate_that_was_wrapped_before_comes_back(model: PreTrainedModel) -> None:
    """Somebody else's wrapper on the instance is called through, and is there again afterwards."""
    calls, inner = [], model.generate

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    model.generate = wrapper  # type: ignore[method-assign]
    with enable(model, **EVERYTHING):
        call(model)
    assert len(calls) == 1
    assert model.generate is wrapper


def test_assisted_decoding(model: PreTrainedModel) -> None:
    ids = random_tokens(1, 50)
    expected = oracle_model("llama").generate(ids, max_new_tokens=10, assistant_model=assistant_model("llama"))
    with enable(model, **EVERYTHING):
        assert torch.equal(model.generate(ids, max_new_tokens=10, assistant_model=assistant_model("llama")), expected)
