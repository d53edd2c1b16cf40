"""Captured steps of other methods than ShadowKV, with a stand-in for the graph: as eager steps, pages completed meanwhile."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

from spin_hf import Quest, SpinCache

from ..support.zoo import PAD_TOKEN_ID
from .recorder import capture_on_cpu
from .stale import assert_same, small_model

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu captures graphs"),
]

STEPS = 24


def _generate(model: Any, cache: SpinCache, padded: bool) -> Any:
    ids = torch.randint(3, 100, (2, 101), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :21], mask[0, :21] = PAD_TOKEN_ID, 0
    return model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True, output_logits=True,
        max_new_tokens=STEPS, do_sample=False, eos_token_id=None,
    )  # fmt: skip


def _compare(model: Any, method: Any, padded: bool, monkeypatch: pytest.MonkeyPatch, **options: Any) -> SpinCache:
    """Captured steps against the reference's eager ones."""
    options = {"budget": 32, "recent_window": 8, **options}
    reference = SpinCache(model.config, method, **options)
    expected = _generate(model, reference, padded)
    recorder = capture_on_cpu(monkeypatch)
    cache = SpinCache(model, method, **options)
    actual = _generate(model, cache, padded)
    assert recorder.replays == STEPS - 2  # one token by the prefill, one eagerly
    assert torch.equal(actual.sequences, expected.sequences)
    assert_same(torch.stack(actual.logits), torch.stack(expected.logits))
    stats, counted = cache.stats(), reference.stats()
    assert (stats.sparse_queries, stats.attended_tokens) == (counted.sparse_queries, counted.attended_tokens)
    cache.check_integrity()
    return cache


@pytest.mark.parametrize("padded", [False, True])
def test_quest(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = _compare(small_model(), Quest(1), padded, monkeypatch)
    assert cache.stats().attended_tokens < 100
