"""The same tokens give the same sparse attention, however they came: paged or not, in other groupings, cropped, repeated.

The reference of each test is an ordinary run (a prompt, then token by token), which `test_sparse_oracle.py` checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_hf import Bisection, Method, Quest, RetroInfer, ShadowKV
from tests.support.cache_driver import CacheDriver, RandomKV, Shape, poisoned_memory, smallest_gpu_memory
from tests.support.conversation import Step, compare_with_oracle, random_pages, single_steps, without_near_ties
from tests.support.oracle import Rules

OPTIONS: dict[str, Any] = dict(budget=24, num_sink_tokens=4, recent_window=10)
SHAPE = Shape(layers=2, kv_heads=2, group=2, value_dim=6)
LENGTH = 120


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory():
        yield


def holes(batch_size: int, length: int) -> Tensor:
    """Left padding and a hole; the last row has none."""
    valid = torch.ones((batch_size, length), dtype=torch.bool)
    for row in range(batch_size - 1):
        valid[row, : 5 * row + 3], valid[row, 40 : 45 + 7 * row] = False, False
    return valid


def outputs(kv: RandomKV, steps: list[Step], first: int, **options: Any) -> list[Tensor]:
    """The outputs [B, tokens, heads, Dv] of tokens from `first` on, layer by layer."""
    driver = CacheDriver(kv.shape, **(OPTIONS | options))
    parts: list[list[Tensor]] = [[] for _ in range(kv.shape.layers)]
    start = 0
    for stop, valid in steps:
        for layer, out in enumerate(driver.step(kv, start, stop, valid)):
            parts[layer].append(out)
        start = stop
    driver.cache.check_integrity()
    return [torch.cat(layer, 1)[:, first:] for layer in parts]


def assert_close(
    actual: list[Tensor], expected: list[Tensor], valid: Tensor | None = None, tolerance: float = 2e-6
) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        if valid is not None:
            ours, theirs = ours[valid[:, -ours.shape[1] :]], theirs[valid[:, -theirs.shape[1] :]]
        assert torch.isfinite(ours).all()
        assert float((ours - theirs).abs().max()) <= tolerance


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("slack", [1.0, 1.15, 1.5])
def test_paging_changes_nothing(padded: bool, slack: float) -> None:
    """The smallest `gpu_memory` that a run accepts, and a little more: pages come and go at every step."""
    kv = random_pages(SHAPE, 3, 300, seed=0)
    valid = holes(3, 300) if padded else None
    steps = single_steps(270, 280, valid) + [(s, None if valid is None else valid[:, :s]) for s in (285, 299, 300)]
    rules = Rules(**OPTIONS)

    def run(cap: int) -> None:
        outputs(kv, steps, 0, gpu_memory=cap)

    cap = int(smallest_gpu_memory(run) * slack)
    assert_close(outputs(kv, steps, 270, gpu_memory=cap), outputs(kv, steps, 270), valid)
    if slack == 1.0:

        def against_oracle(seed: int) -> None:
            driver = compare_with_oracle(random_pages(SHAPE, 3, 300, seed), rules, steps, gpu_memory=cap)
            stats = driver.cache.stats()
            assert stats.evictions > 0
            assert stats.loads > stats.evictions
            assert stats.cpu_bytes > 0

        without_near_ties(against_oracle)


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize(
    "stops",
    [
        [100, *range(101, 121)],
        [17, 40, 41, 90, 100, *range(101, 121)],
        [*range(1, 121)],
        [100, 116, 120],
        [100, 101, 105, 108, 119, 120],
        [3, 19, 35, 51, 99, 100, 107, 120],
    ],
    ids=["single", "chunks", "all single", "sixteen", "mixed", "small chunks"],
)
def test_grouping_changes_nothing(stops: list[int], tight: bool) -> None:
    """Queries that select pages depend on their position, not on what they were grouped with."""
    kv = random_pages(SHAPE, 2, LENGTH, seed=1)
    valid = holes(2, LENGTH)
    options = dict(gpu_memory=tight_cap(kv, valid)) if tight else {}
    actual = outputs(kv, [(stop, valid[:, :stop]) for stop in stops], 100, **options)
    assert_close(actual, outputs(kv, single_steps(99, LENGTH, valid), 100), valid)


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("method", [ShadowKV(), Quest(dense_layers=0), RetroInfer(), Bisection()], ids=lambda m: m.name)
@pytest.mark.parametrize("count", [1, 4])
def test_chunks_of_padding_only(count: int, method: Method, tight: bool) -> None:
    """A query after nothing but padding attends to nothing, and later tokens give what they give without the padding."""
    padding = 6 * method.page_size
    kv, valid = random_pages(SHAPE, 1, LENGTH, seed=7), torch.ones((1, LENGTH), dtype=torch.bool)
    valid[:, :padding] = False
    steps = [(stop, valid[:, :stop]) for stop in [*range(count, 100, count), *range(100, LENGTH + 1)]]
    options: dict[str, Any] = dict(method=method, budget=8)

    def run(cap: int | None = None) -> list[Tensor]:
        return outputs(kv, steps, 100, **options, **({} if cap is None else dict(gpu_memory=cap)))

    actual = run(smallest_gpu_memory(run)) if tight else run()
    bare, first = kv.tokens(slice(padding, None)), 100 - padding
    assert_close(actual, outputs(bare, single_steps(first - 1, LENGTH - padding), first, **options))


def tight_cap(kv: RandomKV, valid: Tensor | None) -> int:
    """The smallest `gpu_memory` for all tokens of `kv`."""
    return smallest_gpu_memory(lambda cap: outputs(kv, single_steps(LENGTH - 1, LENGTH, valid), 0, gpu_memory=cap))


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("removed", [1, 3, 5, 8, 16, 45, 101])
def test_crop_and_append_again(removed: int, tight: bool) -> None:
    """Other tokens were there for a while, were attended to and indexed; nothing of them is left."""
    kv, other = random_pages(SHAPE, 2, LENGTH, seed=2), random_pages(SHAPE, 2, LENGTH, seed=3)
    options = OPTIONS | (dict(gpu_memory=tight_cap(kv, None)) if tight else {})
    driver = CacheDriver(SHAPE, **options)
    kept = LENGTH - 9 - removed
    driver.step(kv, 0, kept)
    start = kept
    while start < LENGTH - 9:
        stop = min(start + 3, LENGTH - 9)
        driver.step(other, start, stop)
        start = stop
    driver.cache.crop(-removed)
    assert driver.cache.get_seq_length() == kept
    driver.cache.check_integrity()
    parts = []
    for position in range(kept, LENGTH):
        parts.append(driver.step(kv, position, position + 1))
        driver.cache.check_integrity()
    actual = [torch.cat([part[layer] for part in parts], 1) for layer in range(SHAPE.layers)]
    assert_close(actual, outputs(kv, single_steps(kept, LENGTH), kept))


def test_crop_and_append_in_one_piece() -> None:
    """A crop into a page, then all at once: the pages are indexed as a prefill would."""
    kv, other = random_pages(SHAPE, 2, LENGTH, seed=4), random_pages(SHAPE, 2, LENGTH, seed=5)
    driver = CacheDriver(SHAPE, **OPTIONS)
    driver.step(kv, 0, 61)
    driver.step(other, 61, 99)
    driver.cache.crop(-38)
    driver.step(kv, 61, 100)
    actual = [driver.step(kv, position, position + 1) for position in range(100, LENGTH)]
    together = [torch.cat([part[layer] for part in actual], 1) for layer in range(SHAPE.layers)]
    assert_close(together, outputs(kv, single_steps(100, LENGTH), 100))


@pytest.mark.parametrize("tight", [False, True])
def test_generated_tokens_are_indexed(tight: bool) -> None:
    """A generated token that has left the recent window is found by a query that points at it."""
    kv = random_pages(SHAPE, 1, 200, seed=6)
    needle, asked = 100, 190
    for layer in range(SHAPE.layers):
        direction = torch.nn.functional.normalize(torch.randn(SHAPE.key_dim), dim=0)
        kv.keys[layer][:, :, needle - 4 : needle + 4] = 3 * direction
        kv.keys[layer][:, :, needle] = 6 * direction
        kv.values[layer][:, :, needle] = 7.0
        kv.queries[layer][:, :, asked] = 8 * direction
    assert needle % 8 == 4  # the page is all of the needle's
    options: dict[str, Any] = {}
    if tight:
        steps = single_steps(60, 200)
        options["gpu_memory"] = smallest_gpu_memory(lambda cap: outputs(kv, steps, 0, gpu_memory=cap))
    for out in outputs(kv, single_steps(60, 191), asked, **options):
        assert float((out - 7.0).abs().max()) < 0.2
    without = RandomKV(kv.shape, [k.clone() for k in kv.keys], kv.values, kv.queries)
    for keys in without.keys:
        keys[:, :, needle - 4 : needle + 4] = 0.0
    assert float(outputs(without, single_steps(60, 191), asked)[0].abs().max()) < 3.0
