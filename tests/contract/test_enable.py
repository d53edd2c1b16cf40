"""`enable(model)`: later calls get a fresh SpinCache each, except those that pass a cache. `disable` undoes it."""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from spin_hf import OptionError, SpinCache, disable, enable
from tests.support.zoo import assistant_model, build_model, left_padded, oracle_model, random_tokens

EVERYTHING = dict(budget=1 << 20)


@pytest.fixture
def model() -> PreTrainedModel:
    return build_model("llama")


def call(model: PreTrainedModel, **kwargs: Any) -> Any:
    ids, mask = left_padded([50, 44])
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **kwargs)


def is_enabled(model: PreTrainedModel, **kwargs: Any) -> bool:
    output = model.generate(random_tokens(1, 20), max_new_tokens=1, return_dict_in_generate=True, **kwargs)
    return isinstance(output.past_key_values, SpinCache)


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


def test_sparse_prompts(model: PreTrainedModel) -> None:
    """Both options reach the cache: a small share gives other logits than a share of all, and wrong ones are refused."""
    ids = random_tokens(1, 1500)

    def logits(**options: Any) -> torch.Tensor:
        with enable(model, budget=1 << 20, prefill_chunk_size=512, **options):
            output = model.generate(ids, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
        found: torch.Tensor = output.logits[0]
        return found

    dense = logits()
    torch.testing.assert_close(logits(prefill="sparse", prefill_top_p=1.0), dense, rtol=1e-3, atol=1e-4)
    assert float((logits(prefill="sparse", prefill_top_p=0.05) - dense).abs().max()) > 1e-3
    assert torch.equal(logits(prefill_top_p=0.05), dense)
    for options in ({"prefill": "sprase"}, {"prefill_top_p": 2.0}):
        with pytest.raises(OptionError, match=next(iter(options))):
            enable(model, **options)


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
        assert is_enabled(model)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), enable(model, budget=8) as given:
        fail(given)
    assert not is_enabled(model)


def test_a_generate_that_was_wrapped_before_comes_back(model: PreTrainedModel) -> None:
    """Another library's wrapper on the instance is called, and is in place again afterwards."""
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


# ----------------------------------------------------------------------------------- what the configs say, once merged


def config_of(**fields: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, **fields)


@pytest.mark.parametrize("fields", [dict(use_cache=False), dict(cache_implementation="static")])
@pytest.mark.parametrize("said_by", ["argument", "positional config", "keyword config", "the model's config"])
def test_a_call_that_wants_another_cache(model: PreTrainedModel, fields: dict[str, Any], said_by: str) -> None:
    ids = random_tokens(1, 50)
    expected = model.generate(ids, config_of())
    enable(model, budget=8)
    if said_by == "argument":
        tokens = model.generate(ids, config_of(), **fields)
    elif said_by == "positional config":
        tokens = model.generate(ids, config_of(**fields))
    elif said_by == "keyword config":
        tokens = model.generate(ids, generation_config=config_of(**fields))
    else:
        for name, value in fields.items():
            setattr(model.generation_config, name, value)
        assert torch.equal(model.generate(ids, generation_config=config_of()), expected)
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(tokens, expected)


def test_a_config_that_wants_a_cache(model: PreTrainedModel) -> None:
    model.generation_config.use_cache = False
    enable(model, **EVERYTHING)
    assert not is_enabled(model)
    assert is_enabled(model, use_cache=True)


# ------------------------------------------------------------------------------------------- nested, wrapped and copied


def test_an_inner_enable_leaves_the_outer_one(model: PreTrainedModel) -> None:
    with enable(model, budget=16):
        with enable(model, **EVERYTHING):
            assert torch.equal(call(model), call(oracle_model("llama")))
        assert is_enabled(model)
        cache = call(model, return_dict_in_generate=True).past_key_values
        assert "budget=16" in repr(cache)
    assert not is_enabled(model)


def test_an_outer_enable_that_ends_first(model: PreTrainedModel) -> None:
    outer, inner = enable(model, budget=16), enable(model, budget=32)
    outer.__exit__(None, None, None)
    assert "budget=32" in repr(call(model, return_dict_in_generate=True).past_key_values)
    inner.__exit__(None, None, None)
    assert not is_enabled(model)


def test_disable_ends_all(model: PreTrainedModel) -> None:
    with enable(model, budget=16):
        enable(model, budget=32)
        disable(model)
        assert not is_enabled(model)
    assert not is_enabled(model)


@pytest.mark.parametrize("by", ["compiled", "model"])
def test_a_compiled_model(model: PreTrainedModel, by: str) -> None:
    compiled = torch.compile(model, backend="eager")
    attributes = set(model.__dict__)
    for given in (compiled, model):
        enable(given, **EVERYTHING)
        assert is_enabled(model)
        assert is_enabled(compiled)
        disable(compiled if by == "compiled" else model)
        assert not is_enabled(model)
    assert set(model.__dict__) == attributes


def test_a_generate_that_is_wrapped_later_stays(model: PreTrainedModel) -> None:
    calls = []
    enable(model, **EVERYTHING)
    inner = model.generate

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    model.generate = wrapper  # type: ignore[method-assign]
    assert is_enabled(model)
    disable(model)
    assert model.generate is wrapper
    assert not is_enabled(model)
    assert len(calls) == 2


@pytest.mark.parametrize("with_a_cache", [False, True])
def test_a_copied_model_is_its_own(model: PreTrainedModel, with_a_cache: bool) -> None:
    """Reference models, averaged weights, `quantize_dynamic`: the copy has its own weights, and is enabled for itself."""
    cache = SpinCache(model) if with_a_cache else None
    enable(model, **EVERYTHING)
    twin = copy.deepcopy(model)
    expected = call(twin)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert torch.equal(call(twin), expected)
    assert torch.equal(twin(random_tokens(1, 9)).logits, oracle_model("llama")(random_tokens(1, 9)).logits)
    disable(model)
    assert not is_enabled(model)
    assert is_enabled(twin)
    disable(twin)
    assert not is_enabled(twin)
    assert torch.equal(call(twin), expected)
    assert twin.config._attn_implementation == "sdpa"
    del cache


@pytest.mark.parametrize("with_a_cache", [False, True])
def test_a_pickled_model_is_a_plain_one(model: PreTrainedModel, with_a_cache: bool) -> None:
    cache = SpinCache(model) if with_a_cache else None
    enable(model, **EVERYTHING)
    twin = pickle.loads(pickle.dumps(model))
    assert not is_enabled(twin)
    assert is_enabled(model)
    assert torch.equal(call(twin), call(oracle_model("llama")))
    with enable(twin, **EVERYTHING):
        assert is_enabled(twin)
    del cache
