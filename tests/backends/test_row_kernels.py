"""The interpreted kernels with descriptors of each row: logits and pages are those of each cache alone, step by step."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from spin_hf import SpinCache
from spin_hf.serving.row_batch import RowBatch
from tests.support.cache_driver import poisoned_memory
from tests.support.interpreted_kernels import interpret_kernels
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
