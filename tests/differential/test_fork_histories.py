"""Random histories of a family of forks against deep copies that get the same calls.

    rules    append one, several or many tokens (with padding, and holes that change), crop, reorder, select, repeat, reset,
             release GPU memory; fork, also into a batch; delete a member

After every rule every member is sound and holds what its mirror holds. Every forward returns the outputs of the mirror, at a
budget that leaves tokens out. New memory is filled with NaN, which shows if one member reads what only another has written.
"""

from __future__ import annotations

import logging
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from spin_hf import Method, ShadowKV
from tests.support.cache_driver import poisoned_memory
from tests.support.clustering_methods import Clumped, little_slack
from tests.support.forks import Family, Pair
from tests.support.plain_rows import SHAPE

MAX_TOKENS, MAX_ROWS, MAX_MEMBERS = 400, 4, 4
seeds = st.integers(0, 2**31)


class ForkHistories(RuleBasedStateMachine):
    """Without a cap."""

    options: dict[str, Any] = {}
    method: Method = ShadowKV()

    @initialize(seed=seeds, rows=st.integers(1, 2), tokens=st.sampled_from([20, 130, 270]))
    def start(self, seed: int, rows: int, tokens: int) -> None:
        """A cache, one fork of it, and some tokens."""
        self.family = Family(SHAPE, method=self.method, budget=16, num_sink_tokens=3, recent_window=5, **self.options)
        self.family.pairs[0].append(tokens, seed, rows=rows)
        self.family.fork(0)

    def draw(self, data: st.DataObject) -> Pair:
        return self.family.pairs[data.draw(st.integers(0, len(self.family.pairs) - 1))]

    @rule(
        data=st.data(),
        seed=seeds,
        count=st.sampled_from([1, 1, 2, 9, 16, 17, 64, 130]),
        padding=st.sampled_from([None, 0.1]),
    )
    def append(self, data: st.DataObject, seed: int, count: int, padding: float | None) -> None:
        pair = self.draw(data)
        if pair.length + count > MAX_TOKENS:
            return
        valid = None
        if padding is not None and pair.length:
            generator = torch.Generator().manual_seed(seed)
            valid = torch.rand((pair.rows, pair.length + count), generator=generator) >= 0.01
            valid[:, pair.length :] = torch.rand((pair.rows, count), generator=generator) >= padding
        pair.append(count, seed, valid, rows=1 + seed % 2)

    @rule(data=st.data(), seed=seeds, steps=st.integers(2, 12))
    def decode(self, data: st.DataObject, seed: int, steps: int) -> None:
        pair = self.draw(data)
        for step in range(steps if pair.length else 0):
            pair.append(1, seed + step)

    @rule(data=st.data(), count=st.one_of(st.integers(0, 12), st.integers(0, MAX_TOKENS)))
    def crop(self, data: st.DataObject, count: int) -> None:
        pair = self.draw(data)
        if pair.length:
            pair.on_cache("crop", -count)

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        pair = self.draw(data)
        if pair.rows:
            rows = data.draw(st.lists(st.integers(0, pair.rows - 1), min_size=1, max_size=MAX_ROWS))
            name = "reorder_cache" if len(rows) == pair.rows else "batch_select_indices"
            pair.on_cache(name, torch.tensor(rows))

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        pair = self.draw(data)
        if 2 * pair.rows <= MAX_ROWS:
            pair.on_cache("batch_repeat_interleave", 2)

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        self.draw(data).on_cache("reset")

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.draw(data).on_cache("release_gpu_memory")

    @precondition(lambda self: len(self.family.pairs) < MAX_MEMBERS)
    @rule(data=st.data(), num_sequences=st.sampled_from([None, None, 1, 2]))
    def fork(self, data: st.DataObject, num_sequences: int | None) -> None:
        index = data.draw(st.integers(0, len(self.family.pairs) - 1))
        if self.family.pairs[index].rows * (num_sequences or 1) <= MAX_ROWS:
            self.family.fork(index, num_sequences)

    @precondition(lambda self: len(self.family.pairs) > 1)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        self.family.end(data.draw(st.integers(0, len(self.family.pairs) - 1)))

    @invariant()
    def agree(self) -> None:
        if hasattr(self, "family"):
            self.family.check()


class ForkHistoriesUnderACap(ForkHistories):
    """Pages go to the cpu tier early."""

    options = {"gpu_memory": 40_000}


class ClusteredForkHistories(ForkHistories):
    """Tokens are clustered as soon as there are enough of them, and put back for crops and padding that changes."""

    method = Clumped()


class ClusteredForkHistoriesInInt8(ClusteredForkHistories):
    """Pages go to the cpu tier early, as int8."""

    options = {"gpu_memory": 90_000, "cpu_dtype": "int8"}


@pytest.mark.parametrize("histories", [7, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "machine", [ForkHistories, ForkHistoriesUnderACap, ClusteredForkHistories, ClusteredForkHistoriesInInt8]
)
def test_fork_histories(machine: type[ForkHistories], histories: int) -> None:
    fixed = settings(deadline=None, derandomize=True, max_examples=histories, stateful_step_count=20, database=None)
    logger = logging.getLogger("spin_hf")  # it would say a thousand times that the cap is small
    with poisoned_memory(), little_slack(), patch.object(logger, "disabled", True):
        run_state_machine_as_test(machine, settings=fixed)
