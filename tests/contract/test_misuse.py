"""What transformers' caches allow: a SpinCache serves it, or refuses it with the remedy, and nothing has changed."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from spin_hf import AttentionError, BatchSizeError, CacheStateError, OptionError, OptionTypeError, SpinCache
from tests.support.memory import SMALL_ZONES
from tests.support.zoo import build_config, build_model, random_tokens, subject_model

IDS = random_tokens(3, 120, seed=6)
EXACT: dict[str, Any] = {"method": "shadowkv", "budget": 1 << 20, **SMALL_ZONES}
TIERS = {"one tier": {}, "two tiers": {"gpu_memory": "200kB"}}


@torch.no_grad()
def feed(model: Any, cache: Any, start: int, stop: int, rows: Any = slice(0, 2), **kwargs: Any) -> Tensor:
    logits: Tensor = model(IDS[rows, start:stop], past_key_values=cache, **kwargs).logits
    return logits


def filled(model: Any, tokens: int = 60, **options: Any) -> SpinCache:
    cache = SpinCache(model.config, **EXACT | options)
    feed(model, cache, 0, tokens)
    return cache


def assert_untouched(model: Any, cache: SpinCache, tokens: int = 60) -> None:
    """It holds what it held, and goes on as a cache that saw no mistake."""
    assert cache.get_seq_length() == tokens
    cache.check_integrity()
    expected = DynamicCache(config=model.config)
    feed(model, expected, 0, tokens)
    ours, theirs = (feed(model, each, tokens, tokens + 1) for each in (cache, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)


# ------------------------------------------------------------------------------------------------------------- contents

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "fill_": lambda keys: keys.fill_(0.0),
    "an item": lambda keys: keys.__setitem__(0, 0.0),
    "a view": lambda keys: keys[:, 0, 3:].zero_(),
    "transposed": lambda keys: keys.transpose(1, 2).mul_(2),
    "augmented": lambda keys: keys.__iadd__(1.0),
    "out": lambda keys: torch.add(keys, 1, out=keys),
    "detached": lambda keys: keys.detach().zero_(),
    "data": lambda keys: setattr(keys, "data", torch.zeros_like(keys)),
}


@pytest.mark.parametrize("write", WRITES)
def test_contents_are_not_written_to(write: str) -> None:
    model = subject_model("llama")
    cache = filled(model)
    for name in ("keys", "values"):
        with pytest.raises(CacheStateError, match="from_cache"):
            WRITES[write](getattr(cache.layers[0], name))
    assert_untouched(model, cache)


def test_contents_are_tensors_like_any_other() -> None:
    """What is computed from them is ordinary, and may be written to."""
    model = subject_model("llama")
    cache, dense = filled(model), DynamicCache(config=model.config)
    feed(model, dense, 0, 60)
    keys, expected = cache.layers[1].keys, dense.layers[1].keys
    assert isinstance(keys, Tensor)
    torch.testing.assert_close(keys, expected, rtol=0, atol=3e-5)
    for made in (keys + 1, keys.clone(), keys.float().mean(), torch.cat([keys, keys]), torch.stack([keys])):
        assert type(made) is Tensor
        made.zero_()
    assert torch.equal(keys, cache.layers[1].keys)
    assert keys.shape == expected.shape
    pickle.loads(pickle.dumps(keys.clone()))


def test_contents_are_not_assigned() -> None:
    model = subject_model("llama")
    cache = filled(model)
    for name in ("keys", "values"):
        with pytest.raises(CacheStateError, match="from_cache"):
            setattr(cache.layers[0], name, torch.zeros(1))
    assert_untouched(model, cache)


def test_what_layers_are_asked() -> None:
    model = subject_model("llama")
    cache = SpinCache(model.config, **EXACT)
    for name in ("dtype", "device", "batch_size"):
        assert not hasattr(cache.layers[0], name)
    feed(model, cache, 0, 9)
    assert cache.layers[0].dtype == torch.float32
    assert cache.layers[0].device == torch.device("cpu")
    assert cache.layers[0].batch_size == cache.batch_size == 2


def test_iteration() -> None:
    """As of a DynamicCache, which so is made of a SpinCache."""
    model = subject_model("gemma3_text")
    cache, dense = filled(model, 20), DynamicCache(config=model.config)
    feed(model, dense, 0, 20)
    assert len(cache) == len(dense)
    for ours, theirs in zip(cache, dense, strict=True):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                torch.testing.assert_close(mine.clone(), other, rtol=0, atol=3e-5)
    with pytest.raises(TypeError, match="not subscriptable"):
        cache[0]  # type: ignore[index]
    again = DynamicCache(iter(filled(subject_model("llama"))))
    assert again.get_seq_length() == 60
    assert bool(cache)


def test_pickling() -> None:
    model = subject_model("llama")
    cache = filled(model)
    with pytest.raises(OptionTypeError, match="from_cache"):
        pickle.dumps(cache)
    moved = pickle.loads(pickle.dumps(DynamicCache(tuple(each.clone() for each in layer[:2]) for layer in cache)))
    assert_untouched(model, SpinCache.from_cache(moved, model.config, **EXACT))
    assert_untouched(model, cache)


def test_shallow_copy() -> None:
    """Shares its contents with the original, as of a DynamicCache, and outlives it."""
    model = subject_model("llama")
    cache = filled(model)
    twin = copy.copy(cache)
    feed(model, twin, 60, 61)
    assert cache.get_seq_length() == twin.get_seq_length() == 61
    cache.crop(-1)
    apart = copy.deepcopy(twin)
    feed(model, apart, 60, 70)
    del cache
    gc.collect()
    assert_untouched(model, twin)
    del twin
    gc.collect()
    assert apart.get_seq_length() == 70
    apart.check_integrity()


def test_update_by_hand() -> None:
    """Only a model's attention takes what `update` gives back."""
    model = subject_model("llama")
    cache = filled(model)
    states = cache.layers[0].keys[:, :, :1].clone()
    cache.update(states, states, 0)
    with pytest.raises(AttentionError, match="from_cache"):
        cache.update(states, states, 1)
    assert_untouched(model, cache)


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


