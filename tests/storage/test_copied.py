"""Copies of a cache own all that is written to, also what a class does not list in `copied` (`storage/copied.py`)."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from types import MethodType
from typing import Any

import pytest
from torch import Tensor

from spin_hf import SpinCache
from spin_hf.storage.copied import copied
from tests.support.forks import document
from tests.support.inspection import state_of

CONTAINERS = (dict, list, set, deque, tuple)


class Held:
    def __init__(self) -> None:
        self.number, self.table, self.rows, self.none = 1, [1], [2], None


def test_named_attributes_are_copied_and_others_shared() -> None:
    held, known = Held(), [3]
    memo: dict[int, Any] = {id(held.rows): known}
    twin = copied(held, memo, "rows", "none")
    assert type(twin) is Held
    assert memo[id(held)] is twin
    assert twin.number == 1
    assert twin.table is held.table
    assert twin.rows is known
    assert twin.none is None


def written(root: Any) -> dict[int, Any]:
    """What may be written into, by its id: states, stores, containers and tensors that are reached from `root`."""
    found: dict[int, Any] = {}
    open_ends = [root]
    while open_ends:
        thing = open_ends.pop()
        if id(thing) not in found and _is_written(thing):
            found[id(thing)] = thing
            open_ends += _parts(thing)
    return {number: thing for number, thing in found.items() if not isinstance(thing, tuple | MethodType)}


def _is_written(thing: Any) -> bool:
    kind = type(thing)
    ours = kind.__module__.startswith(("spin_hf.state", "spin_hf.storage.")) and hasattr(thing, "__dict__")
    frozen = getattr(kind, "__dataclass_params__", None)
    is_frozen = frozen is not None and frozen.frozen
    return isinstance(thing, (*CONTAINERS, Tensor, MethodType)) or (ours and not is_frozen)


def _parts(thing: Any) -> Iterator[Any]:
    if isinstance(thing, MethodType):
        yield thing.__self__
    elif isinstance(thing, dict):
        yield from thing.values()
    elif isinstance(thing, CONTAINERS):
        yield from thing
    elif not isinstance(thing, Tensor):
        yield from vars(thing).values()


def names(cache: SpinCache, shared: set[int]) -> set[str]:
    """Classes, and attributes, that hold one of the objects with these ids."""
    return {
        f"{type(owner).__name__}.{name}"
        for owner in written(state_of(cache).layers).values()
        if hasattr(owner, "__dict__") and not isinstance(owner, Tensor)
        for name, held in vars(owner).items()
        if id(held) in shared
    }


@pytest.mark.parametrize("options", [{}, {"gpu_memory": 700_000}], ids=["resident", "tiered"])
@pytest.mark.parametrize("method", ["fitted", "retroinfer"])
def test_a_deep_copy_shares_nothing_that_is_written(method: str, options: dict[str, Any]) -> None:
    cache = document(900, method=method, **options).cache
    apart = copy.deepcopy(cache)
    ours, theirs = written(state_of(cache).layers), written(state_of(apart).layers)
    assert len(ours) > 50
    assert not names(cache, ours.keys() & theirs.keys())
    for one, other in zip(state_of(cache).layers, state_of(apart).layers, strict=True):
        assert one.store is not None
        assert other.store is not None
        assert one.store.ask_for_more.__self__ is not other.store.ask_for_more.__self__  # type: ignore[union-attr]
    assert not ours.keys() & theirs.keys()


@pytest.mark.parametrize("method", ["fitted", "retroinfer"])
def test_a_fork_shares_pages_and_what_is_replaced(method: str) -> None:
    cache = document(900, method=method).cache
    fork = cache.fork()
    ours, theirs = written(state_of(cache).layers), written(state_of(fork).layers)
    assert names(cache, ours.keys() & theirs.keys()) <= {
        "ChunkedArray.chunks", "ChunkList.slabs", "ChunkList._stops", "ClusteredSpans.clustered", "LayerState.fitted",
        "PageTable.directory", "PageTable.refcounts",
    }  # fmt: skip
