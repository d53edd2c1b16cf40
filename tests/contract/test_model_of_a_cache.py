"""A cache belongs to one model: calls of another model are refused. Layers that are called by hand are served or refused."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from spin_hf import AttentionError, SpinCache
from tests.support.runs import EVERYTHING, logits_of
from tests.support.subjects import DenseSubject
from tests.support.zoo import assistant_model, build_model, random_tokens


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("other_has_a_cache", [False, True])
def test_the_cache_of_another_model(family: str, other_has_a_cache: bool) -> None:
    """Refused before anything changes, whether or not the other model's calls are seen; `from_cache` takes the tokens over."""
    model = build_model(family)
    other = copy.deepcopy(model)
    own = SpinCache(other) if other_has_a_cache else None
    cache = SpinCache(model, **EVERYTHING)
    logits_of(model, random_tokens(2, 50), cache)
    for tokens in (1, 9):
        with pytest.raises(AttentionError, match=r"another model.*from_cache"):
            logits_of(other, random_tokens(2, tokens), cache)
        assert other.config._attn_implementation == model.config._attn_implementation == "sdpa"
    assert cache.get_seq_length() == 50
    cache.check_integrity()
    if family == "llama":
        taken = SpinCache.from_cache(cache, other, **EVERYTHING)
        ids = random_tokens(2, 3)
        torch.testing.assert_close(logits_of(other, ids, taken), logits_of(model, ids, cache))
    del own


def test_the_cache_of_a_larger_model() -> None:
    """A target's cache given to its draft, which has a SpinCache of its own."""
    large, small = build_model("llama"), assistant_model("llama")
    own, cache = SpinCache(small), SpinCache(large)
    with pytest.raises(AttentionError, match="another model"):
        small.generate(random_tokens(1, 20), past_key_values=cache, max_new_tokens=2)
    assert cache.get_seq_length() == own.get_seq_length() == 0


def test_the_cache_of_an_equal_config() -> None:
    model = build_model("llama")
    cache = SpinCache(copy.deepcopy(model.config), **EVERYTHING)
    with pytest.raises(AttentionError, match=r"LlamaAttention with another config.*'sdpa'"):
        logits_of(model, random_tokens(1, 20), cache)
    assert cache.get_seq_length() == 0


def test_layers_called_by_hand() -> None:
    """A cache of the config serves them. A cache of the model sees only calls of the model, and refuses them."""
    model = build_model("llama")
    oracle, ids = DenseSubject("llama").model, random_tokens(1, 21)

    def by_hand(model: PreTrainedModel, cache: Any) -> torch.Tensor:
        decoder = model.model
        states = decoder.embed_tokens(ids)
        positions = torch.arange(ids.shape[1])[None]
        embeddings = decoder.rotary_emb(states, positions)
        name = "cache" if "cache" in inspect.signature(decoder.layers[0].forward).parameters else "past_key_values"
        with torch.no_grad():
            for layer in decoder.layers:
                states = layer(states, position_ids=positions, position_embeddings=embeddings, **{name: cache})
        return states

    expected = by_hand(oracle, DynamicCache(config=oracle.config))
    torch.testing.assert_close(by_hand(model, SpinCache(model.config, **EVERYTHING)), expected)
    with pytest.raises(AttentionError, match=r"by itself.*SpinCache\(model.config\)"):
        by_hand(model, SpinCache(model, **EVERYTHING))
