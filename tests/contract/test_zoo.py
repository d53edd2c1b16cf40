"""The zoo is a valid test bed: its oracle is right, and a cache that loses tokens is detected."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import Cache

from tests.support.all_modes import MODES
from tests.support.compare import RELATIVE_TOLERANCE, Trace, assert_same, difference
from tests.support.families import FAMILIES
from tests.support.subjects import DenseSubject
from tests.support.zoo import oracle_model, random_tokens

PAGE = 8
each_family = pytest.mark.parametrize("family", FAMILIES)


@functools.cache
def _prefilled(family: str) -> Cache:
    cache = DenseSubject(family).new()
    with torch.no_grad():
        oracle_model(family)(random_tokens(1, 69), past_key_values=cache)
    return cache


def _next_logits(family: str, cache: Cache) -> torch.Tensor:
    with torch.no_grad():
        return oracle_model(family)(random_tokens(1, 1, seed=1), past_key_values=cache).logits[0, -1]


@each_family
def test_cached_steps_equal_one_forward_without_cache(family: str) -> None:
    trace = MODES["greedy"](DenseSubject(family))
    sequence = trace.tokens[-1][1]
    with torch.no_grad():
        logits = oracle_model(family)(sequence[:, :-1], use_cache=False).logits
    whole = Trace(tokens=trace.tokens)
    for step, position in enumerate(range(sequence.shape[1] - 20 - 1, sequence.shape[1] - 1)):
        whole.add_logits(f"greedy step {step}", logits[:, position])
    assert_same(trace, whole)


@each_family
def test_greedy_choices_are_no_ties(family: str) -> None:
    """Rounding moves a logit by about 1e-6 of the largest; the two best must be farther apart than that."""
    for label, logits in MODES["greedy"](DenseSubject(family)).logits:
        best, second = logits.topk(2).values.unbind(-1)
        assert float(((best - second) / logits.abs().max()).min()) > 1e-4, label


@each_family
def test_a_lost_page_is_noticed(family: str) -> None:
    """Values of one page of one KV head of one layer set to zero: for nearly all pages far above the tolerance."""
    whole = _prefilled(family)
    expected = _next_logits(family, copy.deepcopy(whole))
    off = []
    for index, layer in enumerate(whole.layers):
        if getattr(layer, "keys", None) is None or whole.is_sliding[index]:
            continue
        for page in range(69 // PAGE):
            damaged = copy.deepcopy(whole)
            damaged.layers[index].values[:, 0, page * PAGE : (page + 1) * PAGE] = 0
            off.append(difference(_next_logits(family, damaged), expected))
    assert not off or sum(each > 10 * RELATIVE_TOLERANCE for each in off) >= 0.8 * len(off)


@each_family
def test_a_lost_window_is_noticed(family: str) -> None:
    whole = _prefilled(family)
    expected = _next_logits(family, copy.deepcopy(whole))
    for index, layer in enumerate(whole.layers):
        if getattr(layer, "keys", None) is None or not whole.is_sliding[index]:
            continue
        damaged = copy.deepcopy(whole)
        damaged.layers[index].keys = damaged.layers[index].keys.roll(1, dims=2)
        assert difference(_next_logits(family, damaged), expected) > 10 * RELATIVE_TOLERANCE


@each_family
def test_drafts_are_accepted_in_part(family: str) -> None:
    """Else assisted decoding would only ever crop everything, or nothing."""
    if "assisted" in FAMILIES[family].limits():
        return
    subject = DenseSubject(family)
    cropped: list[int] = []
    make = subject._make

    def spied() -> Cache:
        cache = make()
        crop = cache.crop
        cache.crop = lambda tokens: (cropped.append(tokens), crop(tokens))[1]  # type: ignore[method-assign]
        return cache

    subject._make = spied  # type: ignore[method-assign]
    MODES["assisted"](subject)
    assert any(tokens == 0 for tokens in cropped) or any(tokens > -4 for tokens in cropped)
    assert any(tokens < 0 for tokens in cropped)
