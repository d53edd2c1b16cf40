"""`generate` with a cache, and a prompt that no longer begins with what the cache holds: read from where it differs."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from spin_hf import SpinCache
from tests.support.answers import answer, assert_fresh
from tests.support.inspection import state_of
from tests.support.memory import SMALL_ZONES
from tests.support.zoo import build_model, left_padded, random_tokens

FAMILIES = ["llama", "gemma3_text", "gpt_oss", "qwen3_next", "gemma3n_text"]
WARNING = "removed from the cache"


def edited(ids: Tensor, position: int) -> Tensor:
    """`ids` with another token at `position` of the last sequence."""
    other = ids.clone()
    other[-1, position] = (other[-1, position] + 1) % 100 + 3
    return other


@pytest.mark.parametrize("position", [0, 17, 58, 63])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edited_history(family: str, position: int, caplog: pytest.LogCaptureFixture) -> None:
    """A token of the prompt, or of the answer, is another one in the next turn."""
    model = build_model(family)
    cache = SpinCache(model, budget=1 << 20)
    first = answer(model, random_tokens(1, 60), cache).sequences
    ids = torch.cat([edited(first, position), random_tokens(1, 9, seed=1)], 1)
    with caplog.at_level(logging.WARNING, "spin_hf"):
        assert_fresh(model, ids, cache)
    assert caplog.text.count(WARNING) == 1
    assert f"the first {position} of the 64 tokens" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_a_history_that_goes_on(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build_model(family)
    cache, read = SpinCache(model, budget=1 << 20), []
    ids = random_tokens(1, 60)
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    try:
        for turn in range(3):
            ids = torch.cat([answer(model, ids, cache).sequences, random_tokens(1, 9, seed=turn)], 1)
    finally:
        hook.remove()
    assert [number for number in read if number > 1] == [60, 10, 10]
    assert WARNING not in caplog.text


@pytest.mark.parametrize("shorter", [0, 1, 30])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_prompt_again(family: str, shorter: int, caplog: pytest.LogCaptureFixture) -> None:
    """The cache holds the prompt and its answer. At least one token is read."""
    model = build_model(family)
    cache, ids = SpinCache(model, budget=1 << 20), random_tokens(1, 60)
    answer(model, ids, cache)
    assert_fresh(model, ids[:, : 60 - shorter], cache)
    assert WARNING not in caplog.text, "nothing of the prompt differs"


def test_a_batch_is_cropped_to_what_all_of_it_has_in_common(caplog: pytest.LogCaptureFixture) -> None:
    model = build_model("llama")
    ids, mask = left_padded([60, 52])
    cache = SpinCache(model, budget=1 << 20)
    first = answer(model, ids, cache, attention_mask=mask).sequences
    mask = torch.cat([mask, mask.new_ones(2, first.shape[1] - mask.shape[1])], 1)
    assert_fresh(model, edited(first, 40)[:, :62], cache, attention_mask=mask[:, :62])
    assert "the first 40 of the 64 tokens" in caplog.text


def test_padding_may_hold_anything(caplog: pytest.LogCaptureFixture) -> None:
    model = build_model("llama")
    ids, mask = left_padded([60, 52])
    cache = SpinCache(model, budget=1 << 20)
    first = answer(model, ids, cache, attention_mask=mask).sequences.clone()
    mask = torch.cat([mask, mask.new_ones(2, first.shape[1] - mask.shape[1])], 1)
    first[1, :8] = 99
    assert_fresh(model, first, cache, attention_mask=mask)
    assert WARNING not in caplog.text


def test_sparse_tiered_and_clustered() -> None:
    """What is left behind a crop selects as if the prompt had been read at once."""
    model = build_model("llama")
    options: dict[str, Any] = dict(budget=24, gpu_memory=150_000, **SMALL_ZONES)
    cache = SpinCache(model, **options)
    first = answer(model, random_tokens(1, 200), cache).sequences
    ids = torch.cat([edited(first, 120), random_tokens(1, 9, seed=1)], 1)
    answer(model, ids, cache)
    assert cache.get_seq_length() == ids.shape[1] + 4
    cache.check_integrity()


def test_tokens_follow_their_sequences() -> None:
    """Behind selections, copies and beams the history is known."""
    model = build_model("llama")
    cache = SpinCache(model, budget=1 << 20)
    ids = answer(model, random_tokens(3, 40), cache).sequences
    cache.batch_select_indices(torch.tensor([2, 0]))
    twin = copy.deepcopy(cache)
    for held, rows in ((cache, [2, 0]), (twin, [2, 0])):
        assert_fresh(model, torch.cat([ids[rows], random_tokens(2, 5, seed=4)], 1), held)
    assert_fresh(model, edited(ids[[2, 0]], 30), cache)


def test_prompts_as_embeddings_are_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    """The cache does not know their ids."""
    model = build_model("llama")
    cache, ids = SpinCache(model, budget=1 << 20), random_tokens(1, 40)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
    assert_fresh(model, torch.cat([ids, random_tokens(1, 5, seed=1)], 1), cache)
    assert WARNING not in caplog.text


def test_only_new_tokens_are_not_compared() -> None:
    """transformers takes the ids for new ones where the mask is longer."""
    model = build_model("llama")
    cache, ids = SpinCache(model, budget=1 << 20), random_tokens(1, 40)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    new = random_tokens(1, 5, seed=1)
    ours = answer(model, new, cache, attention_mask=torch.ones(1, 45, dtype=torch.long)).sequences
    theirs = answer(model, torch.cat([ids, new], 1), DynamicCache(config=model.config)).sequences
    assert torch.equal(ours[:, 5:], theirs[:, 45:])


def test_models_are_left_as_they_were() -> None:
    model = copy.deepcopy(build_model("llama"))
    cache = SpinCache(model)
    assert "_prefill" in vars(model)
    twin = copy.deepcopy(model)
    assert_fresh(twin, random_tokens(1, 20), SpinCache(twin, budget=1 << 20))
    del cache
    assert "_prefill" not in vars(model)


def test_a_crop_forgets_the_ids_of_its_tokens() -> None:
    """Otherwise they could be taken for those of tokens that come later and are not known."""
    model = build_model("llama")
    cache, ids = SpinCache(model, budget=1 << 20), random_tokens(1, 60)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    cache.crop(-20)
    assert torch.equal(state_of(cache).tokens.ids(40), ids[:, :40])
    assert state_of(cache).tokens.ids(60) is None
