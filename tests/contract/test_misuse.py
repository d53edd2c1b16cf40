"""Calls that transformers' caches allow: a SpinCache serves them, or refuses them with the remedy and changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from spin_hf import AttentionError, BatchSizeError, CacheStateError, OptionError, OptionTypeError, SpinCache
from tests.support.memory import SMALL_ZONES
from tests.support.mistakes import EXACT, IDS, TIERS, assert_untouched, feed, filled
from tests.support.zoo import build_config, build_model, subject_model

# ----------------------------------------------------------------------------------------------------------------- rows

SAME: dict[str, Any] = {
    "list": [1, 0, 1],
    "tuple": (0, 1),
    "negative": torch.tensor([-1, 0]),
    "negative list": [-1, -2],
    "int32": torch.tensor([1], dtype=torch.int32),
    "bools": torch.tensor([False, True]),
    "list of bools": [True, False],
    "slice": slice(1, 2),
}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
@pytest.mark.parametrize("name", SAME)
def test_sequences_as_torch_names_them(name: str, family: str) -> None:
    """`batch_select_indices` takes what indexes a tensor, on windows and linear attention too."""
    model = subject_model(family)
    cache, rows = filled(model, 40), torch.arange(2)[SAME[name] if name != "tuple" else [0, 1]].tolist()
    cache.batch_select_indices(SAME[name])
    assert cache.batch_size == len(rows)
    expected = DynamicCache(config=model.config)
    feed(model, expected, 0, 40, rows)
    ours, theirs = (feed(model, each, 40, 41, rows) for each in (cache, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    cache.check_integrity()


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next"])
def test_selections_of_hybrids(family: str) -> None:
    """Every operation on a batch is served by all layers of a model."""
    model = subject_model(family)
    for act, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    ):
        cache, expected = filled(model, 40), DynamicCache(config=model.config)
        act(cache)
        feed(model, expected, 0, 40, rows)
        ours, theirs = (feed(model, each, 40, 43, rows) for each in (cache, expected))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


WRONG: dict[str, tuple[Any, type[Exception]]] = {
    "outside": ([2], BatchSizeError),
    "too negative": ([-3], BatchSizeError),
    "none": ([], BatchSizeError),
    "no bool": ([False, False], BatchSizeError),
    "bools of another batch": ([True, False, True], BatchSizeError),
    "fractions": ([0.5], OptionTypeError),
    "two dimensions": ([[0], [1]], OptionTypeError),
    "one number": (1, OptionTypeError),
    "text": ("first", OptionTypeError),
    "nothing": (None, OptionTypeError),
}


@pytest.mark.parametrize("operation", ["batch_select_indices", "reorder_cache"])
@pytest.mark.parametrize("name", WRONG)
def test_sequences_that_there_are_not(name: str, operation: str) -> None:
    model, (given, error) = subject_model("llama"), WRONG[name]
    cache = filled(model)
    with pytest.raises(error, match=r"pass|call"):
        getattr(cache, operation)(given)
    assert_untouched(model, cache)


@pytest.mark.parametrize("repeats", [0, -1, 1.5, "2", torch.tensor([1, 2])])
def test_repeats_that_are_no_number(repeats: Any) -> None:
    model = subject_model("llama")
    cache = filled(model)
    with pytest.raises((OptionError, OptionTypeError), match="repeats"):
        cache.batch_repeat_interleave(repeats)
    assert_untouched(model, cache)


# --------------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("tiers", TIERS)
def test_another_dtype(tiers: str) -> None:
    """Refused in one tier as in two; and taken by a cache that was reset."""
    model = build_model("llama")
    cache = filled(model, **TIERS[tiers])
    weights = [each.data.clone() for each in (*model.parameters(), *model.buffers())]
    model.to(torch.bfloat16)
    for count in (1, 20):
        with pytest.raises(AttentionError, match=r"float32.*bfloat16.*reset"):
            feed(model, cache, 60, 60 + count)
    model.to(torch.float32)
    for each, held in zip((*model.parameters(), *model.buffers()), weights, strict=True):
        each.data = held
    assert_untouched(model, copy.deepcopy(cache))
    model.to(torch.bfloat16)
    cache.reset()
    feed(model, cache, 0, 60)
    assert cache.layers[0].dtype == torch.bfloat16
    feed(model, cache, 60, 61)
    cache.check_integrity()


@pytest.mark.parametrize("tiers", TIERS)
def test_masks_of_another_batch(tiers: str) -> None:
    model = subject_model("llama")
    cache = filled(model, **TIERS[tiers])
    for sequences in (1, 3):
        mask = torch.ones((sequences, 61), dtype=torch.int64)
        feed(model, copy.deepcopy(cache), 60, 61, attention_mask=mask)  # which says nothing, and is let through
        mask[0, :5] = 0
        with pytest.raises(BatchSizeError, match="attention_mask"):
            feed(model, cache, 60, 61, attention_mask=mask)
        with pytest.raises(BatchSizeError, match="attention_mask"):
            feed(model, SpinCache(model.config, **EXACT), 0, 61, attention_mask=mask)
    assert_untouched(model, cache)


@pytest.mark.parametrize("tiers", TIERS)
def test_a_model_with_more_layers(tiers: str) -> None:
    model, config = subject_model("llama"), build_config("llama")
    config.num_hidden_layers = 1
    for tokens in (0, 10):
        cache = SpinCache(config, **EXACT | TIERS[tiers])
        states = torch.randn(2, config.num_key_value_heads, tokens, model.config.head_dim)
        if tokens:
            source = DynamicCache()
            source.update(states, states, 0)
            cache = SpinCache.from_cache(source, config, **EXACT | TIERS[tiers])
        model.config._attn_implementation, before = "spin", model.config._attn_implementation
        try:
            for _ in range(2):
                with pytest.raises(CacheStateError, match="1 layers"):
                    feed(model, cache, 0, 5)
                assert cache.get_seq_length() == tokens
                cache.check_integrity()
        finally:
            model.config._attn_implementation = before


@pytest.mark.parametrize("method", ["shadowkv", "bisection", "retroinfer", "quest", "fitted"])
@pytest.mark.parametrize("tiers", TIERS)
def test_keys_that_are_no_numbers(method: str, tiers: str) -> None:
    """A model that overflows gives no numbers, as with a DynamicCache; the cache is sound all the same."""
    model = build_model("llama")
    cache = filled(model, method=method, **TIERS[tiers])
    kept = model.model.embed_tokens.weight.data.clone()
    model.model.embed_tokens.weight.data[IDS[0, 60:68]] = float("nan")
    feed(model, cache, 60, 100)
    assert not torch.isfinite(feed(model, cache, 100, 101)).all()
    cache.check_integrity()
    cache.crop(-41)
    model.model.embed_tokens.weight.data = kept
    assert_untouched(model, cache)


@pytest.mark.parametrize("family", ["qwen3_next", "gemma3_text"])
def test_a_first_batch_that_is_refused_under_way(family: str) -> None:
    """A cache that held nothing holds nothing then, linear attention included, and takes the next batch."""
    model = subject_model(family)
    cache = SpinCache(model.config, "shadowkv", budget=1 << 20, gpu_memory=1, **SMALL_ZONES)
    with pytest.raises(OptionError):
        feed(model, cache, 0, 40)
    cache = SpinCache(model.config, **EXACT)
    attention = cache.paged_layers[-1]
    original = attention.append
    attention.append = _failing  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        feed(model, cache, 0, 40)
    attention.append = original  # type: ignore[method-assign]
    assert cache.get_seq_length() == 0
    feed(model, cache, 0, 40, [2])
    expected = DynamicCache(config=model.config)
    feed(model, expected, 0, 40, [2])
    ours, theirs = (feed(model, each, 40, 43, [2]) for each in (cache, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def _failing(*states: Any) -> None:
    raise MemoryError
