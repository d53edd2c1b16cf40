"""Random histories of a SpinCache against a plain list of sequences.

    model    rows[b] = Row      its keys and values in every layer, and which of its tokens are real
    rules    append one, several or many tokens (with padding, and holes that change), crop, reorder, select, repeat, reset,
             copy and continue with either; release GPU memory and take it again; other caches and the user do the same

After every rule tables and tiers agree (`check_integrity`), and every layer holds the model's tokens in their order. Every
append compares its attention with softmax over the model. The method selects all candidates, so that decode goes through
selection, page frames and paging and must still be exact. With a tight `gpu_memory` a refusal must change nothing.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
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
from torch import Tensor

from spin_hf import BudgetError, Method, ShadowKV
from tests.support.cache_driver import CacheDriver, RandomKV, poisoned_memory
from tests.support.clustering_methods import SelectingAll, ShuffledWhole, little_slack
from tests.support.fake_gpu import bytes_of, fake_gpu
from tests.support.plain_rows import SHAPE, Row, empty_row
from tests.support.tuning import tuned

MAX_TOKENS, MAX_ROWS = 400, 5
TOLERANCE = 1e-5


@dataclass(frozen=True)
class SelectAll(SelectingAll, ShadowKV):
    """In pages that are runs of positions."""


Rows = list[Row]
seeds = st.integers(0, 2**31)
intervals = st.sampled_from([1, 3, 64])


class Histories(RuleBasedStateMachine):
    """Without a cap."""

    options: dict[str, Any] = {}
    method: Method = SelectAll()

    def draw(self, rows: int, count: int, seed: int) -> RandomKV:
        """New tokens."""
        return RandomKV.random(SHAPE, rows, count, seed)

    @initialize(interval=intervals)
    def start(self, interval: int) -> None:
        """Make the cache.

        Args:
            interval: steps between two checks of free memory, after which frames that were released come back.
        """
        with tuned(check_interval_steps=interval):
            self.driver = CacheDriver(
                SHAPE, method=self.method, budget=8, num_sink_tokens=3, recent_window=5, **self.options
            )
        self.rows: Rows = []
        self.saved: tuple[Any, Rows] | None = None

    @property
    def length(self) -> int:
        return len(self.rows[0]) if self.rows else 0

    # ------------------------------------------------------------------------------------------------------ appends

    @rule(seed=seeds)
    def append_one(self, seed: int) -> None:
        self._append(1, seed, padding=0.1, changed=0.0)

    @rule(seed=seeds, count=st.integers(2, 16), padding=st.sampled_from([0.0, 0.3]))
    def append_several(self, seed: int, count: int, padding: float) -> None:
        self._append(count, seed, padding, changed=0.0)

    @rule(seed=seeds, count=st.sampled_from([17, 24, 63, 64, 65, 130, 250]), padding=st.sampled_from([0.0, 0.1]))
    def append_many(self, seed: int, count: int, padding: float) -> None:
        self._append(count, seed, padding, changed=0.0)

    @precondition(lambda self: self.length > 1)
    @rule(seed=seeds, count=st.integers(1, 20), changed=st.sampled_from([0.01, 0.2]))
    def append_with_other_holes(self, seed: int, count: int, changed: float) -> None:
        """Some of the tokens held turn into padding, or into real ones."""
        self._append(count, seed, padding=0.1, changed=changed)

    @precondition(lambda self: self.length > 1)
    @rule(seed=seeds)
    def append_without_mask(self, seed: int) -> None:
        """Without a mask all tokens are real, old ones too."""
        self._append(3, seed, padding=None, changed=0.0)

    def _append(self, count: int, seed: int, padding: float | None, changed: float) -> None:
        if self.length + count > MAX_TOKENS:
            return
        generator = torch.Generator().manual_seed(seed)
        rows = len(self.rows) if self.length else int(torch.randint(1, 4, (), generator=generator))
        old = self.rows if self.length else [empty_row() for _ in range(rows)]
        length = len(old[0])
        new = self.draw(rows, count, seed)
        valid = torch.stack([row.is_real for row in old])
        valid = valid ^ (torch.rand(valid.shape, generator=generator) < changed)
        fresh = torch.rand((rows, count), generator=generator) >= (padding or 0.0)
        valid = (
            torch.cat([valid, fresh], 1)
            if padding is not None
            else torch.ones((rows, length + count), dtype=torch.bool)
        )
        keys, values = torch.stack(new.keys, 1), torch.stack(new.values, 1)  # [B, layers, H, n, D]
        extended = [row.followed_by(keys[b], values[b], valid[b]) for b, row in enumerate(old)]
        try:
            outputs = self._forward(new, length, valid if padding is not None else None)
        except BudgetError:
            assert self.options, "no cap was given"
            return
        self.rows = extended
        for layer, out in enumerate(outputs):
            expected = self._dense(new.queries[layer], layer, length)
            real = valid[:, length:]
            assert float((out - expected)[real].abs().max() if bool(real.any()) else 0.0) <= TOLERANCE

    def _forward(self, new: RandomKV, length: int, valid: Tensor | None) -> list[Tensor]:
        """The driver expects tokens at their positions: put `length` empty ones before them."""

        def place(states: Tensor) -> Tensor:
            return torch.cat([states.new_empty((*states.shape[:2], length, states.shape[3])), states], 2)

        kv = replace(
            new,
            keys=[place(x) for x in new.keys],
            values=[place(x) for x in new.values],
            queries=[place(x) for x in new.queries],
        )
        return self.driver.step(kv, length, length + new.keys[0].shape[2], valid)

    def _dense(self, queries: Tensor, layer: int, length: int) -> Tensor:
        """[B, n, heads, Dv]: each query over the real tokens up to its own."""
        keys, values = self._states(layer)
        scores = (
            queries.double() @ keys.repeat_interleave(SHAPE.group, 1).transpose(2, 3).double() * SHAPE.key_dim**-0.5
        )
        real = torch.stack([row.is_real for row in self.rows])[:, None, None]
        causal = torch.arange(self.length) <= torch.arange(length, self.length)[:, None]
        weights = scores.masked_fill(~(real & causal), float("-inf")).softmax(-1)
        return (weights @ values.repeat_interleave(SHAPE.group, 1).double()).transpose(1, 2)

    def _states(self, layer: int) -> tuple[Tensor, Tensor]:
        keys = torch.stack([row.keys[layer] for row in self.rows])
        values = torch.stack([row.values[layer] for row in self.rows])
        return keys, values

    # ------------------------------------------------------------------------------------------------ the other rules

    @precondition(lambda self: self.length)
    @rule(count=st.one_of(st.integers(0, 12), st.integers(0, MAX_TOKENS)))
    def crop(self, count: int) -> None:
        self.driver.cache.crop(-count)
        keep = max(0, self.length - count)
        self.rows = [row.cut(keep) for row in self.rows]

    @precondition(lambda self: self.length)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        order = data.draw(
            st.lists(st.integers(0, len(self.rows) - 1), min_size=len(self.rows), max_size=len(self.rows))
        )
        self.driver.cache.reorder_cache(torch.tensor(order))
        self.rows = [self.rows[row] for row in order]

    @precondition(lambda self: self.length)
    @rule(data=st.data(), as_mask=st.booleans())
    def select(self, data: st.DataObject, as_mask: bool) -> None:
        chosen = data.draw(
            st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=len(self.rows), unique=True)
        )
        if as_mask:
            chosen = sorted(chosen)
        indices = torch.tensor([row in chosen for row in range(len(self.rows))]) if as_mask else torch.tensor(chosen)
        try:
            self.driver.cache.batch_select_indices(indices)
        except BudgetError:
            assert self.options
            return
        self.rows = [self.rows[row] for row in chosen]

    @precondition(lambda self: self.length and len(self.rows) * 2 <= MAX_ROWS)
    @rule(repeats=st.integers(2, 3))
    def repeat(self, repeats: int) -> None:
        try:
            self.driver.cache.batch_repeat_interleave(repeats)
        except BudgetError:
            assert self.options, "no cap was given"
            return
        self.rows = [row for row in self.rows for _ in range(repeats)]

    @precondition(lambda self: self.length > 100)
    @rule()
    def reset(self) -> None:
        self.driver.cache.reset()
        self.rows = []

    @rule()
    def copy(self) -> None:
        """Keep a copy for later."""
        self.saved = deepcopy(self.driver.cache), self.rows

    @precondition(lambda self: self.saved is not None)
    @rule()
    def swap(self) -> None:
        """Continue with the copy. Changes of the other must not show, then or later."""
        assert self.saved is not None
        (self.driver.cache, self.rows), self.saved = self.saved, (self.driver.cache, self.rows)

    @rule(share=st.sampled_from([0.1, 0.5, None]))
    def give_back(self, share: float | None) -> None:
        """Frames, or all pages to the cpu tier."""
        cache = self.driver.cache
        held = bytes_of(cache)
        given = cache.release_gpu_memory(None if share is None or not held else max(1, int(share * held)))
        assert given == held - bytes_of(cache)
        if not self.length and share is None:
            assert bytes_of(cache) == 0

    # ------------------------------------------------------------------------------------------------------ invariants

    @invariant()
    def agrees_with_the_lists(self) -> None:
        if not hasattr(self, "driver"):
            return
        cache = self.driver.cache
        cache.check_integrity()
        assert cache.get_seq_length() == self.length
        for index, layer in enumerate(cache.layers):
            if not self.length:
                assert layer.keys is None
                continue
            assert layer.batch_size == len(self.rows)
            keys, values = self._states(index)
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)


class HistoriesUnderACap(Histories):
    """A cap that a short batch fits, a long one pages under, and some are refused."""

    options = {"gpu_memory": 60_000}


class HistoriesWithOthers(Histories):
    """On a small GPU with other caches and a user, who take and release memory."""

    options = {"gpu_memory": "auto"}
    total = 120_000

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.gpu = self.stack.enter_context(fake_gpu(self.total))
        self.others: list[CacheDriver] = []

    def teardown(self) -> None:
        self.stack.close()

    @initialize(interval=intervals)
    def start(self, interval: int) -> None:
        super().start(interval)
        self.gpu.caches = [self.driver.cache]

    @rule(share=st.sampled_from([0.0, 0.0, 0.2, 0.5]))
    def the_user_takes(self, share: float) -> None:
        self.gpu.user = min(int(share * self.total), self.gpu.user + self.gpu.free)

    @precondition(lambda self: len(self.others) < 2)
    @rule(seed=seeds, tokens=st.integers(20, 300))
    def another_cache(self, seed: int, tokens: int) -> None:
        driver = CacheDriver(SHAPE, method=self.method, budget=8, num_sink_tokens=3, recent_window=5)
        self.gpu.caches.append(driver.cache)
        self.others.append(driver)
        kv, free = RandomKV.random(SHAPE, 1, tokens + 1, seed), self.gpu.free
        try:
            driver.step(kv, 0, tokens)
            driver.step(kv, tokens, tokens + 1)
        except BudgetError:
            pass
        else:
            assert self.gpu.free > 0 or free <= 0  # copies ask for no more than half of what they lack
        driver.cache.check_integrity()

    @precondition(lambda self: self.others)
    @rule()
    def another_cache_goes(self) -> None:
        self.gpu.caches.remove(self.others.pop(0).cache)

    @rule()
    def copy(self) -> None:
        super().copy()
        assert self.saved is not None
        known = [self.driver.cache, *(driver.cache for driver in self.others)]
        self.gpu.caches = [*known, self.saved[0]]


class ClusteredHistories(Histories):
    """Tokens are clustered as soon as there are enough of them, and put back for crops and padding that changes."""

    method = ShuffledWhole()


class ClusteredHistoriesUnderACap(ClusteredHistories):
    """A page keeps 36 bytes more."""

    options = {"gpu_memory": 90_000}


class ClusteredHistoriesInInt8(ClusteredHistoriesUnderACap):
    """Pages go to the cpu tier as int8, with tokens that int8 holds exactly."""

    options = {"gpu_memory": 90_000, "cpu_dtype": "int8"}

    def draw(self, rows: int, count: int, seed: int) -> RandomKV:
        return super().draw(rows, count, seed).exact_in_int8()


each_number = pytest.mark.parametrize("histories", [8, pytest.param(60, marks=pytest.mark.slow)])


def run(machine: type[Histories], histories: int) -> None:
    fixed = settings(deadline=None, derandomize=True, max_examples=histories, stateful_step_count=20, database=None)
    logger = logging.getLogger("spin_hf")  # it would say a thousand times that the cap is small
    with poisoned_memory(), patch.object(logger, "disabled", True):
        run_state_machine_as_test(machine, settings=fixed)


@each_number
def test_histories(histories: int) -> None:
    run(Histories, histories)


@each_number
def test_histories_under_a_cap(histories: int) -> None:
    run(HistoriesUnderACap, histories)


@each_number
def test_histories_with_others(histories: int) -> None:
    run(HistoriesWithOthers, histories)


@each_number
def test_clustered_histories(histories: int) -> None:
    with little_slack():
        run(ClusteredHistories, histories)


@each_number
def test_clustered_histories_under_a_cap(histories: int) -> None:
    with little_slack():
        run(ClusteredHistoriesUnderACap, histories)


@each_number
def test_clustered_histories_in_int8(histories: int) -> None:
    with little_slack():
        run(ClusteredHistoriesInInt8, histories)
