"""Errors before anything is cached: options, methods, models. Each names what was expected, what was found, and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from spin_hf import (
    AttentionError,
    BudgetError,
    CapacityError,
    OptionError,
    OptionTypeError,
    ShadowKV,
    SpinCache,
    SpinError,
    UnsupportedModelError,
    enable,
)
from spin_hf.integration import layer_types
from tests.support.error_messages import check_message
from tests.support.memory import SMALL_ZONES
from tests.support.zoo import random_tokens, subject_model

WRONG_TYPES: list[tuple[str, Any]] = [
    ("budget", "2048"),
    ("budget", None),
    ("budget", True),
    ("num_sink_tokens", 4.0),
    ("num_sink_tokens", None),
    ("recent_window", "64"),
    ("recent_window", False),
    ("dense_below", 0.5),
    ("gpu_memory", 1.5),
    ("gpu_memory", None),
    ("cpu_memory", [1]),
    ("cpu_memory", True),
]
WRONG_VALUES: list[tuple[str, Any]] = [
    ("budget", 0.0),
    ("budget", 1.5),
    ("budget", -0.1),
    ("budget", float("nan")),
    ("num_sink_tokens", -1),
    ("recent_window", 0),
    ("dense_below", -5),
    ("gpu_memory", 0),
    ("gpu_memory", -1),
    ("gpu_memory", "8 parsecs"),
    ("gpu_memory", "lots"),
    ("gpu_memory", ""),
    ("cpu_memory", "0GiB"),
    ("cpu_memory", "-3MB"),
]


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_wrong_type(name: str, value: Any) -> None:
    with pytest.raises(OptionTypeError) as caught:
        SpinCache(subject_model("llama"), **{name: value})
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, SpinError)
    check_message(caught.value, name, "expected", type(value).__name__)


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES)
def test_wrong_value(name: str, value: Any) -> None:
    with pytest.raises(OptionError) as caught:
        SpinCache(subject_model("llama"), **{name: value})
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SpinError)
    check_message(caught.value, name, "0" if value == "0GiB" else str(value))


@pytest.mark.parametrize("budget", [3, 0, -7])
def test_budget_below_sinks(budget: int) -> None:
    with pytest.raises(BudgetError) as caught:
        SpinCache(subject_model("llama"), budget=budget, num_sink_tokens=4)
    assert isinstance(caught.value, ValueError)
    check_message(caught.value, f"budget={budget}", "num_sink_tokens=4")


@pytest.mark.parametrize("text", ["8GiB", "500 MB", "1.5gb", "123456789", "64kib", "auto"])
def test_sizes_in_words(text: str) -> None:
    SpinCache(subject_model("llama"), gpu_memory=text, cpu_memory=text)


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError):
        SpinCache(subject_model("llama"), "shadowkv", 2048)  # type: ignore[misc]
    with pytest.raises(TypeError, match="bugdet"):
        SpinCache(subject_model("llama"), bugdet=2048)  # type: ignore[call-arg]


def test_unknown_method() -> None:
    with pytest.raises(OptionError) as caught:
        SpinCache(subject_model("llama"), "shadow")
    check_message(caught.value, "method", "'shadow'", "shadowkv")
    with pytest.raises(OptionTypeError) as wrong_type:
        SpinCache(subject_model("llama"), 3)  # type: ignore[arg-type]
    check_message(wrong_type.value, "method", "int", "shadowkv")
    with pytest.raises(OptionTypeError):
        SpinCache(subject_model("llama"), ShadowKV)  # type: ignore[arg-type]


def test_method_parameters() -> None:
    with pytest.raises(OptionTypeError) as caught:
        ShadowKV(outlier_pages_per_1024="24")  # type: ignore[arg-type]
    check_message(caught.value, "outlier_pages_per_1024", "str")
    with pytest.raises(OptionError) as wrong_value:
        ShadowKV(outlier_pages_per_1024=-1)
    check_message(wrong_value.value, "outlier_pages_per_1024", "-1")
    with pytest.raises(AttributeError):
        ShadowKV().outlier_pages_per_1024 = 1  # type: ignore[misc]


@pytest.mark.parametrize("model", ["a path", None, torch.nn.Linear(2, 2), {"model_type": "llama"}])
def test_not_a_model(model: Any) -> None:
    with pytest.raises(OptionTypeError) as caught:
        SpinCache(model)
    check_message(caught.value, "model", "expected", type(model).__name__)


def test_gpu_memory_that_cannot_hold_one_step() -> None:
    model = subject_model("llama")
    cache = SpinCache(model, gpu_memory=1000, budget=16)
    with pytest.raises(BudgetError) as caught, torch.no_grad():
        model(random_tokens(2, 60), past_key_values=cache)
    needed = caught.value.needed_bytes
    assert needed is not None
    assert needed > 1000
    check_message(caught.value, "gpu_memory", "1000", str(needed), "num_sink_tokens", "recent_window")
    cache.check_integrity()
    assert cache.get_seq_length() == 0
    for cap, fits in ((needed, True), (needed - 1, False)):
        cache = SpinCache(model, gpu_memory=cap, budget=16)
        if fits:
            with torch.no_grad():
                model(random_tokens(2, 60), past_key_values=cache)
            assert cache.stats().gpu_bytes <= cap
        else:
            with pytest.raises(BudgetError), torch.no_grad():
                model(random_tokens(2, 60), past_key_values=cache)


def test_cpu_memory_that_cannot_hold_the_prompt() -> None:
    model = subject_model("llama")
    with pytest.raises(BudgetError) as caught, torch.no_grad():
        model(random_tokens(2, 90), past_key_values=SpinCache(model, gpu_memory=1, **SMALL_ZONES))
    cache = SpinCache(model, gpu_memory=caught.value.needed_bytes, cpu_memory=5000, **SMALL_ZONES)
    with pytest.raises(CapacityError) as no_room, torch.no_grad():
        model(random_tokens(2, 90), past_key_values=cache)
    assert isinstance(no_room.value, MemoryError)
    check_message(no_room.value, "cpu_memory", "5000")
    cache.check_integrity()
    assert cache.get_seq_length() == 0


_TINY = dict(vocab_size=128, pad_token_id=0, eos_token_id=None, bos_token_id=None)
OLD_FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("BloomConfig", dict(hidden_size=32, n_layer=2, n_head=2)),
    ("GPTJConfig", dict(n_embd=32, n_layer=2, n_head=2, rotary_dim=8)),
    ("GPTNeoConfig", dict(hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global"], 2]])),
    ("CodeGenConfig", dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=8)),
    ("FalconConfig", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)),
    ("MptConfig", dict(d_model=32, n_layers=2, n_heads=2)),
    ("XGLMConfig", dict(d_model=32, num_layers=2, attention_heads=2, ffn_dim=32)),
]


@pytest.mark.parametrize(("config_class", "fields"), OLD_FAMILIES)
def test_models_without_the_attention_interface(config_class: str, fields: dict[str, Any]) -> None:
    config = getattr(transformers, config_class)(**_TINY, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    before = config._attn_implementation
    for given in (model, config):
        with pytest.raises(UnsupportedModelError) as caught:
            SpinCache(given)
        assert isinstance(caught.value, ValueError)
        check_message(caught.value, config.model_type)
    with pytest.raises(UnsupportedModelError) as caught:
        model.generate(random_tokens(1, 9), past_key_values=SpinCache(model), max_new_tokens=3)
    check_message(caught.value, type(model).__name__)
    assert config._attn_implementation == before


@pytest.mark.parametrize("num_layers", [1, 3])
def test_model_that_changes_its_keys_after_update(num_layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """JetMoe repeats its keys between `update` and attention: known to do so it is dense, unknown it is refused."""
    config = transformers.JetMoeConfig(
        **_TINY, hidden_size=32, num_hidden_layers=num_layers, num_key_value_heads=2, kv_channels=16,
        intermediate_size=32, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    expected = model.generate(random_tokens(1, 20), max_new_tokens=4)
    cache = SpinCache(model)
    assert torch.equal(model.generate(random_tokens(1, 20), past_key_values=cache, max_new_tokens=4), expected)
    assert not cache.stats().paged_layers
    with monkeypatch.context() as patch, pytest.raises(AttentionError) as caught:
        patch.setattr(layer_types, "_OTHER_STATES", {})
        model.generate(random_tokens(1, 20), past_key_values=SpinCache(model), max_new_tokens=4)
    check_message(caught.value, "JetMoeForCausalLM", "DynamicCache")
    assert torch.equal(model.generate(random_tokens(1, 20), max_new_tokens=4), expected)


ENCODER_DECODERS: list[tuple[str, dict[str, Any]]] = [
    ("T5Config", dict(d_model=32, d_ff=32, d_kv=16, num_layers=2, num_heads=2, decoder_start_token_id=0)),
    ("BartConfig", dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)),
]  # fmt: skip


@pytest.mark.parametrize(("config_class", "fields"), ENCODER_DECODERS)
def test_encoder_decoders(config_class: str, fields: dict[str, Any]) -> None:
    config = getattr(transformers, config_class)(**_TINY, **fields)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    before = config._attn_implementation
    for given in (model, config):
        with pytest.raises(UnsupportedModelError) as caught:
            SpinCache(given)
        check_message(caught.value, "encoder-decoder")
    assert config._attn_implementation == before


def test_enable_refuses_at_once() -> None:
    model = subject_model("llama")
    with pytest.raises(BudgetError):
        enable(model, budget=1)
    with pytest.raises(OptionError):
        enable(model, method="none such")
    with pytest.raises(OptionTypeError) as caught:
        enable("a path")  # type: ignore[arg-type]
    check_message(caught.value, "model", "str")
    with pytest.raises(OptionTypeError):
        enable(model.config)  # type: ignore[arg-type]
    assert "generate" not in model.__dict__


def test_from_cache_refuses() -> None:
    model = subject_model("llama")
    with pytest.raises(OptionTypeError) as caught:
        SpinCache.from_cache([(1, 2)], model)  # type: ignore[arg-type]
    check_message(caught.value, "list", "DynamicCache")
    other = subject_model("cohere2")
    dynamic = transformers.DynamicCache(config=other.config)
    with torch.no_grad():
        other(random_tokens(1, 9), past_key_values=dynamic)
    with pytest.raises(OptionError) as wrong_model:
        SpinCache.from_cache(dynamic, model)
    check_message(wrong_model.value, "layers", "2", "4")
