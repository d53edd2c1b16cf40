"""A fork beside a deep copy: both get the same calls, and must return and hold the same.

    Pair       a cache that shares pages with forks, and its mirror, which shares nothing
    Family     pairs; `fork` adds one. After every call all caches are checked, also those that were not called

A fork clusters what a step would cluster first. The mirror does the same when its pair is forked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spin_hf import BudgetError, SpinCache
from spin_hf.indexing.cluster import cluster_new_tokens
from spin_hf.storage.segment_pool import segment_indices
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.inspection import state_of
from tests.support.memory import SMALL_ZONES

SHAPE = Shape(layers=2)
TIERS: dict[str, dict[str, Any]] = {
    "resident": {}, "tiered": {"gpu_memory": 110_000}, "int8": {"gpu_memory": 110_000, "cpu_dtype": "int8"},
}  # fmt: skip
TOLERANCE = 1e-5
"""For sums in another order: one side may hold its pages in frames and the other not."""


@dataclass
class Pair:
    """Two caches that hold the same."""

    driver: CacheDriver
    mirror: CacheDriver
    was_refused: bool = False

    @classmethod
    def new(cls, shape: Shape, **options: Any) -> Pair:
        driver = CacheDriver(shape, **options)
        return cls(driver, deepcopy(driver))

    @property
    def cache(self) -> SpinCache:
        return self.driver.cache

    @property
    def length(self) -> int:
        return self.cache.get_seq_length()

    @property
    def rows(self) -> int:
        return state_of(self.cache).sequences.batch_size

    def both(self, call: Callable[[CacheDriver], list[Tensor] | None]) -> bool:
        """Call for the cache and for its mirror, which must return the same.

        Their pools differ in size by segments that were copied and are free again. So under a cap one may refuse what the other
        does. A refusal must have changed nothing.

        Returns:
            whether they did it.
        """
        try:
            found = call(self.driver)
        except BudgetError:
            self.was_refused = True
            return False  # `check` compares it with the mirror
        try:
            expected = call(self.mirror)
        except BudgetError:
            self.mirror = deepcopy(self.driver)
            return True
        for ours, theirs in zip(found or [], expected or [], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
        return True

    def on_cache(self, name: str, *arguments: Any) -> bool:
        """An operation of the cache."""

        def call(driver: CacheDriver) -> None:
            getattr(driver.cache, name)(*arguments)

        return self.both(call)

    def append(self, count: int, seed: int, valid: Tensor | None = None, rows: int = 1) -> bool:
        """A forward over random tokens; `rows` sequences if the cache is empty."""
        length = self.length
        new = RandomKV.random(self.driver.shape, self.rows if length else rows, count, seed)
        kv = _behind(new.exact_in_int8(), length)  # the same whether its pages are int8 yet or not
        did = self.both(lambda driver: driver.step(kv, length, length + count, valid))
        assert not did or self._owns_last(count), "tokens were written to memory that a fork uses"
        return did

    def _owns_last(self, count: int) -> bool:
        """Whether no fork uses the segments of the last `count` tokens."""
        sequences = state_of(self.cache).sequences
        indices = segment_indices((sequences.length - count) // sequences.page_size, sequences.num_pages)
        return all(sequences.shared.owns(row[index]) for row in sequences.directory for index in indices)

    def check(self) -> None:
        """Both are sound, and hold the same keys, values and padding."""
        self.cache.check_integrity()
        assert self.length == self.mirror.cache.get_seq_length()
        ours, theirs = state_of(self.cache).sequences, state_of(self.mirror.cache).sequences
        assert ours.batch_size == theirs.batch_size
        # Before a step is refused, padding that changed may have given a row segments of its own.
        assert ours.segments_in_use == theirs.segments_in_use or self.was_refused
        for layer, expected in zip(self.cache.layers, self.mirror.cache.layers, strict=True):
            for one, other in ((layer.keys, expected.keys), (layer.values, expected.values)):
                assert (one is None) == (other is None)
                assert one is None or torch.equal(one, other)


class Family:
    """A cache and its forks.

    Args:
        shape, options: as for `CacheDriver`.
    """

    def __init__(self, shape: Shape, **options: Any) -> None:
        self.pairs = [Pair.new(shape, **options)]

    def fork(self, index: int, num_sequences: int | None = None) -> bool:
        """Fork a cache, and copy its mirror. False if the caps refuse it."""
        pair = self.pairs[index]
        cluster_new_tokens(state_of(pair.mirror.cache))
        try:
            twin = Pair(_with(pair.driver, pair.cache.fork(num_sequences)), deepcopy(pair.mirror), pair.was_refused)
            twin.mirror.cache.batch_repeat_interleave(num_sequences or 1)
        except BudgetError:
            return False
        self.pairs.append(twin)
        return True

    def end(self, index: int) -> None:
        """Delete a cache."""
        del self.pairs[index]

    def check(self) -> None:
        """All caches are sound, equal their mirrors, and write to no memory that another one reads."""
        for pair in self.pairs:
            pair.check()
        assert_apart([pair.cache for pair in self.pairs])


def sparse_family(method: Any, **options: Any) -> Family:
    """A family at a budget that leaves most tokens out."""
    return Family(SHAPE, method=method, budget=16, num_sink_tokens=3, recent_window=5, **options)


def document(tokens: int = 5000, **options: Any) -> CacheDriver:
    """A cache after a prompt of random tokens and one more step."""
    driver = CacheDriver(SHAPE, budget=32, **SMALL_ZONES, **options)
    kv = RandomKV.random(SHAPE, 1, tokens + 1, 0)
    driver.step(kv, 0, tokens)
    driver.step(kv, tokens, tokens + 1)
    return driver


def assert_apart(caches: Iterable[SpinCache]) -> None:
    """No cache may write to a row that another one holds: it is referenced by one, or known by both to be shared."""
    users: dict[tuple[int, int], list[Any]] = {}
    for cache in caches:
        sequences = state_of(cache).sequences
        for store in sequences.stores:
            for array in store._arrays():  # type: ignore[attr-defined]
                each = array.rows_per_chunk // store.budget.rows(1)  # type: ignore[attr-defined]
                for segment in {segment for row in sequences.directory for segment in row}:
                    chunk = array.chunks[segment // each]
                    users.setdefault((chunk.data_ptr(), segment % each), []).append((sequences, segment))
    for held in users.values():
        if len(held) > 1:
            owners = [segment for sequences, segment in held if sequences.shared.owns(segment)]
            assert not owners, f"segment {owners} is written by one cache and read by another"


def _with(driver: CacheDriver, cache: Any) -> CacheDriver:
    twin = copy(driver)
    twin.cache = cache
    return twin


def _behind(new: RandomKV, length: int) -> RandomKV:
    """`new` behind `length` tokens that are not used, as `CacheDriver.step` expects tokens at their positions."""

    def place(states: list[Tensor]) -> list[Tensor]:
        return [torch.cat([x.new_empty((*x.shape[:2], length, x.shape[3])), x], 2) for x in states]

    return replace(new, keys=place(new.keys), values=place(new.values), queries=place(new.queries))
