"""Captured steps of methods other than ShadowKV, with a fake graph, equal eager steps; pages are completed meanwhile."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_hf import AttentionError, Bisection, Fitted, Quest, SpinCache
from spin_hf.attention.methods.seer_gate_file import load_gates
from tests.support.graph_recorder import capture_on_cpu, eagerly
from tests.support.seer_gates import gates_for
from tests.support.stale_graph import assert_same, small_model
from tests.support.zoo import PAD_TOKEN_ID

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu captures graphs"),
]

STEPS, PROMPT = 24, 121
"""Of tokens; the steps complete a page of 32."""


def _generate(model: Any, cache: SpinCache, padded: bool) -> Any:
    ids = torch.randint(3, 100, (2, PROMPT), generator=torch.Generator().manual_seed(1))
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


@pytest.mark.sweep(keep=[1])
@pytest.mark.parametrize("padded", [False, True])
def test_quest(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = _compare(small_model(), Quest(1), padded, monkeypatch)
    assert cache.stats().attended_tokens < 100


@pytest.mark.sweep(keep=[1])
@pytest.mark.parametrize(("padded", "threshold", "alike"), [(False, 0.3, True), (True, None, False)])
def test_seer(
    padded: bool, threshold: float | None, alike: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With gates of its own for every layer, that rotate alike or not."""
    model = small_model()
    method = replace(gates_for(model, tmp_path), threshold=threshold)
    gates = load_gates(tmp_path)
    assert len(gates.layers) > 1
    if not alike:
        gates.layers[1] = replace(gates.layers[1], gate_frequencies=0.5 * gates.layers[1].gate_frequencies)
        gates.save(tmp_path / "gates.safetensors")
    cache = _compare(model, method, padded, monkeypatch)
    assert cache.stats().attended_tokens < 100


@torch.no_grad()
@pytest.mark.parametrize("method", [Fitted(), Bisection()], ids=["fitted", "bisection"])
def test_replays_that_read_everything_leave_pages_to_summarise(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages that they complete are summarised before the first step that selects."""
    model, token = small_model(), torch.full((2, 1), 5)
    recorder = capture_on_cpu(monkeypatch)
    cache = SpinCache(model, method, budget=32, recent_window=8, dense_below=82)
    model(torch.randint(3, 100, (2, 70), generator=torch.Generator().manual_seed(3)), past_key_values=cache)
    for _ in range(12):
        model(token, past_key_values=cache)
    assert recorder.replays == 11
    assert [layer.state.stale_pages for layer in cache.paged_layers] == [(0, 20)] * len(cache.paged_layers)
    for _ in range(6):
        model(token, past_key_values=cache)
    assert recorder.replays == 16  # a variant of its own, which runs eagerly once
    cache.check_integrity()


@torch.no_grad()
def test_positions_that_do_not_count_real_tokens_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In captured steps too: positions are checked after the launch, and the step is rolled back."""
    model, token = small_model(), torch.full((1, 1), 5)
    recorder = capture_on_cpu(monkeypatch)
    caches = [SpinCache(model, gates_for(model, tmp_path), budget=32, recent_window=8)]
    with eagerly(model):
        caches.append(SpinCache(model, gates_for(model, tmp_path), budget=32, recent_window=8))
    ids = torch.randint(3, 100, (1, 70), generator=torch.Generator().manual_seed(3))
    for cache in caches:
        model(ids, past_key_values=cache)
        cache.logits = [
            model(token, position_ids=torch.tensor([[at]]), past_key_values=cache).logits for at in range(70, 74)
        ]
    assert recorder.replays == 3
    with pytest.raises(AttentionError, match=r"position ids that count the real tokens.*\[74\].* got \[75\]"):
        model(token, position_ids=torch.tensor([[75]]), past_key_values=caches[0])
    assert recorder.replays == 4
    for cache in caches:
        assert cache.get_seq_length() == 74
        cache.logits.append(model(token, position_ids=torch.tensor([[74]]), past_key_values=cache).logits)
        cache.check_integrity()
    assert recorder.replays == 5
    assert_same(*(torch.cat(cache.logits, 1) for cache in caches))
    mask = torch.ones((1, 76), dtype=torch.int64)
    mask[:, 3:9] = 0
    for _ in range(3):  # without position ids the model counts all tokens
        with pytest.raises(AttentionError, match="position ids that count the real tokens"):
            model(token, attention_mask=mask, past_key_values=caches[0])
    assert recorder.replays == 5
