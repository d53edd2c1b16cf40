"""Models that rotate keys differently beyond some length: the cache that was passed stays in use, with the right tokens."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from spin_hf import SpinCache, enable
from spin_hf.errors import CapacityError
from tests.support.zoo import random_tokens

SWITCH = 64
NEW_TOKENS = 12
_ROPE: dict[str, Any] = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0] * 8,
    long_factor=[4.0] * 8,
    original_max_position_embeddings=SWITCH,
)
_COMMON: dict[str, Any] = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=2048, original_max_position_embeddings=SWITCH, pad_token_id=0,
)  # fmt: skip
_ENCODER = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2)
_CONFIGS: dict[str, dict[str, Any]] = {
    "Phi3Config": dict(rope_parameters=_ROPE),
    "PhimoeConfig": dict(
        rope_parameters=_ROPE | dict(short_mscale=1.0, long_mscale=1.2), num_local_experts=4, num_experts_per_tok=2
    ),
    "Phi4MultimodalConfig": dict(
        rope_parameters=_ROPE,
        vision_config=_ENCODER | dict(num_hidden_layers=2, image_size=28, patch_size=14, crop_size=28),
        audio_config=_ENCODER
        | dict(num_blocks=1, nemo_conv_channels=8, ext_pw_out_channel=32, depthwise_separable_out_channel=32),
    ),
}
each_config = pytest.mark.parametrize("name", _CONFIGS)


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**_COMMON, **_CONFIGS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model  # type: ignore[no-any-return]


def generate(model: PreTrainedModel, ids: torch.Tensor, **kwargs: Any) -> Any:
    given = dict(max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True) | kwargs
    return model.generate(ids, attention_mask=(ids != 0).long(), **given)


@each_config
@pytest.mark.parametrize("length", [SWITCH - 30, SWITCH - 6, SWITCH, SWITCH + 1, SWITCH + 40])
@pytest.mark.parametrize("from_config", [False, True], ids=["model", "config"])
def test_tokens_around_the_switch(name: str, length: int, from_config: bool) -> None:
    """The tokens are those without a cache, for prompts before, across and beyond that length, in the cache that was passed."""
    model = build(name)
    ids = random_tokens(2, length)
    expected = generate(model, ids, use_cache=False).sequences
    cache = SpinCache(model.config if from_config else model, budget=1 << 20)
    output = generate(model, ids, past_key_values=cache)
    assert torch.equal(output.sequences, expected)
    assert output.past_key_values is cache
    assert cache.get_seq_length() == length + NEW_TOKENS - 1
    cache.check_integrity()


@pytest.mark.parametrize("name", ["Phi3Config"])
def test_options_and_caps_hold_behind_the_switch(name: str) -> None:
    model = build(name)
    ids = random_tokens(1, 600)
    cache = SpinCache(model, budget=16, recent_window=16)
    generate(model, ids, past_key_values=cache)
    assert cache.stats().sparse_queries > 0
    with enable(model, budget=16, gpu_memory="256KiB", cpu_memory="256KiB"), pytest.raises(CapacityError):
        generate(model, random_tokens(1, 2000))


@pytest.mark.parametrize("name", ["Phi3Config"])
def test_turns_and_samples_across_the_switch(name: str) -> None:
    """A cache filled before that length continues beyond it, with padding and with beams."""
    model = build(name)
    ids = random_tokens(2, 40)
    ids[0, :5] = 0
    cache = SpinCache(model, budget=1 << 20)
    first = generate(model, ids, past_key_values=cache, max_new_tokens=4).sequences
    ids = torch.cat([first, random_tokens(2, 40, seed=1)], 1)
    assert torch.equal(
        generate(model, ids, past_key_values=cache).sequences, generate(model, ids, use_cache=False).sequences
    )
    ids = random_tokens(1, SWITCH - 4)
    beams = dict(num_beams=3)
    assert torch.equal(
        generate(model, ids, past_key_values=SpinCache(model, budget=1 << 20), **beams).sequences,
        generate(model, ids, use_cache=False, **beams).sequences,
    )


@pytest.mark.parametrize("name", ["Phi3Config"])
def test_the_class_is_as_before_when_no_cache_is_left(name: str) -> None:
    """Other caches are dropped as ever while one lives; copies have nothing of it; the last one leaves no trace."""
    model = build(name)
    kind = type(model)
    gc.collect()
    own = kind.prepare_inputs_for_generation
    ids = random_tokens(1, SWITCH + 6)
    cache, other = SpinCache(model), SpinCache(model)
    assert "prepare_inputs_for_generation" not in copy.deepcopy(model).__dict__
    dynamic = DynamicCache(config=model.config)
    generate(model, ids, past_key_values=dynamic)
    assert dynamic.get_seq_length() == 0
    del cache
    gc.collect()
    assert kind.prepare_inputs_for_generation is not own
    del other
    gc.collect()
    assert kind.prepare_inputs_for_generation is own
