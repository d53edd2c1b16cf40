"""Fitted: its formulas against float64 from what the cache stores, whole units, and the life of what is fitted.

weight      of a page: sum over its tokens of exp(scale * q . key), keys decoded as `fitted_codes.py` documents
select      mean over the group of weight / (weights of candidates and sinks); the best `budget` pages
estimate    every other candidate: its decoded mean value, with its weight, in the softmax of what is read
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from spin_hf import Bisection, Fitted, OptionError, SavedCacheError, SpinCache
from spin_hf.attention.methods import KernelRecipe, Rating, fitted_codes
from spin_hf.attention.methods.base import check_recipe
from spin_hf.indexing.fit import fitted_of
from spin_hf.indexing.span_runs import cut, in_whole_units
from tests.support.cache_driver import CacheDriver, RandomKV, Shape, poisoned_memory
from tests.support.clustered_pages import span_ends
from tests.support.clustering_methods import clustering_often, little_slack
from tests.support.inspection import forward_of, state_of
from tests.support.saved_caches import assert_goes_on, change_json, prefilled, read_json
from tests.support.zoo import subject_model

SHAPE = Shape(layers=2, kv_heads=2, group=2, key_dim=8, value_dim=6)
ZONES: dict[str, Any] = dict(budget=16, num_sink_tokens=4, recent_window=8)
Small = clustering_often(Fitted, 64, 24)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory(), little_slack():
        yield


def new_driver(kv: RandomKV, tokens: int, **options: Any) -> CacheDriver:
    """A cache that has read a prompt and one token more, so that it is clustered."""
    driver = CacheDriver(kv.shape, **({"method": Small()} | ZONES | options))
    driver.step(kv, 0, tokens - 1)
    driver.step(kv, tokens - 1, tokens)
    return driver


def fits_of(cache: SpinCache) -> list[Any]:
    return [layer.fitted for layer in state_of(cache).layers]


def equal(some: list[Any], others: list[Any]) -> bool:
    pairs = [(held[name], other[name]) for held, other in zip(some, others, strict=True) for name in held]
    return all(torch.equal(held, other) for held, other in pairs)


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


# ------------------------------------------------------------------------------------------------ what is fitted


def test_it_is_fitted_once() -> None:
    kv = RandomKV.random(SHAPE, 2, 400, seed=4)
    driver = CacheDriver(SHAPE, method=Small(), **ZONES)
    driver.step(kv, 0, 40)
    driver.step(kv, 40, 41)
    assert fits_of(driver.cache) == [None, None]
    assert not span_ends(driver)
    driver.step(kv, 41, 120)
    driver.step(kv, 120, 121)
    fits = fits_of(driver.cache)
    assert all(held is not None for held in fits)
    before = len(span_ends(driver))
    driver.cache.check_integrity()  # pages that were summarised before the fit, too
    for stop in range(122, 200):
        driver.step(kv, stop - 1, stop)
    assert len(span_ends(driver)) > before
    assert all(now is held for now, held in zip(fits_of(driver.cache), fits, strict=True))
    driver.cache.check_integrity()
    first = fits[0]["key_forward"].float()
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[:, 0], first[:, 1])
    inverse = fits[0]["key_inverse"].float()
    torch.testing.assert_close(first @ inverse.mT, torch.eye(8).expand(2, 2, 8, 8), rtol=0, atol=0.1)


def test_it_is_fitted_to_the_first_clustered_pages() -> None:
    kv = RandomKV.random(SHAPE, 1, 120, seed=5)
    seen: list[Any] = []

    class Noting(Small):  # type: ignore[misc, valid-type]
        def fit(self, keys: Tensor, values: Tensor, observation_queries: Tensor | None) -> Any:
            seen.append((keys, values, observation_queries))
            return super().fit(keys, values, observation_queries)

    driver = new_driver(kv, 100, method=Noting())
    ((keys, values, queries),) = seen
    store = driver.cache.paged_layers[1].store
    assert store is not None
    held = store.pages(store.sequences.num_pages)
    stop = span_ends(driver)[0]
    for part, of_pages in zip((keys, values), held, strict=True):
        assert torch.equal(part[1].flatten(1, 2), of_pages[0, :, 16 : stop * 4])
    assert queries.shape == (2, 2, 2, 32, 8)
    torch.testing.assert_close(queries[1, 0, 0, 0], kv.queries[1][0, 0, 98] * driver.scale)


def test_crops() -> None:
    kv = RandomKV.random(SHAPE, 2, 300, seed=6)
    driver = new_driver(kv, 250)
    fits, first = fits_of(driver.cache), span_ends(driver)[0]
    driver.cache.crop(-3)
    driver.cache.crop(-(247 - (first * 4 + 30)))
    assert span_ends(driver)
    assert all(now is held for now, held in zip(fits_of(driver.cache), fits, strict=True))
    driver.cache.check_integrity()
    driver.cache.crop(-32)  # into the first span
    assert not span_ends(driver)
    assert fits_of(driver.cache) == [None, None]
    driver.cache.check_integrity()
    length = driver.cache.get_seq_length()
    driver.step(kv, length, length + 90)
    driver.step(kv, length + 90, length + 91)
    assert fits_of(driver.cache)[0] is not None
    driver.cache.check_integrity()
    driver.cache.crop(-(length + 91))
    assert fits_of(driver.cache) == [None, None]
    driver.cache.reset()
    one = kv.rows([0])
    driver.step(one, 0, 120)  # another batch size
    driver.step(one, 120, 121)
    assert fits_of(driver.cache)[0]["key_origin"].shape == (1, 2, 8)
    driver.cache.check_integrity()
    driver.cache.reset()
    assert fits_of(driver.cache) == [None, None]


def test_sequences_take_it_along() -> None:
    kv = RandomKV.random(SHAPE, 2, 200, seed=7)
    driver = new_driver(kv, 120)
    before = fits_of(driver.cache)
    driver.cache.reorder_cache(torch.tensor([1, 0]))
    for held, now in zip(before, fits_of(driver.cache), strict=True):
        assert all(torch.equal(now[name], held[name][[1, 0]]) for name in held)
    driver.cache.batch_repeat_interleave(2)
    for held, now in zip(before, fits_of(driver.cache), strict=True):
        assert all(torch.equal(now[name], held[name][[1, 1, 0, 0]]) for name in held)
    driver.step(kv.rows([1, 1, 0, 0]), 120, 121)
    driver.cache.check_integrity()


def test_beams_that_part_before_the_first_fit() -> None:
    """Their first spans differ, so do their fits. They own all their pages from then on."""
    kv = RandomKV.random(SHAPE, 1, 40, seed=8).rows([0, 0])
    driver = CacheDriver(SHAPE, method=Small(), **ZONES)
    driver.step(kv.rows([0]), 0, 30)
    driver.cache.batch_repeat_interleave(2)
    more = RandomKV.random(SHAPE, 2, 300, seed=9)
    driver.step(more, 30, 200)
    driver.step(more, 200, 201)
    fits = fits_of(driver.cache)
    assert not torch.equal(fits[0]["key_forward"][0], fits[0]["key_forward"][1])
    sequences = state_of(driver.cache).sequences
    assert not set(sequences.directory[0]).intersection(sequences.directory[1])
    driver.cache.check_integrity()


def test_a_sequence_that_is_clustered_later() -> None:
    """Padded to its last tokens, it keeps the fixed basis, and is fitted when tokens of its own are clustered."""
    kv = RandomKV.random(SHAPE, 2, 400, seed=10)
    valid = torch.ones(2, 400, dtype=torch.long)
    valid[1, :110] = 0
    driver = CacheDriver(SHAPE, method=Small(), **ZONES)
    driver.step(kv, 0, 120, valid[:, :120])
    driver.step(kv, 120, 121, valid[:, :121])
    before = fits_of(driver.cache)[0]
    fixed = Fitted().unfitted(8, 6, torch.device("cpu"))
    assert all(torch.equal(before[name][1, 1], tensor) for name, tensor in fixed.items())
    driver.cache.check_integrity()
    driver.step(kv, 121, 200, valid[:, :200])
    driver.step(kv, 200, 201, valid[:, :201])
    after = fits_of(driver.cache)[0]
    assert all(torch.equal(after[name][0], before[name][0]) for name in fixed)
    assert not torch.equal(after["key_forward"][1], before["key_forward"][1])
    driver.cache.check_integrity()
    valid[0, 20:30] = 0  # the first span of all sequences is in position order again
    driver.step(kv, 201, 202, valid[:, :202])
    driver.cache.check_integrity()


def test_forks_share_it_and_copies_do_not() -> None:
    kv = RandomKV.random(SHAPE, 2, 300, seed=11)
    driver = new_driver(kv, 120)
    fits = fits_of(driver.cache)
    fork, twin = driver.cache.fork(), copy.deepcopy(driver.cache)
    for name in fits[0]:
        assert fits_of(fork)[0][name] is fits[0][name]
        assert fits_of(twin)[0][name].data_ptr() != fits[0][name].data_ptr()
    assert equal(fits_of(twin), fits)
    fork.crop(-100)
    assert fits_of(fork) == [None, None]
    fork.check_integrity()
    assert all(now is held for now, held in zip(fits_of(driver.cache), fits, strict=True))
    driver.cache.check_integrity()


@pytest.mark.parametrize("tokens", [24, 150])
@pytest.mark.parametrize("padded", [False, True])
def test_it_is_saved(tokens: int, padded: bool, tmp_path: Path) -> None:
    cache = prefilled("llama", method=Small(), tokens=tokens, padded=padded)
    assert (fits_of(cache)[0] is not None) == (tokens > 24)
    cache.save_pretrained(tmp_path)
    restored = SpinCache.from_pretrained(tmp_path, subject_model("llama"), Small())
    if tokens > 24:
        assert equal(fits_of(restored), fits_of(cache))
    restored.check_integrity()
    assert_goes_on(subject_model("llama"), cache, restored)


def test_saved_files_that_contradict_the_method(tmp_path: Path) -> None:
    def setting(value: bool | None) -> Any:
        def change(content: dict[str, Any]) -> None:
            for layer in content["layers"]:
                layer.pop("fitted", None)
                if value is not None:
                    layer["fitted"] = value

        return change

    model = subject_model("llama")
    prefilled("llama", method=Small(), tokens=150).save_pretrained(tmp_path)
    assert all(layer["fitted"] for layer in read_json(tmp_path)["layers"])
    for value, expected in ((False, "only if it is true"), (None, "bytes in")):
        change_json(tmp_path, setting(value))
        with pytest.raises(SavedCacheError, match=expected):
            SpinCache.from_pretrained(tmp_path, model, Small())
    prefilled("llama", method="shadowkv").save_pretrained(tmp_path)
    assert not any("fitted" in layer for layer in read_json(tmp_path)["layers"])
    change_json(tmp_path, setting(True))
    with pytest.raises(SavedCacheError, match="no fitted tensors in layer 0, as the method fits none"):
        SpinCache.from_pretrained(tmp_path, model)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e30])
def test_numbers_that_are_not_finite_stay_in_their_sequence(number: float) -> None:
    kv, bad = (RandomKV.random(SHAPE, 2, 130, seed=12) for _ in range(2))
    for states in (bad.keys[0], bad.values[1], bad.queries[1]):
        states[1, 1, 50:100] = number
    drivers = [new_driver(each, 120) for each in (kv, bad)]
    for stop in range(121, 130):
        ours, theirs = (driver.step(each, stop - 1, stop) for driver, each in zip(drivers, (bad, kv), strict=True))
        assert all(torch.equal(one[0], other[0]) for one, other in zip(ours, theirs, strict=True))
    fits = [fits_of(driver.cache)[0] for driver in drivers]
    assert all(torch.equal(one[0], other[0]) for one, other in zip(*(held.values() for held in fits), strict=True))
    assert all(bool(tensor.isfinite().all()) for tensor in fits[1].values())


def test_a_fit_without_queries_and_any_head_size() -> None:
    method = Fitted()
    keys, values = torch.randn(1, 2, 8, 4, 6), torch.randn(1, 2, 8, 4, 10)
    made = method.fit(keys, values, None)
    shapes, dtypes = method.fitted_shapes(6, 10), method.fitted_dtypes()
    assert {name: tuple(tensor.shape[2:]) for name, tensor in made.items()} == shapes
    assert all(tensor.dtype == dtypes.get(name, torch.float32) for name, tensor in made.items())
    assert {name: tuple(tensor.shape) for name, tensor in method.unfitted(6, 10, torch.device("cpu")).items()} == shapes
    assert fitted_codes.num_coordinates(6) == 16
