"""Caps and page frames become the smallest of all ranks, and grow again once all ranks have room."""

from __future__ import annotations

from typing import Any

import torch

from spin_hf import SpinCache
from spin_hf.memory import rank_budgets
from tests.support.inspection import forward_of
from tests.support.memory import SMALL_ZONES
from tests.support.zoo import build_model, random_tokens


class OtherRank:
    """Answers for another rank.

    Args:
        cap, frames: of the other rank.
    """

    def __init__(self, cap: int, frames: int = 1 << 62) -> None:
        self.other = cap, frames

    def smallest(self, what: str, *numbers: int) -> list[int]:
        return [min(pair) for pair in zip(numbers, self.other, strict=True)]


def filled(**options: Any) -> tuple[Any, SpinCache]:
    model = build_model("llama")
    cache = SpinCache(model, budget=16, **SMALL_ZONES, **options)
    with torch.no_grad():
        model(random_tokens(2, 120), past_key_values=cache)
    return model, cache


def frames_of(cache: SpinCache) -> int:
    stats = cache.stats()
    return stats.mandatory_frames + stats.buffer_frames


def test_the_smallest_cap_counts() -> None:
    model, cache = filled(gpu_memory=150_000)
    gpu, before = forward_of(cache).gpu, frames_of(cache)
    rank_budgets.agree(gpu, OtherRank(1 << 62))  # type: ignore[arg-type]
    assert frames_of(cache) == before
    rank_budgets.agree(gpu, OtherRank(110_000))  # type: ignore[arg-type]
    assert frames_of(cache) < before
    assert set(gpu.caps.values()) == {110_000}
    cache.check_integrity()
    with torch.no_grad():
        model(random_tokens(2, 1), past_key_values=cache)
        gpu.before_step(2, 1, checks=True)
    assert frames_of(cache) == before
    cache.check_integrity()


def test_the_fewest_frames_count() -> None:
    _, cache = filled(gpu_memory=150_000)
    gpu, store = forward_of(cache).gpu, cache.paged_layers[0].store
    assert store is not None
    before = store.num_frames
    rank_budgets.agree(gpu, OtherRank(1 << 62, before - 2))  # type: ignore[arg-type]
    assert {layer.store.num_frames for layer in cache.paged_layers if layer.store} == {before - 2}
    assert gpu.has_given_back
    cache.check_integrity()


def test_no_cap_stays_none() -> None:
    _, cache = filled()
    gpu = forward_of(cache).gpu
    rank_budgets.agree(gpu, OtherRank(1 << 62))  # type: ignore[arg-type]
    assert set(gpu.caps.values()) == {None}
    assert not frames_of(cache)
