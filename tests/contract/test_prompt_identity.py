"""What tells stored prompts apart beside their tokens: weights, adapters, method, options, and how a prompt was read."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from spin_hf import SpinCache
from spin_hf.persistence.prompt_identity import space_of
from tests.support.answers import answer, assert_fresh
from tests.support.stores import Maker, store_maker
from tests.support.zoo import build_model, random_tokens


@pytest.fixture(params=["memory", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Maker:
    return store_maker(request.param, tmp_path)


def test_adapters_tell_models_apart() -> None:
    """A disabled adapter has the same weights as an enabled one."""
    model = build_model("llama")
    plain = space_of(SpinCache(model))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["v_proj"], r=2, init_lora_weights=False), model)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    enabled = space_of(SpinCache(model))
    for layer in layers:
        layer.enable_adapters(False)
    assert len({plain, enabled, space_of(SpinCache(model))}) == 3
    for layer in layers:
        layer.enable_adapters(True)
    assert space_of(SpinCache(model)) == enabled


def test_other_weights_methods_and_options(make: Maker) -> None:
    """Keys of other weights are never restored; another method's entries neither."""
    model, ids, store = copy.deepcopy(build_model("llama")), random_tokens(1, 40), make()
    answer(model, ids, SpinCache(model, budget=1 << 20, store=store))
    answer(model, ids, SpinCache(model, "shadowkv", budget=1 << 20, store=store))
    assert store.stats().hits == 0
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 1.0
    assert_fresh(model, ids, SpinCache(model, budget=1 << 20, store=store))
    assert store.stats().hits == 0
    twin = copy.deepcopy(model)
    assert_fresh(twin, ids, SpinCache(twin, budget=1 << 20, store=store))
    assert store.stats().hits == (0 if store.directory is None else 1), "entries in memory belong to one model object"


def test_a_prompt_that_was_read_sparsely_is_for_such_caches(make: Maker) -> None:
    """Its keys are approximate from the second layer on."""
    model, ids, store = build_model("llama"), random_tokens(1, 700), make()
    more = torch.cat([ids, random_tokens(1, 9, seed=1)], 1)
    for options, hits in (
        ({"prefill": "sparse"}, 0), ({}, 0), ({"prefill": "sparse", "prefill_top_p": 0.5}, 0), ({"prefill": "sparse"}, 1),
    ):  # fmt: skip
        answer(model, more if hits else ids, SpinCache(model, store=store, **options))
        assert store.stats().hits == hits
