"""The oracle against every subset there is, the masks against a 4-D mask, and how many tokens are attended to."""

from __future__ import annotations

import itertools
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from benchmarks.quality import chosen_tokens, quality
from benchmarks.quality.chosen_tokens import RECENT, SINKS, Chosen, Mass, always, best_tokens, chooser, recent_tokens
from spin_hf import SpinCache
from tests.support.zoo import build_model

LENGTH = 160


def _weights(heads: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(heads, tokens, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def _prefilled(model: Any, length: int = LENGTH) -> tuple[DynamicCache, Tensor]:
    tokens = torch.randint(3, 100, (1, length + 1), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :-1], past_key_values=cache)
    return cache, tokens[:, -1:]


def _step(model: Any, cache: DynamicCache, token: Tensor, **given: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(token, past_key_values=deepcopy(cache), **given).logits[0, -1]
    return logits


def test_the_oracle_is_the_best_of_all_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen_tokens, "SINKS", 1)
    monkeypatch.setattr(chosen_tokens, "RECENT", 2)
    weights = _weights(3, 9)
    for kept in (3, 4, 6, 9):
        chosen = best_tokens(weights, torch.full((3,), kept))
        for head, row in enumerate(weights):
            subsets = [{0, 7, 8, *more} for more in itertools.combinations(range(1, 7), kept - 3)]
            best = max(subsets, key=lambda subset: float(row[list(subset)].sum()))
            assert set(chosen[head].nonzero().flatten().tolist()) == best


def test_counts_differ_by_head_and_what_is_always_kept_is() -> None:
    weights = _weights(3, 200)
    chosen = best_tokens(weights, torch.tensor([0, 100, 200]))
    assert chosen.sum(1).tolist() == [SINKS + RECENT, 100, 200]
    assert chosen[:, always(200)].all()


@pytest.mark.parametrize("name", ["oracle", "window"])
@pytest.mark.parametrize("kept", [SINKS + RECENT, 100, 200, 300])
def test_choices_have_the_number_that_was_asked_for(name: str, kept: int) -> None:
    chosen = chooser(name, kept)(_weights(2, 200))
    assert chosen.sum(1).tolist() == [min(kept, 200)] * 2
    assert chosen[:, always(200)].all()


def test_an_unknown_choice_is_an_error() -> None:
    with pytest.raises(ValueError, match="oracle or window"):
        chooser("shadowkv", 100)


def test_attention_is_that_of_the_chosen_tokens_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, n, 8, generator=generator) for heads, n in ((4, 1), (2, 90), (2, 90)))
    mask = torch.rand(2, 90, generator=generator) < 0.4
    out = Chosen(None, lambda weights: mask).attend(0, query, key, value, 0.3)
    for head in range(4):
        keys, values = key[0, head // 2][mask[head // 2]], value[0, head // 2][mask[head // 2]]
        expected = (query[0, head, 0] @ keys.T * 0.3).softmax(-1) @ values
        torch.testing.assert_close(out[0, 0, head], expected)


def test_everything_is_dense_and_a_window_is_a_mask() -> None:
    model = build_model("llama").eval()
    cache, token = _prefilled(model)
    dense, before = _step(model, cache, token), model.config._attn_implementation
    with Chosen(model, chooser("oracle", LENGTH + 1)):
        torch.testing.assert_close(_step(model, cache, token), dense, rtol=0, atol=2e-4)
    with Chosen(model, chooser("window", 100)):
        windowed = _step(model, cache, token)
    assert model.config._attn_implementation == before
    mask = recent_tokens(torch.zeros(1, LENGTH + 1), 100)[None, None]
    torch.testing.assert_close(windowed, _step(model, cache, token, attention_mask=mask), rtol=0, atol=2e-4)
    assert (windowed - dense).abs().max() > 0.01


def test_layers_with_a_window_of_their_own_stay_as_they_are() -> None:
    model = build_model("gemma3_text").eval()
    cache, token = _prefilled(model)
    asked = []

    def choose(weights: Tensor) -> Tensor:
        asked.append(weights.shape[1])
        return torch.ones_like(weights, dtype=torch.bool)

    with Chosen(model, choose):
        _step(model, cache, token)
    kinds = model.config.layer_types
    assert 0 < kinds.count("full_attention") < len(kinds)
    assert asked == [LENGTH + 1] * kinds.count("full_attention")


def test_mass_is_a_mean_over_steps_by_layer_and_head() -> None:
    mass = Mass()
    for seed in range(3):
        weights = _weights(2, 100, seed)
        mass.add(4, weights, recent_tokens(weights, 80))
        mass.add(1, weights, torch.ones_like(weights, dtype=torch.bool))
    assert mass.layers == [1, 4]
    torch.testing.assert_close(mass.kept[0], torch.ones(2).double(), rtol=0, atol=1e-6)
    kept = [_weights(2, 100, seed)[:, [*range(4), *range(24, 100)]].sum(1) for seed in range(3)]
    torch.testing.assert_close(mass.kept[1], torch.stack(kept).mean(0).double())
    assert (mass.best[1] > mass.kept[1]).all()


def test_what_is_recorded_of_a_spin_cache_is_what_it_attends_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "EVERY", 1)
    model = build_model("llama").eval()
    dense, token = _prefilled(model)
    cache = SpinCache.from_cache(dense, model, "shadowkv", budget=24)
    counts: list[int] = []

    class Counting(Mass):
        def add(self, layer: int, weights: Tensor, chosen: Tensor) -> None:
            counts.extend(chosen.sum(1).tolist())
            super().add(layer, weights, chosen)

    mass = Counting()
    with quality.recording(mass), torch.no_grad():
        model(token, past_key_values=cache)
    attended = cache.stats().attended_tokens
    assert sum(counts) / len(counts) == pytest.approx(attended)
    assert len(mass.layers) == model.config.num_hidden_layers
    assert (mass.kept <= mass.best + 1e-6).all()
    with Chosen(model, chooser("oracle", round(attended)), twin := Mass()):
        _step(model, dense, token)
    torch.testing.assert_close(twin.kept, twin.best, rtol=0, atol=1e-6)
    assert twin.kept[0].sum() >= mass.kept[0].sum() - 1e-3  # of the first layer, where both see the same queries
