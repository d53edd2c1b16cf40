"""Masks that are more than padding are applied densely and exactly: all tokens held, each query by its row of the mask.

In every form (boolean or additive, one for all heads or one per head), with pages in any tier, and unwritten memory poisoned.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.cache_driver import CacheDriver, RandomKV, Shape, poisoned_memory, smallest_gpu_memory
from tests.support.conversation import TOLERANCE, random_pages
from tests.support.oracle import Rules, attention

SHAPE = Shape(layers=1, kv_heads=2, group=2, value_dim=5)
STOPS = [90, 91, 96, 117]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory():
        yield


def hiding_mask(heads: int, queries: int, keys: int, seed: int) -> Tensor:
    """Which tokens each query may attend to [2, heads, queries, keys]: itself and about two thirds of the earlier ones."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.arange(keys - queries, keys)[:, None]
    tokens = torch.arange(keys)
    seen = torch.rand((2, heads, queries, keys), generator=generator) < 0.67
    return (tokens <= own) & (seen | (tokens == own))


def expected_step(kv: RandomKV, allowed: Tensor, start: int, rules: Rules, sinks: Tensor | None) -> np.ndarray:
    keys, values, queries = (x[0].double().numpy() for x in (kv.keys, kv.values, kv.queries))
    allowed = allowed.expand(-1, SHAPE.heads, -1, -1)
    result = np.zeros((2, allowed.shape[2], SHAPE.heads, SHAPE.value_dim))
    for b, head, i in np.ndindex(2, SHAPE.heads, allowed.shape[2]):
        h, tokens = head // SHAPE.group, allowed[b, head, i].nonzero().flatten().tolist()
        logit = None if sinks is None else float(sinks[head])
        query = queries[b, head, start + i]
        result[b, i, head] = attention(rules, keys[b, h], values[b, h], tokens, query, logit)
    return result


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "softcap and sinks"])
@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("heads", [1, SHAPE.heads])
@pytest.mark.parametrize("form", ["bool", "-inf", "lowest"])
def test_as_given(form: str, heads: int, tight: bool, plain: bool) -> None:
    kv = random_pages(SHAPE, 2, STOPS[-1], seed=0)
    sinks = None if plain else torch.tensor([1.0, -1.0, 0.5, 2.0])
    rules = Rules(budget=16, scale=SHAPE.key_dim**-0.5, softcap=None if plain else 2.0)

    def run(cap: int | None) -> None:
        options: dict[str, Any] = {} if cap is None else dict(gpu_memory=cap)
        driver = CacheDriver(
            SHAPE, budget=16, num_sink_tokens=4, recent_window=8, softcap=rules.softcap, sink_logits=sinks, **options
        )
        start = 0
        for stop in STOPS:
            allowed = hiding_mask(heads, stop - start, stop, seed=stop)
            mask = allowed
            if form != "bool":
                lowest = -torch.inf if form == "-inf" else torch.finfo(torch.float32).min
                mask = torch.zeros(allowed.shape).masked_fill(~allowed, lowest)
            (out,) = driver.step(kv, start, stop, mask)
            worst = float(np.abs(out.double().numpy() - expected_step(kv, allowed, start, rules, sinks)).max())
            assert worst <= TOLERANCE, f"tokens [{start}, {stop}): off by {worst:.1e}"
            start = stop
        driver.cache.check_integrity()
        assert driver.cache.stats().sparse_queries == 0

    if tight:
        smallest_gpu_memory(run)
    else:
        run(None)


@pytest.mark.parametrize("form", ["bool", "additive"])
def test_of_a_single_first_token(form: str) -> None:
    """[B, 1, 1, 1] over one token: it may attend to itself."""
    kv = random_pages(SHAPE, 2, 3, seed=1)
    driver = CacheDriver(SHAPE, budget=16)
    mask = torch.ones((2, 1, 1, 1), dtype=torch.bool) if form == "bool" else torch.zeros((2, 1, 1, 1))
    (out,) = driver.step(kv, 0, 1, mask)
    expected = kv.values[0][:, :, :1].repeat_interleave(SHAPE.group, 1).transpose(1, 2)
    assert float((out - expected).abs().max()) <= TOLERANCE
