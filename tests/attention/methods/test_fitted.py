"""Fitted: its formulas against float64 from what the cache stores, its recipe, and whole units.


weight      of a page: sum over its tokens of exp(scale * q . key), keys decoded as `fitted_codes.py` documents
select      mean over the group of weight / (weights of candidates and sinks); the best `budget` pages
estimate    every other candidate: its decoded mean value, with its weight, in the softmax of what is read
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from spin_hf import Bisection, Fitted, OptionError, SpinCache
from spin_hf.attention.methods import KernelRecipe, Rating
from spin_hf.attention.methods.base import check_recipe
from spin_hf.indexing.fit import fitted_of
from spin_hf.indexing.span_runs import cut, in_whole_units
from tests.support.cache_driver import CacheDriver, RandomKV, Shape, poisoned_memory
from tests.support.clustering_methods import little_slack
from tests.support.fitted import SHAPE, ZONES, Small, fits_of, new_driver
from tests.support.inspection import forward_of, state_of


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory(), little_slack():
        yield


# ----------------------------------------------------------------------------------------------------------- formulas


def decoded(cache: SpinCache, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys [B, H, N, P, D], which of them are valid, and mean values [B, H, N, Dv], from stored codes, in float64."""
    state = state_of(cache)
    of_layer = state.layers[layer]
    store, held = of_layer.store, fitted_of([of_layer], state.method)
    assert store is not None
    assert held is not None
    fit = {name: tensor.double() for name, tensor in held.items()}
    pages = state.sequences.length // 4
    summary = {name: store.summary(name)[:, :, :pages] for name in store.summaries}

    def levels(codes: Tensor, size: int) -> Tensor:
        """Two numbers in each of the first size / 8 bytes, four in each of the others; zeros behind them."""
        fine, rough = codes[..., : size // 8].int(), codes[..., size // 8 :].int()
        first = torch.stack([fine & 15, fine >> 4], -1).flatten(-2) - 7.5
        second = torch.stack([rough >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2) - 1.5
        return torch.nn.functional.pad(torch.cat([first, second], -1), (0, size // 4)).double()

    inside = (
        levels(summary["codes"], 16) * fit["key_widths"][:, :, None, None] * summary["scale"].double().unsqueeze(-1)
    )
    inside = inside + summary["mean"].double().unsqueeze(3)
    keys = inside @ fit["key_inverse"].mT.unsqueeze(2) + fit["key_origin"][:, :, None, None]
    means = (
        levels(summary["value"], 16) * fit["value_widths"].unsqueeze(2) * summary["value_scale"].double().unsqueeze(-1)
    )
    values = means @ fit["value_axes"].mT + fit["value_origin"].unsqueeze(2)
    return keys.numpy(), (summary["scale"] > 0).numpy(), values.numpy()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tokens", [36, 301])
def test_steps_are_those_of_the_formulas(tokens: int, padded: bool) -> None:
    """Before the first fit and after it."""
    kv = RandomKV.random(SHAPE, 2, tokens + 1, seed=tokens)
    valid = torch.ones(2, tokens + 1, dtype=torch.bool)
    if padded:
        valid[1, :9] = False
    driver = CacheDriver(SHAPE, method=Small(), **ZONES)
    for stop in (tokens - 1, tokens):
        driver.step(kv, 0 if stop < tokens else tokens - 1, stop, valid[:, :stop].long())
    assert (fits_of(driver.cache)[0] is not None) == (tokens > 36)
    outputs = driver.step(kv, tokens, tokens + 1, valid.long())
    for layer in range(SHAPE.layers):
        store = driver.cache.paged_layers[layer].store
        assert store is not None
        exact = [part.double().numpy() for part in store.pages(store.sequences.num_pages)]
        coded, counts, means = decoded(driver.cache, layer)
        zones = forward_of(driver.cache).zones.query(tokens, torch.device("cpu"))
        for b in range(2):
            for h in range(SHAPE.kv_heads):
                queries = kv.queries[layer][b, h * 2 : h * 2 + 2, tokens].double().numpy() * driver.scale
                candidates = [int(page) for page in zones.candidates[b].nonzero()]
                fixed = [int(page) for page in zones.fixed[b] if page >= 0]
                sinks = [page for page in fixed if page < candidates[0]]
                weights = np.exp(np.einsum("gd,npd->gnp", queries, coded[b, h])) * counts[b, h]
                weights = weights.sum(2)
                shares = (weights / weights[:, candidates + sinks].sum(1, keepdims=True)).mean(0)
                best = sorted(candidates, key=lambda page: -shares[page])[:4]
                read = [
                    t for page in fixed + best for t in range(page * 4, page * 4 + 4) if t <= tokens and valid[b, t]
                ]
                rest = [page for page in candidates if page not in best]
                for g in range(2):
                    at = np.exp(queries[g] @ exact[0][b, h, read].T)
                    total = at.sum() + weights[g, rest].sum()
                    expected = (at @ exact[1][b, h, read] + weights[g, rest] @ means[b, h, rest]) / total
                    found = outputs[layer][b, 0, h * 2 + g].double().numpy()
                    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_everything_is_exact() -> None:
    kv = RandomKV.random(SHAPE, 2, 200, seed=1)
    some, other = (new_driver(kv, 190, budget=budget) for budget in (190, 10_000))
    for stop in range(191, 200):
        for ours, theirs in zip(some.step(kv, stop - 1, stop), other.step(kv, stop - 1, stop), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_its_recipe_is_checked() -> None:
    check_recipe(Fitted())

    class WithPages(Fitted):
        unit_pages: ClassVar[int] = 1

    class WithoutCodes(Fitted):
        recipe = KernelRecipe(Rating.MEAN)

    class WithVectors(Fitted):
        recipe = KernelRecipe(Rating.MEAN, scans_codes=True)

        def summary_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
            return super().summary_shapes(head_dim, value_dim) | {"value": (value_dim,)}

    with pytest.raises(OptionError, match="expected unit_pages of 4, as its recipe has scans_codes=True, got 1"):
        check_recipe(WithPages())
    with pytest.raises(OptionError, match="expected unit_pages of 1, as its recipe has scans_codes=False, got 4"):
        check_recipe(WithoutCodes())
    with pytest.raises(OptionError, match="expected the summaries of CodedPages"):
        check_recipe(WithVectors())


def test_heads_of_other_sizes_than_multiples_of_16_have_no_kernels() -> None:
    assert not Fitted().recipe.serves(24, 32)
    assert not Fitted().recipe.serves(32, 72)
    assert Fitted().recipe.serves(16, 80)
    assert Bisection().recipe.serves(24, 24)


def test_summaries_take_a_tenth() -> None:
    shape = Shape(key_dim=64, value_dim=64)
    driver = CacheDriver(shape, method="fitted", **ZONES)
    kv = RandomKV.random(shape, 1, 100, seed=0).to(torch.bfloat16)
    driver.step(kv, 0, 99)
    store = driver.cache.paged_layers[0].store
    assert store is not None
    assert store.budget.summary_bytes == (64 + 4) // 4 + 4 * (16 + 2) + (16 + 2)
    assert store.budget.summary_bytes < 0.105 * store.budget.page_bytes
    mean, codes = (store.summaries[name].values for name in ("mean", "codes"))
    assert mean.num_rows * 4 == codes.num_rows
    assert store.gpu_bytes(4) == store.budget.rows(4) * (store.budget.page_bytes + store.budget.summary_bytes)


# -------------------------------------------------------------------------------------------------------- whole units


def test_units() -> None:
    may_move = torch.tensor([[False] + [True] * 12 + [False] + [True] * 5])
    assert in_whole_units(may_move, 4)[0].nonzero().flatten().tolist() == list(range(4, 12))
    assert in_whole_units(may_move, 1) is may_move
    for length in range(8, 60, 4):
        stops = cut([False] * 4 + [True] * (length - 4), 16, 4)
        assert all(stop % 4 == 0 for stop in stops)
        assert stops[-1] <= length
        assert length - stops[-1] < 4 * len(stops)
        assert max(b - a for a, b in zip([4, *stops], stops, strict=False)) <= 16


@pytest.mark.parametrize("padding", [0, 1, 6, 16, 37])
def test_spans_and_runs_are_whole_units(padding: int) -> None:
    kv = RandomKV.random(SHAPE, 2, 300, seed=2)
    valid = torch.ones(2, 300, dtype=torch.long)
    valid[1, :padding] = 0
    driver = CacheDriver(SHAPE, method=Small(), **ZONES)
    start = 0
    for stop in (199, 200, 260, 261, 280):
        driver.step(kv, start, stop, valid[:, :stop])
        start = stop
        driver.cache.check_integrity()
    spans = state_of(driver.cache).sequences.spans
    assert len(spans.stops) > 3
    assert all(stop % 4 == 0 for stop in spans.stops)
    for row in spans.clustered:
        units = row.unflatten(0, (-1, 4))
        assert torch.equal(units.any(1), units.all(1))
        assert not units[0].any()


@pytest.mark.parametrize("removed", range(1, 18))
def test_a_crop_inside_a_unit(removed: int) -> None:
    """The mean of a unit is that of the pages left, whether or not the tokens come back."""
    kv = RandomKV.random(SHAPE, 2, 140, seed=3)
    driver = new_driver(kv, 120)
    driver.cache.crop(-removed)
    driver.cache.check_integrity()
    driver.step(kv, 120 - removed, 121 - removed)
    driver.cache.check_integrity()
