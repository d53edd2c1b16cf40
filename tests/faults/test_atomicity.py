"""A forward that fails leaves the cache as it was, and the same forward succeeds when it is tried again.

failures   an error while a layer stores, indexes, loads or attends; Ctrl-C; a refusal for lack of memory
where      in the first, a middle or the last layer; in a prompt, a decode step, several tokens; with and without paging
after      length, contents and integrity as before; the next forwards equal a run that nothing disturbed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_hf import BudgetError, CacheStateError, SpinCache
from spin_hf.storage.page_frames import PageFrames
from spin_hf.storage.page_store import PageStore
from tests.support.cache_driver import CacheDriver, RandomKV, Shape, poisoned_memory, smallest_gpu_memory
from tests.support.inspection import state_of

SHAPE = Shape(layers=3, kv_heads=2, group=2, value_dim=6)
LENGTH = 130
OPTIONS: dict[str, Any] = dict(budget=16, num_sink_tokens=4, recent_window=9)


class InjectedError(Exception):
    """What the tests raise."""


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.fixture(scope="module")
def kv() -> RandomKV:
    return RandomKV.random(SHAPE, 2, LENGTH, seed=0)


@pytest.fixture(scope="module")
def cap(kv: RandomKV) -> int:
    """The smallest `gpu_memory` for all tokens."""

    def run(cap: int) -> None:
        driver = CacheDriver(SHAPE, **OPTIONS, gpu_memory=cap)
        driver.step(kv, 0, LENGTH - 1)
        driver.step(kv, LENGTH - 1, LENGTH)

    return smallest_gpu_memory(run)


def holes(length: int) -> Tensor:
    valid = torch.ones((2, LENGTH), dtype=torch.bool)
    valid[0, :11] = False
    return valid[:, :length]


@contextmanager
def failing(owner: type, method: str, call: int, error: type[BaseException], late: bool) -> Iterator[list[int]]:
    """Let the `call`-th call of `owner.method` raise, before or after its work; yields the calls counted so far."""
    original: Callable[..., Any] = getattr(owner, method)
    calls = [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] != call + 1:
            return original(*args, **kwargs)
        if late:
            original(*args, **kwargs)
        raise error

    setattr(owner, method, wrapped)
    try:
        yield calls
    finally:
        setattr(owner, method, original)


def snapshot(driver: CacheDriver) -> list[Any]:
    """The contents of a cache that a user can see."""
    cache = driver.cache
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return [cache.get_seq_length(), cache.stats().tokens, cache.stats().sequences, layers]


def assert_as_before(driver: CacheDriver, before: list[Any]) -> None:
    driver.cache.roll_back()  # made from a config: told that the forward did not come to its end
    after = snapshot(driver)
    assert after[:3] == before[:3]
    for (keys, values), (old_keys, old_values) in zip(after[3], before[3], strict=True):
        assert (keys is None) == (old_keys is None)
        if keys is not None:
            assert torch.equal(keys, old_keys)
            assert torch.equal(values, old_values)
    driver.cache.check_integrity()


def assert_goes_on(driver: CacheDriver, kv: RandomKV, start: int, stop: int, undisturbed: CacheDriver) -> None:
    """The same forward, then six more: equal to those of a cache that saw no failure."""
    for first, last in [(start, stop), *((at, at + 1) for at in range(stop, min(stop + 6, LENGTH)))]:
        for ours, theirs in zip(
            driver.step(kv, first, last, holes(last)), undisturbed.step(kv, first, last, holes(last)), strict=True
        ):
            real = holes(last)[:, first:]
            assert float((ours - theirs)[real].abs().max()) <= 2e-6
        driver.cache.check_integrity()
    assert int(state_of(driver.cache).visible_length) == driver.cache.get_seq_length()  # what compiled code reads


POINTS: list[tuple[type, str, bool]] = [
    (PageStore, "append", False),
    (PageStore, "append", True),
    (PageStore, "summary", False),
    (SpinCache, "update", False),
]
"""Owner, method, and whether its work is done when it raises. `update` stands for what the model does between layers."""
STEPS = [(64, 65), (71, 72), (60, 70), (60, 100)]
"""Among them one that fills a page, and one that starts and ends inside pages."""
FAILURES = [(*point, step) for point in POINTS for step in STEPS if point[1] != "summary" or step[1] - step[0] <= 16]
"""A longer step attends to everything and asks for no summary."""


@pytest.mark.sweep(2)
@pytest.mark.parametrize("error", [InjectedError, KeyboardInterrupt], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(("owner", "method", "late", "step"), FAILURES)
def test_failure_in_a_layer(
    kv: RandomKV, cap: int, owner: type, method: str, late: bool, step: tuple[int, int], layer: int, paged: bool,
    error: type[BaseException],
) -> None:  # fmt: skip
    start, stop = step
    per_layer = 2 * (stop - start) if method == "summary" else 1  # two summaries per query
    driver = CacheDriver(SHAPE, **OPTIONS, **(dict(gpu_memory=cap) if paged else {}))
    driver.step(kv, 0, start - 2, holes(start - 2))
    driver.step(kv, start - 2, start, holes(start))
    undisturbed, before = deepcopy(driver), snapshot(driver)
    for _ in range(2):
        with failing(owner, method, layer * per_layer, error, late) as calls, pytest.raises(error):
            driver.step(kv, start, stop, holes(stop))
        assert calls[0] == layer * per_layer + 1
        assert_as_before(driver, before)
    assert_goes_on(driver, kv, start, stop, undisturbed)


@pytest.mark.parametrize("error", [InjectedError, KeyboardInterrupt], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_failure_in_the_first_prompt(kv: RandomKV, layer: int, error: type[BaseException]) -> None:
    """Nothing was held; after the failure nothing is, and the prompt, or another one, can be tried again."""
    driver = CacheDriver(SHAPE, **OPTIONS)
    for stop in (70, 40):
        with failing(PageStore, "append", layer, error, late=False), pytest.raises(error):
            driver.step(kv, 0, stop, holes(stop))
        assert driver.cache.get_seq_length() == 0
        assert driver.cache.layers[0].keys is None
    driver.cache.check_integrity()
    assert_goes_on(driver, kv, 0, 60, CacheDriver(SHAPE, **OPTIONS))


@pytest.mark.parametrize("read", [0, 1, 2])
def test_failure_while_pages_are_loaded(kv: RandomKV, cap: int, read: int) -> None:
    """A page is resident only when its contents have arrived."""
    driver = CacheDriver(SHAPE, **OPTIONS, gpu_memory=cap)
    driver.step(kv, 0, 100, holes(100))
    undisturbed, before = deepcopy(driver), snapshot(driver)
    home = type(driver.cache.layers[0].store.backing)
    for _ in range(2):
        with (
            inside(PageFrames, "bring_in") as depth,
            failing_inside(home, "take", depth, read),
            pytest.raises(InjectedError),
        ):
            driver.step(kv, 100, 101, holes(101))
        assert_as_before(driver, before)
    assert_goes_on(driver, kv, 100, 101, undisturbed)


@contextmanager
def inside(owner: type, method: str) -> Iterator[list[int]]:
    """Yields [how many calls of `owner.method` are running]."""
    original, depth = getattr(owner, method), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        depth[0] += 1
        try:
            return original(*args, **kwargs)
        finally:
            depth[0] -= 1

    setattr(owner, method, wrapped)
    try:
        yield depth
    finally:
        setattr(owner, method, original)


@contextmanager
def failing_inside(owner: type, method: str, depth: list[int], call: int) -> Iterator[None]:
    """Let the `call`-th call of `owner.method` raise, counting those made while `depth` is above 0."""
    original, calls = getattr(owner, method), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += bool(depth[0])
        if depth[0] and calls[0] == call + 1:
            raise InjectedError
        return original(*args, **kwargs)

    setattr(owner, method, wrapped)
    try:
        yield
    finally:
        setattr(owner, method, original)


def test_memory_runs_out_while_generating(kv: RandomKV) -> None:
    """A cap that holds one segment per sequence and not two: the refusal comes before anything changes."""
    small = Shape(layers=2, kv_heads=1, group=1, key_dim=4, value_dim=4)
    tokens = RandomKV.random(small, 2, 300, seed=1)
    options: dict[str, Any] = dict(budget=16, num_sink_tokens=4, recent_window=9)

    def run(cap: int) -> None:
        CacheDriver(small, **options, gpu_memory=cap).step(tokens, 0, 256)

    driver = CacheDriver(small, **options, gpu_memory=smallest_gpu_memory(run))
    driver.step(tokens, 0, 250)
    reached = 250
    before: list[Any] = []
    with pytest.raises(BudgetError, match="gpu_memory"):
        while reached < 300:
            before = snapshot(driver)
            driver.step(tokens, reached, reached + 1)
            reached += 1
    assert reached == 256
    assert_as_before(driver, before)
    for _ in range(2):  # not a matter of luck
        with pytest.raises(BudgetError):
            driver.step(tokens, reached, reached + 3)
        assert_as_before(driver, before)
    driver.cache.crop(-10)
    undisturbed = CacheDriver(small, **options)
    undisturbed.step(tokens, 0, 246)
    for at in range(246, 256):
        for ours, theirs in zip(driver.step(tokens, at, at + 1), undisturbed.step(tokens, at, at + 1), strict=True):
            assert float((ours - theirs).abs().max()) <= 2e-6
    assert int(state_of(driver.cache).visible_length) == driver.cache.get_seq_length()


@pytest.mark.parametrize(
    "operation", ["crop", "reorder_cache", "batch_select_indices", "batch_repeat_interleave", "reset"]
)
def test_operations_after_a_failure(kv: RandomKV, operation: str) -> None:
    """They work on the cache as it was before the failed forward."""
    arguments = {
        "crop": -5, "reorder_cache": torch.tensor([1, 1]), "batch_select_indices": torch.tensor([1]),
        "batch_repeat_interleave": 2,
    }  # fmt: skip
    driver = CacheDriver(SHAPE, **OPTIONS)
    driver.step(kv, 0, 63)
    undisturbed = deepcopy(driver)
    with failing(PageStore, "append", 1, InjectedError, late=True), pytest.raises(InjectedError):
        driver.step(kv, 63, 65)
    for each in (driver, undisturbed):
        getattr(each.cache, operation)(*([arguments[operation]] if operation in arguments else []))
    assert_as_before(driver, snapshot(undisturbed))
    rows = {"reorder_cache": [1, 1], "batch_select_indices": [1], "batch_repeat_interleave": [0, 0, 1, 1]}
    after, start = kv.rows(rows.get(operation, [0, 1])), driver.cache.get_seq_length()
    for ours, theirs in zip(
        driver.step(after, start, start + 9), undisturbed.step(after, start, start + 9), strict=True
    ):
        assert float((ours - theirs).abs().max()) <= 2e-6


def test_a_copy_after_a_failure(kv: RandomKV) -> None:
    driver = CacheDriver(SHAPE, **OPTIONS)
    driver.step(kv, 0, 63)
    before = snapshot(driver)
    with failing(PageStore, "append", 2, InjectedError, late=False), pytest.raises(InjectedError):
        driver.step(kv, 63, 65)
    assert_as_before(deepcopy(driver), before)


def test_reset_is_always_a_way_out(kv: RandomKV) -> None:
    driver = CacheDriver(SHAPE, **OPTIONS)
    with failing(PageStore, "append", 1, InjectedError, late=True), pytest.raises(InjectedError):
        driver.step(kv, 0, 1)
    try:
        driver.step(kv, 0, 1)
    except CacheStateError as error:
        assert "reset" in str(error)
        driver.cache.reset()
        driver.step(kv, 0, 1)
    assert driver.cache.get_seq_length() == 1
    driver.cache.check_integrity()
