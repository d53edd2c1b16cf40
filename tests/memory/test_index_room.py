"""Temporary memory of clustering and summaries: bounded by what is free, and needed before page frames take the rest.

The GPU is only counted (`tests/support/fake_gpu.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from spin_hf import SpinCache, plan
from spin_hf.attention.methods.clustering import TokenClusters
from spin_hf.config import INDEX_COPIES
from spin_hf.indexing import summarize
from spin_hf.memory import plan as plan_module
from spin_hf.storage import permute_pages
from tests.support.cache_driver import CacheDriver, RandomKV
from tests.support.clustered_pages import span_ends
from tests.support.fake_gpu import FakeGpu, fake_gpu
from tests.support.fitted import SHAPE, ZONES, Small, fits_of
from tests.support.inspection import state_of
from tests.support.tiny_llama import tiny_llama
from tests.support.tuning import tuned

TOKENS = 1000
PAGE_BYTES = 4 * (8 + 6) * 4
LAYER_BYTES = TOKENS // 4 * 2 * PAGE_BYTES
SPAN_BYTES = 64 // 4 * 2 * PAGE_BYTES
"""Pages of a span in a layer, at least one of which is clustered at a time."""


@contextmanager
def reads_noted(gpu: FakeGpu) -> Iterator[list[tuple[int, int]]]:
    """(bytes read at once, bytes free then) of all that is clustered or summarized in this block."""
    original, noted = permute_pages.content, list[tuple[int, int]]()

    def content(*arguments: Any) -> Tensor:
        made = original(*arguments)
        noted.append((made.nbytes, gpu.free))
        return made

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(permute_pages, "content", content)
        yield noted


def prompt_behind(total: int, left: int | None = None) -> tuple[CacheDriver, list[tuple[int, int]]]:
    """A cache on a GPU of `total` bytes, of which `left` are free when the prompt is indexed, and what indexing read."""
    kv = RandomKV.random(SHAPE, 1, TOKENS + 1, seed=7)
    with fake_gpu(total) as gpu:
        driver = CacheDriver(SHAPE, method=Small(), **ZONES)
        gpu.caches.append(driver.cache)
        driver.step(kv, 0, TOKENS)
        if left is not None:
            gpu.user = gpu.free - left
        with reads_noted(gpu) as noted:
            driver.step(kv, TOKENS, TOKENS + 1)
        driver.cache.check_integrity()
    return driver, noted


def test_page_frames_are_sized_behind_indexing() -> None:
    """While tokens are clustered there are as few frames as during the prompt. A cap in bytes leaves them as they are."""
    kv, total = RandomKV.random(SHAPE, 1, TOKENS + 1, seed=7), LAYER_BYTES * SHAPE.layers
    frames: list[int] = []

    class Noting(Small):  # type: ignore[misc, valid-type]
        def form_clusters(self, keys: Tensor, observation_queries: Tensor | None) -> TokenClusters:
            frames.append(driver.cache.paged_layers[0].store.frames.num_slots)
            return super().form_clusters(keys, observation_queries)

    with tuned(prompt_frames=16), fake_gpu(total) as gpu:
        driver = CacheDriver(SHAPE, method=Noting(), **ZONES)
        gpu.caches.append(driver.cache)
        driver.step(kv, 0, TOKENS)
        driver.step(kv, TOKENS, TOKENS + 1)
        assert set(frames) == {16}
        assert driver.cache.paged_layers[0].store.frames.num_slots > 32
        assert gpu.free >= total // 20


def test_indexing_takes_half_of_what_is_free_at_most() -> None:
    """Spans, fits and summaries do not depend on it."""
    ample, reads = prompt_behind(100 * LAYER_BYTES)
    assert max(size for size, _ in reads) > LAYER_BYTES
    for left in (8 * SPAN_BYTES, 24 * SPAN_BYTES, 100 * SPAN_BYTES):
        driver, noted = prompt_behind(100 * LAYER_BYTES, left)
        assert len(noted) > len(reads)
        for size, free in noted:
            assert INDEX_COPIES * size <= max(free / 2, INDEX_COPIES * SPAN_BYTES) * 1.2  # fewer bytes were left behind
        assert span_ends(driver) == span_ends(ample)
        for one, other in zip(fits_of(driver.cache), fits_of(ample.cache), strict=True):
            assert all(torch.equal(one[name], other[name]) for name in other)
        for one, other in zip(state_of(driver.cache).layers, state_of(ample.cache).layers, strict=True):
            assert one.store is not None
            assert other.store is not None
            pages = TOKENS // 4
            assert torch.equal(one.store.pages(pages)[0], other.store.pages(pages)[0])
            summaries = (store.summaries["codes"].of_pages(store.rows(0, pages)) for store in (one.store, other.store))
            assert torch.equal(*summaries)


def test_a_long_prompt_is_summarized_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters of one page may be read apart, also in spans."""
    driver, _ = prompt_behind(100 * LAYER_BYTES)
    state, pages = state_of(driver.cache), TOKENS // 4
    for each in (256, 64, 16):
        monkeypatch.setattr(summarize, "_INDEX_TOKENS", 4 * each)
        for layer in state.layers:
            assert layer.store is not None
            for array in (array for summary in layer.store.summaries.values() for array in summary.arrays):
                rows = torch.arange(array.used_rows)
                array.put(rows, torch.zeros_like(array.take(rows)))
            layer.invalidate(0, pages)
        with fake_gpu(100 * LAYER_BYTES) as gpu, reads_noted(gpu) as noted:
            summarize.summarize_stale(state)
        assert [size for size, _ in noted][:-1] == [2 * each * 2 * PAGE_BYTES] * (-(-pages // each) - 1)  # both layers
        driver.cache.check_integrity()


def test_a_plan_counts_indexing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An 8B shape beside its weights on a card of 24 GB, where it must fit, and on a GPU that is not known."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        dtype=torch.bfloat16,
    )  # fmt: skip
    anywhere = plan(config, context_length=131072, prefill_chunk_size=2048)
    assert anywhere.prefill_bytes == INDEX_COPIES * (512 << 20)
    free = int(7.4 * 2**30)
    monkeypatch.setattr(plan_module, "free_gpu_memory", lambda _: free)
    made = plan(config, context_length=131072)
    assert made.fits
    assert made.gpu_bytes + made.metadata_bytes + made.prefill_bytes <= free
    assert made.prefill_bytes == 4096 * 2 * (8 * 4096 + 3 * 14336) + 4 * (128 << 20)  # a chunk, and pieces


@pytest.mark.parametrize("tokens", [1, 10])
def test_a_first_call_of_few_tokens_comes_before_its_storage(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is short enough to select pages, and its caps are known, as admission has computed them."""
    model, ids = tiny_llama(), torch.randint(0, 64, (1, 40))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with fake_gpu(1 << 20) as gpu, torch.no_grad():
        cache = SpinCache(model, **ZONES)
        gpu.caches.append(cache)
        for first, stop in [(0, tokens), (tokens, tokens + 1), (tokens + 1, 40)]:
            model(ids[:, first:stop], past_key_values=cache)
    assert cache.get_seq_length() == 40
    cache.check_integrity()
