"""The interpreted kernels with descriptors of each row: logits and pages are those of each cache alone, step by step."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_hf import SpinCache
from spin_hf.backends.descriptors import bases_of
from spin_hf.backends.row_kernels import places_for, sizes_up_to
from spin_hf.kernels import device_limits
from spin_hf.serving.row_batch import RowBatch
from tests.support.cache_driver import CacheDriver, RandomKV, Shape, poisoned_memory
from tests.support.inspection import state_of
from tests.support.interpreted_kernels import interpret_kernels
from tests.support.row_kernels import kernels_for, step_of
from tests.support.seer_gates import RULES, method_of, rules_for
from tests.support.zoo import random_tokens, subject_model

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]

OPTIONS: dict[str, Any] = dict(budget=32, recent_window=16, dense_below=0)
MODES: dict[str, dict[str, Any]] = {
    "fitted": {},
    "bisection": {"method": "bisection"},
    "shadowkv": {"method": "shadowkv"},
    "quest": {"method": "quest"},
    "retroinfer": {"method": "retroinfer"},
    "frames": {"method": "shadowkv", "gpu_memory": 60_000},
    "int8 frames": {"gpu_memory": 60_000, "cpu_dtype": "int8"},
    "dense": {"method": "shadowkv", "budget": 1.0},
}


@pytest.fixture(autouse=True)
def _kernels_in_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    interpret_kernels(monkeypatch)
    with poisoned_memory():
        yield


class Twins:
    """A cache that is a row, and one with the same tokens that decodes alone."""

    def __init__(self, model: Any, length: int, seed: int, **options: Any) -> None:
        self.model, self.tokens = model, random_tokens(1, length + 40, seed=seed)
        self.row, self.alone = SpinCache(model, **options), SpinCache(model, **options)
        self.length = length
        with torch.no_grad():
            for cache in (self.row, self.alone):
                model(self.tokens[:, :length], past_key_values=cache)

    def next(self) -> tuple[int, torch.Tensor]:
        """The next token, and the logits behind it of the cache alone."""
        token = self.tokens[:, self.length : self.length + 1]
        self.length += 1
        with torch.no_grad():
            return int(token), self.model(token, past_key_values=self.alone).logits[0, -1]

    def check(self) -> None:
        """Both caches hold the same, and are intact."""
        for cache in (self.row, self.alone):
            cache.check_integrity()
        for mine, other in zip(self.row.paged_layers, self.alone.paged_layers, strict=True):
            torch.testing.assert_close(mine.keys, other.keys)
            torch.testing.assert_close(mine.values, other.values)


def step(batch: RowBatch, twins: dict[int, Twins]) -> None:
    """One step of all rows, compared with each cache alone."""
    made = {row: each.next() for row, each in twins.items()}
    logits = batch.step({row: token for row, (token, _) in made.items()})
    for number, (_, expected) in enumerate(made.values()):
        torch.testing.assert_close(logits[number], expected, rtol=0, atol=2e-4)


@pytest.mark.sweep(keep=[0, 1, 5])
@pytest.mark.parametrize("mode", MODES)
def test_rows_equal_caches_alone(mode: str) -> None:
    """Ragged lengths, pages that are completed, rows that join, leave and pause, and more places than rows."""
    model, options = subject_model("llama"), OPTIONS | MODES[mode]
    lengths = [151, 78, 46]
    batch = RowBatch(model, 4)
    made = [Twins(model, length, seed, **options) for seed, length in enumerate(lengths)]
    twins = {batch.join(each.row): each for each in made[:2]}
    step(batch, twins)
    twins[batch.join(made[2].row)] = made[2]
    step(batch, twins)
    step(batch, twins)
    assert batch.leave(1) is made[1].row
    made[1].check()
    del twins[1]
    step(batch, twins)
    step(batch, {2: twins[2]})
    for row in twins:
        batch.leave(row)
    for each, length in zip(made, lengths, strict=True):
        each.check()
        stats, expected = each.row.stats(), each.alone.stats()
        assert (
            stats.sparse_queries
            == expected.sparse_queries
            == (0 if mode == "dense" else 2 * 2 * (each.length - length))
        )
        assert stats.loads == expected.loads
        assert (stats.loads > 0) == ("frames" in mode)


def test_rows_with_int8_pages_and_rows_without_step_together() -> None:
    """The pages of one do not fit its cap. Each layout has kernels of its own; the step is one."""
    model, options = (
        subject_model("llama"),
        OPTIONS | {"method": "shadowkv", "gpu_memory": 200_000, "cpu_dtype": "int8"},
    )
    made = [Twins(model, length, seed, **options) for seed, length in enumerate([46, 300, 30])]
    batch = RowBatch(model, 4)
    twins = {batch.join(each.row): each for each in made}
    for _ in range(3):
        step(batch, twins)
    for row in (1, 0, 2):
        batch.leave(row)
    assert [each.row.stats().loads > 0 for each in made] == [False, True, False]
    for each in made:
        each.check()


def test_rows_of_seer_attention_equal_caches_alone(tmp_path: Path) -> None:
    """Positions of each row rotate its gate queries, and the summaries of pages that it completes."""
    shape, rules = Shape(), replace(RULES, budget=32)
    rules = rules_for(shape, tmp_path, rules)
    options: dict[str, Any] = dict(method=method_of(rules, tmp_path), budget=rules.budget, summary_dtype="model")
    lengths = [191, 94]
    made = [[CacheDriver(shape, **options) for _ in range(2)] for _ in lengths]
    inputs = [RandomKV.random(shape, 1, length + 3, seed) for seed, length in enumerate(lengths)]
    for kv, length, drivers in zip(inputs, lengths, made, strict=True):
        for driver in drivers:
            driver.step(kv, 0, length)
    rows = [drivers[0] for drivers in made]
    kernels = kernels_for(rows, 4)
    for index in range(3):
        new = [torch.zeros((1, 4, heads, 1, 8)) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
        for row, (kv, length) in enumerate(zip(inputs, lengths, strict=True)):
            for into, states in zip(new, (kv.queries, kv.keys, kv.values), strict=True):
                into[0, 1 + row] = states[0][0, :, length + index : length + index + 1]
        (out,) = step_of(rows, kernels, *new)
        for row, (kv, length) in enumerate(zip(inputs, lengths, strict=True)):
            (expected,) = made[row][1].step(kv, length + index, length + index + 1)
            torch.testing.assert_close(out[1 + row], expected[0], rtol=0, atol=1e-4)
    for drivers in made:
        for driver in drivers:
            driver.cache.check_integrity()


def test_batches_of_rows_have_few_sizes() -> None:
    assert [places_for(number) for number in (1, 2, 4, 5, 16, 17, 64, 65)] == [1, 4, 4, 16, 16, 64, 64, 256]
    assert sizes_up_to(5) == [1, 4, 16]


def test_reading_everything_pays_by_the_tokens_that_selecting_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence of 1,000 tokens is the crossover here: with a budget of 100, 900 tokens may be read in vain."""
    shape = Shape(kv_heads=2, group=2, key_dim=16, value_dim=16)
    driver = CacheDriver(shape, method="fitted", budget=100, recent_window=16)
    driver.step(RandomKV.random(shape, 1, 40, seed=0), 0, 40)
    rows = kernels_for([driver], 4)
    token_bytes = shape.kv_heads * (shape.key_dim + shape.value_dim) * 4
    monkeypatch.setattr(device_limits, "bytes_per_us", lambda device: 1000 * token_bytes / rows.recipe.overhead_us)
    assert rows.pays_to_read_all([1000])
    assert not rows.pays_to_read_all([1001])
    assert rows.pays_to_read_all([400, 400, 400])
    assert not rows.pays_to_read_all([401, 400, 400])
    assert rows.pays_to_read_all([99] * 50 + [1000])


def test_bases_of_caches_without_clusters_are_made_once() -> None:
    """They are equal for all layers of the same sizes."""
    drivers = [
        CacheDriver(Shape(layers=2, kv_heads=2, group=1, key_dim=dim, value_dim=16), method="fitted", budget=64)
        for dim in (16, 16, 32)
    ]
    bases = []
    for driver in drivers:
        driver.step(RandomKV.random(driver.shape, 1, 40, seed=0), 0, 40)
        state = state_of(driver.cache)
        bases += [bases_of(layer, state.method) for layer in state.layers]
    assert all(each is bases[0] for each in bases[:4])
    assert bases[4][0].shape[-1] > bases[0][0].shape[-1]
