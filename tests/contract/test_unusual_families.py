"""Families whose layers call the cache in an unusual way: all of them exact, in every way of serving them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AttentionInterface, DynamicCache

from spin_hf import SpinCache
from spin_hf.errors import AttentionError, UnsupportedModelError
from tests.support.more_families import UNUSUAL
from tests.support.zoo import build_model, left_padded, oracle_model, random_tokens

EVERYTHING = 1 << 20
NEW_TOKENS = 10
each_family = pytest.mark.parametrize("family", UNUSUAL)
OWN_NAME = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


def generate(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    return model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True,
        output_logits=True, **{OWN_NAME: cache},
    )  # fmt: skip


@each_family
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_the_tokens_of_a_dynamic_cache(family: str, padded: bool) -> None:
    ids, mask = left_padded([61, 50]) if padded else (random_tokens(2, 61), torch.ones(2, 61, dtype=torch.int64))
    oracle, model = oracle_model(family), build_model(family)
    expected = generate(oracle, DynamicCache(config=oracle.config), ids, mask)
    cache = SpinCache(model, budget=EVERYTHING)
    output = generate(model, cache, ids, mask)
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), rtol=1e-3, atol=1e-3)
    assert cache.get_seq_length() == 61 + NEW_TOKENS - 1
    stats = cache.stats()
    assert bool(stats.paged_layers) == UNUSUAL[family].paged
    assert stats.paged_layers or stats.dense_layers


@each_family
def test_without_paged_layers_the_model_is_as_it_was(family: str) -> None:
    """Some of them ask for the implementation's name; a cache that pages none of their layers leaves it alone."""
    model = build_model(family)
    before = model.config._attn_implementation
    cache = SpinCache(model, budget=EVERYTHING)
    if not cache.stats().paged_layers:
        assert model.config._attn_implementation == before


@pytest.mark.parametrize("window", [16, 64], ids=["behind the window", "inside the window"])
@pytest.mark.parametrize("keep", [0, 1, 2, 5])
@torch.no_grad()
def test_layers_that_share_keys_may_get_fewer_queries(keep: int, window: int) -> None:
    """Gemma 4 shortens the queries of its shared layers to those whose logits are used, with and without padding."""
    model = build_model("gemma4_shared")
    for length in {16: 61, 64: 20}[window], 24:
        for mask in (torch.ones(2, length, dtype=torch.int64), left_padded([length, length - 7])[1]):
            ids = random_tokens(2, length)
            expected = oracle_model("gemma4_shared")(ids, attention_mask=mask, logits_to_keep=keep).logits
            cache = SpinCache(model, budget=EVERYTHING)
            logits = model(ids, attention_mask=mask, logits_to_keep=keep, use_cache=True, **{OWN_NAME: cache}).logits
            torch.testing.assert_close(logits[0], expected[0], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(logits[1, -1], expected[1, -1], rtol=1e-3, atol=1e-3)


def test_a_model_that_chooses_tokens_is_not_served_under_a_name_it_does_not_know() -> None:
    """Its choice would be dropped in silence."""
    spin: Any = AttentionInterface()["spin"]
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(AttentionError, match=r"'indices'.*load the model with"):
        spin(torch.nn.Linear(1, 1), states, states, states, None, indices=torch.zeros(1))


@pytest.mark.parametrize("name", ["CpmAntConfig", "GPTNeoXJapaneseConfig", "MvpConfig", "MegatronBertConfig"])
def test_families_without_the_attention_interface_are_refused(name: str) -> None:
    config = getattr(transformers, name)()
    config.is_encoder_decoder = False
    with pytest.raises(UnsupportedModelError, match="without transformers' attention interface"):
        SpinCache(config)
