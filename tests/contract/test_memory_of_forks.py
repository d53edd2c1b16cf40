"""Memory of forks: pages that no side has written are held once, and memory that one side leaves serves the others."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch

from spin_hf import ShadowKV, SpinCache
from tests.support.cache_driver import RandomKV, poisoned_memory
from tests.support.fake_gpu import bytes_of, fake_gpu
from tests.support.faults import Faults
from tests.support.forks import SHAPE, TIERS, assert_apart, document, sparse_family
from tests.support.inspection import state_of, unpaged_layers
from tests.support.tuning import tuned
from tests.support.zoo import random_tokens, subject_model


def arrays_of(cache: SpinCache) -> list[Any]:
    return [array for layer in cache.paged_layers for array in layer.store._arrays()]  # type: ignore[union-attr]


@pytest.mark.parametrize("tier", TIERS)
def test_a_fork_copies_nothing(tier: str) -> None:
    with tuned(max_chunk_segments=4):
        driver = document(**(TIERS[tier] | ({"gpu_memory": 400_000} if TIERS[tier] else {})))
        faults = Faults()
        with faults.armed(None):
            fork = driver.cache.fork(8)
            made = faults.held()
        for ours, theirs in zip(arrays_of(fork), arrays_of(driver.cache), strict=True):
            assert len(ours.chunks) > 1
            assert all(
                one.data_ptr() == other.data_ptr() for one, other in zip(ours.chunks, theirs.chunks, strict=True)
            )
        stats = driver.cache.stats()
        assert made <= (stats.gpu_bytes + stats.cpu_bytes) / 100
        assert fork.stats().sequences == 8
        assert fork.stats().pages == stats.pages
        assert (stats.cpu_bytes > 0) == bool(TIERS[tier])


def distinct_bytes(caches: list[SpinCache]) -> int:
    """Bytes of all chunks, each counted once."""
    return sum(
        {chunk.data_ptr(): chunk.nbytes for cache in caches for a in arrays_of(cache) for chunk in a.chunks}.values()
    )


@pytest.mark.parametrize("forks", [1, 8], ids=["a fork of eight sequences", "eight forks"])
def test_eight_questions_hold_one_document(forks: int) -> None:
    """Each question adds the segments that it writes: here one of 20."""
    with tuned(max_chunk_segments=1, min_chunk_segments=1):
        driver = document()
        one = distinct_bytes([driver.cache])
        caches = [driver.cache.fork(8 // forks) for _ in range(forks)]
        for seed, cache in enumerate(caches):
            side = copy.copy(driver)
            side.cache = cache
            rows = state_of(cache).sequences.batch_size
            kv = RandomKV.random(SHAPE, rows, 5010, seed)
            for stop in range(5002, 5010):
                side.step(kv, stop - 1, stop)
            cache.check_integrity()
        assert distinct_bytes([driver.cache, *caches]) <= one * 28 // 20
        assert_apart([driver.cache, *caches])
        del driver.cache
        assert distinct_bytes(caches) <= one * 28 // 20


def test_what_one_side_leaves_serves_the_other() -> None:
    """After its forks have ended, a cache writes to its pages without copies, and its pool does not grow."""
    with poisoned_memory():
        caches = sparse_family(ShadowKV())
        caches.pairs[0].append(300, 0)
        sequences = state_of(caches.pairs[0].cache).sequences
        for round_ in range(5):
            caches.fork(0)
            caches.pairs[1].append(50, round_)
            caches.end(1)
            caches.pairs[0].append(1, round_)
            caches.check()
        caches.pairs[0].append(300, 8)
        assert not sequences.shared
        assert len(sequences.refcounts) <= 4
        before = [list(row) for row in sequences.directory]
        caches.fork(0)
        caches.end(1)
        caches.pairs[0].append(1, 9)
        assert sequences.directory == before, "a segment that no fork uses any more was copied"


def test_a_fork_that_is_deleted_frees_its_memory() -> None:
    driver = document()
    fork = driver.cache.fork()
    chunk, table = weakref.ref(arrays_of(fork)[0]), weakref.ref(state_of(fork).sequences)
    del fork
    gc.collect()
    assert chunk() is None
    assert table() is None
    chunks = [weakref.ref(slab) for array in arrays_of(driver.cache) for slab in array.chunks.slabs]
    fork = driver.cache.fork()
    del driver.cache
    gc.collect()
    assert all(chunk() is not None for chunk in chunks)
    del fork
    gc.collect()
    assert all(chunk() is None for chunk in chunks)


def test_a_fork_copies_windows_without_the_tokens_before_them() -> None:
    model = subject_model("gemma3_text")
    cache = SpinCache(model)
    with torch.no_grad():
        model(random_tokens(1, 200), past_key_values=cache)
    layers = unpaged_layers(cache.fork())
    assert layers
    for layer in layers:
        for states in (layer.keys, layer.values):
            assert states.untyped_storage().nbytes() == states.nbytes


def test_shared_pages_are_not_promised_to_others() -> None:
    """To move shared pages to the cpu tier would take memory and free none."""
    with fake_gpu(100_000_000) as gpu:
        driver = document()
        gpu.caches = [driver.cache]
        held = bytes_of(driver.cache)
        fork = driver.cache.fork()
        assert driver.cache.release_gpu_memory() == fork.release_gpu_memory() == 0
        assert bytes_of(driver.cache) == held
        assert driver.cache.stats().cpu_bytes == 0
        del fork
        given = driver.cache.release_gpu_memory()
        assert given == held - bytes_of(driver.cache) > held / 2
        fork = driver.cache.fork()
        fork.reset()
        assert fork.release_gpu_memory() == 0
        driver.cache.check_integrity()


def test_a_deep_copy_of_a_fork_shares_nothing() -> None:
    driver = document()
    fork = driver.cache.fork()
    apart = copy.deepcopy(fork)
    ours = {chunk.data_ptr() for array in arrays_of(apart) for chunk in array.chunks}
    theirs = {chunk.data_ptr() for array in arrays_of(fork) for chunk in array.chunks}
    assert not ours & theirs
    assert not state_of(apart).sequences.shared
    apart.check_integrity()
