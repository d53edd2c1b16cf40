"""The tier of a page never changes the output: the same sparse run with room for all pages, and with almost none.

Exactness tests attend to everything. Here a small budget makes the method select, so that pages are evicted and loaded.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.all_modes import MODES
from tests.support.compare import assert_same
from tests.support.inspection import state_of
from tests.support.memory import SMALL_ZONES, with_tight_gpu_memory
from tests.support.subjects import SpinSubject
from tests.support.zoo import random_tokens, subject_model

FAMILIES = ("llama", "qwen3", "gemma2", "gpt_oss", "gemma3n_text", "mimo_v2_flash", "gpt2")
SPARSE: dict[str, Any] = dict(budget=16, **SMALL_ZONES)
SHADOWKV: dict[str, Any] = dict(SPARSE, method="shadowkv")
"""Pages of 8 tokens."""
SPARSE_MODES = (
    "greedy", "beam_search", "holes", "multi_turn", "crop", "crop_into_prompt", "reset", "reorder", "select", "repeat",
    "prefix_copy", "from_cache",
)  # fmt: skip
CASES = [
    pytest.param(family, mode, id=f"{family}-{mode}")
    for family in FAMILIES
    for mode in (SPARSE_MODES if family == "llama" else SPARSE_MODES[:4])
]


@pytest.mark.sweep
@pytest.mark.parametrize(("family", "mode"), CASES)
def test_paging_changes_nothing(family: str, mode: str) -> None:
    _paging_changes_nothing(family, mode, SPARSE)


@pytest.mark.parametrize("mode", SPARSE_MODES)
def test_paging_changes_nothing_with_shadowkv(mode: str) -> None:
    _paging_changes_nothing("llama", mode, SHADOWKV)


def _paging_changes_nothing(family: str, mode: str, options: dict[str, Any]) -> None:
    roomy = SpinSubject(family, **options)
    expected = MODES[mode](roomy)

    def run(cap: int) -> SpinSubject:
        subject = SpinSubject(family, gpu_memory=cap, **options)
        assert_same(MODES[mode](subject), expected)
        return subject

    tight = with_tight_gpu_memory(run)
    for cache, other in zip(tight.caches, roomy.caches, strict=True):
        cache.check_integrity()
        ours, theirs = cache.stats(), other.stats()
        assert ours.gpu_bytes <= state_of(cache).options.gpu_memory
        assert (ours.tokens, ours.sequences) == (theirs.tokens, theirs.sequences)
        assert ours.attended_tokens == pytest.approx(theirs.attended_tokens)
        assert ours.sparse_queries == theirs.sparse_queries
    assert sum(cache.stats().evictions for cache in tight.caches) > 0


@pytest.mark.parametrize("slack", [0, 1, 2, 4])
def test_any_cap_between_the_least_and_enough(slack: int) -> None:
    """With more page frames there are fewer loads, and the same tokens."""
    expected = MODES["greedy"](SpinSubject("llama", **SHADOWKV))

    def run(cap: int) -> tuple[int, SpinSubject]:
        subject = SpinSubject("llama", gpu_memory=cap, **SHADOWKV)
        assert_same(MODES["greedy"](subject), expected)
        return cap, subject

    least, tight = with_tight_gpu_memory(run)
    _, roomier = run(least + slack * 2 * 2 * 8 * 32 * 4 * 2)  # frames of 8 tokens in 2 layers, 2 KV heads
    stats, tight_stats = roomier.caches[0].stats(), tight.caches[0].stats()
    assert stats.loads <= tight_stats.loads
    assert 0.0 <= tight_stats.hit_rate <= stats.hit_rate <= 1.0


def test_stats_add_up() -> None:
    """Counters of a run whose numbers can be told beforehand."""
    model = subject_model("llama")  # 2 layers, 2 KV heads of 16, float32
    subject = SpinSubject("llama", **SHADOWKV)
    cache = subject.new()
    assert cache.stats().tokens == cache.stats().pages == 0
    with torch.no_grad():
        model(random_tokens(3, 61), past_key_values=cache)
        assert cache.stats().sparse_queries == 0  # a prompt is attended to densely
        for _ in range(3):
            model(random_tokens(3, 1), past_key_values=cache)
    stats = cache.stats()
    assert (stats.tokens, stats.sequences) == (64, 3)
    assert stats.pages == 8 * 3 * 2 * 2
    assert stats.sparse_queries == 3 * 3 * 2 * 2
    # Of 62, 63 and 64 tokens: page 0 (sinks), 16 selected, and the pages of the last 8 tokens.
    window = [8 + 6, 8 + 7, 8]
    assert stats.attended_tokens == pytest.approx(sum(8 + 16 + tokens for tokens in window) / 3)
    assert stats.gpu_bytes >= 64 * 3 * 2 * 2 * (16 + 16) * 4
    assert stats.cpu_bytes == 0
    assert (stats.paged_layers, dict(stats.dense_layers)) == (2, {})
    for word in ("tokens", "pages", "hit rate", "evictions"):
        assert word in str(stats)


@pytest.mark.parametrize(
    ("family", "word"), [("deepseek_v3", "latent"), ("mistral", "window"), ("qwen3_next", "linear")]
)
def test_stats_name_what_is_not_paged(family: str, word: str) -> None:
    subject = SpinSubject(family)
    reasons = subject.new().stats().dense_layers
    assert any(word in reason for reason in reasons)
    assert word in str(subject.caches[0].stats())
