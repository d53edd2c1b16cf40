"""The basis that `Fitted` fits: once per sequence, to its first clustered pages; crops, forks, beams and files."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_hf import Fitted, SavedCacheError, SpinCache
from spin_hf.attention.methods import fitted_codes
from tests.support.cache_driver import CacheDriver, RandomKV, poisoned_memory
from tests.support.clustered_pages import span_ends
from tests.support.clustering_methods import little_slack
from tests.support.fitted import SHAPE, ZONES, Small, fits_of, new_driver
from tests.support.inspection import state_of
from tests.support.saved_caches import assert_goes_on, change_json, prefilled, read_json
from tests.support.tuning import tune
from tests.support.zoo import subject_model


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory(), little_slack():
        yield


def equal(some: list[Any], others: list[Any]) -> bool:
    pairs = [(held[name], other[name]) for held, other in zip(some, others, strict=True) for name in held]
    return all(torch.equal(held, other) for held, other in pairs)


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
        def measure(self, keys: Tensor, values: Tensor, observation_queries: Tensor | None) -> Any:
            seen.append((keys, values, observation_queries))
            return super().measure(keys, values, observation_queries)

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


@pytest.mark.parametrize(
    ("index_bytes", "gpu_memory", "calls"), [(1 << 29, None, 1), (14_000, None, 1), (14_000, 18_000, 2), (1, None, 2)]
)
def test_groups_of_layers_are_fitted_together(
    index_bytes: int, gpu_memory: int | None, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one fit costs as many launches as another; not if pages would be read from host memory twice."""
    kv = RandomKV.random(SHAPE, 1, 120, seed=5)
    expected = fits_of(new_driver(kv, 100).cache)
    tune(monkeypatch, index_bytes=index_bytes)
    fitted: list[int] = []

    class Noting(Small):  # type: ignore[misc, valid-type]
        def fit(self, measured: dict[str, Tensor]) -> Any:
            fitted.append(len(measured["key_mean"]))
            return super().fit(measured)

    driver = new_driver(kv, 100, method=Noting(), gpu_memory=gpu_memory or "auto")
    assert len(fitted) == calls
    assert sum(fitted) == 2
    for one, other in zip(fits_of(driver.cache), expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
    driver.cache.check_integrity()


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
    made = method.fit(method.measure(keys, values, None))
    shapes, dtypes = method.fitted_shapes(6, 10), method.fitted_dtypes()
    assert {name: tuple(tensor.shape[2:]) for name, tensor in made.items()} == shapes
    assert all(tensor.dtype == dtypes.get(name, torch.float32) for name, tensor in made.items())
    assert {name: tuple(tensor.shape) for name, tensor in method.unfitted(6, 10, torch.device("cpu")).items()} == shapes
    assert fitted_codes.num_coordinates(6) == 16
