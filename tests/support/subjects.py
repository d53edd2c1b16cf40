"""What a mode runs on: a model, and a way to make caches for it.

    Subject ── DenseSubject    transformers' DynamicCache on a model that SpinCache never touches: the oracle
            ├─ StaticSubject   transformers' StaticCache, compiled: says whether a family can be compiled at all
            └─ SpinSubject     SpinCache, with the options under test

Modes only know `Subject`, so both sides run exactly the same calls.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from tests.support import zoo


class Subject:
    """A model together with the kind of cache that it runs with; remembers every cache it handed out."""

    def __init__(self, family: str, model: PreTrainedModel) -> None:
        self.family, self.model = family, model
        self.caches: list[Cache] = []

    def new(self) -> Cache:
        """An empty cache."""
        self.caches.append(self._make())
        return self.caches[-1]

    def _make(self) -> Cache:
        raise NotImplementedError

    def adopt(self, cache: DynamicCache) -> Cache:
        """A cache that holds what `cache` holds."""
        raise NotImplementedError

    def clone(self, cache: Cache) -> Cache:
        """`copy.deepcopy`, as users do with a prefix."""
        self.caches.append(copy.deepcopy(cache))
        return self.caches[-1]

    def restart(self, cache: Cache) -> Cache:
        """`cache`, emptied for another use."""
        raise NotImplementedError

    def compile(self, backend: str) -> Callable[..., Any]:
        """The model's forward as decode steps shall call it."""
        return self.model.forward


class DenseSubject(Subject):
    """The oracle."""

    def __init__(self, family: str) -> None:
        super().__init__(family, zoo.oracle_model(family))

    def _make(self) -> Cache:
        return DynamicCache(config=self.model.config)

    def adopt(self, cache: DynamicCache) -> Cache:
        return cache

    def restart(self, cache: Cache) -> Cache:
        # Before 5.18 DynamicCache.reset() zeroes what it holds and keeps the length, so a new one is the oracle here.
        return self.new()


class CompiledSubject(Subject):
    """A subject whose decode steps are compiled."""

    def compile(self, backend: str) -> Callable[..., Any]:
        torch._dynamo.reset()
        counters.clear()
        return torch.compile(self.model.forward, fullgraph=True, backend=backend)


class StaticSubject(CompiledSubject):
    """transformers' compileable cache."""

    def __init__(self, family: str) -> None:
        super().__init__(family, zoo.oracle_model(family))

    def _make(self) -> Cache:
        return StaticCache(config=self.model.config, max_cache_len=128)


class SpinSubject(CompiledSubject):
    """The cache under test.

    Args:
        family: the model's family.
        from_config: give SpinCache the config instead of the model.
        options: for SpinCache; the default budget is beyond every context, so that nothing is left out.
    """

    def __init__(self, family: str, *, from_config: bool = False, **options: Any) -> None:
        super().__init__(family, zoo.subject_model(family))
        self.from_config = from_config
        self.options = {"budget": 1 << 20, **options}

    def _make(self) -> Cache:
        from spin_hf import SpinCache

        return SpinCache(self.model.config if self.from_config else self.model, **self.options)

    def adopt(self, cache: DynamicCache) -> Cache:
        from spin_hf import SpinCache

        self.caches.append(SpinCache.from_cache(cache, self.model, **self.options))
        return self.caches[-1]

    def restart(self, cache: Cache) -> Cache:
        cache.reset()
        return cache


@functools.cache
def dense_subject(family: str) -> DenseSubject:
    return DenseSubject(family)