@pytest.mark.parametrize("method", ["shadowkv", "bisection", "retroinfer", "quest"])
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
    attention = cache._shared.layers[-1]
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


# ----------------------------------------------------------------------------------------------------------- from_cache


def dense(model: Any, tokens: int = 60) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    feed(model, cache, 0, tokens)
    return cache


def _change(index: int, change: Callable[[Tensor], Tensor], names: tuple[str, ...] = ("keys", "values")) -> Any:
    def changed(cache: DynamicCache) -> None:
        for name in names:
            setattr(cache.layers[index], name, change(getattr(cache.layers[index], name)))

    return changed


SOURCES: dict[str, tuple[Callable[[DynamicCache], None], type[Exception]]] = {
    "another batch": (_change(1, lambda states: states[:1]), OptionError),
    "fewer tokens": (_change(1, lambda states: states[:, :, :50]), OptionError),
    "more heads": (_change(1, lambda states: torch.cat([states, states], 1)), OptionError),
    "another size": (_change(0, lambda states: states[..., :8]), OptionError),
    "another dtype": (_change(1, lambda states: states.half()), OptionError),
    "whole numbers": (_change(0, lambda states: states.int()), OptionError),
    "values of another dtype": (_change(0, lambda states: states.half(), ("values",)), OptionError),
    "fewer values": (_change(0, lambda states: states[:, :, :9], ("values",)), OptionError),
    "three dimensions": (_change(0, lambda states: states[0]), OptionError),
    "an empty layer": (_change(1, lambda states: states[:, :, :0]), OptionError),
    "a layer less": (lambda cache: cache.layers.pop(), OptionError),
}


@pytest.mark.parametrize("name", SOURCES)
def test_sources_that_do_not_fit(name: str) -> None:
    model, (change, error) = subject_model("llama"), SOURCES[name]
    source = dense(model)
    change(source)
    with pytest.raises(error, match="pass"):
        SpinCache.from_cache(source, model.config, **EXACT)


MASKS: dict[str, tuple[Any, type[Exception]]] = {
    "another batch": (torch.ones(1, 60), BatchSizeError),
    "fewer tokens": (torch.ones(2, 59), BatchSizeError),
    "more tokens": (torch.ones(2, 61), BatchSizeError),
    "one dimension": (torch.ones(60), OptionTypeError),
    "four dimensions": (torch.ones(2, 1, 60, 60), OptionTypeError),
    "a list": ([[1] * 60] * 2, OptionTypeError),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_do_not_fit(name: str) -> None:
    model, (mask, error) = subject_model("llama"), MASKS[name]
    with pytest.raises(error, match=r"attention_mask.*pass"):
        SpinCache.from_cache(dense(model), model.config, attention_mask=mask, **EXACT)


def test_sources_of_another_kind() -> None:
    model, other = subject_model("llama"), subject_model("qwen3_next")
    with pytest.raises(OptionTypeError, match="DynamicCache"):
        SpinCache.from_cache([(torch.ones(1), torch.ones(1))], model.config)  # type: ignore[arg-type]
    source = DynamicCache()
    for index in range(len(DynamicCache(config=other.config).layers)):
        source.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), index)
    with pytest.raises(OptionError, match="layer"):
        SpinCache.from_cache(source, other.config)
    empty = SpinCache.from_cache(DynamicCache(config=model.config), model.config, **EXACT)
    feed(model, empty, 0, 60)
    assert_untouched(model, empty)
