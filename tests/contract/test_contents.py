"""What a cache shows of its contents: keys, values, layers, iteration, copies. None of it can be written to."""

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

from spin_hf import AttentionError, CacheStateError, OptionTypeError, SpinCache
from tests.support.mistakes import EXACT, assert_untouched, feed, filled
from tests.support.zoo import subject_model

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
    """It shares its contents with the original, as that of a DynamicCache does, and outlives it."""
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
    """Only a model's attention can use the result of `update`."""
    model = subject_model("llama")
    cache = filled(model)
    states = cache.layers[0].keys[:, :, :1].clone()
    cache.update(states, states, 0)
    with pytest.raises(AttentionError, match="from_cache"):
        cache.update(states, states, 1)
    assert_untouched(model, cache)
