"""The overlap that a benchmark replays: the knob turns the right way, and what it measures is what `traces.py` measures."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import spin_hf.kernels
import spin_hf.layer
from benchmarks.common import shapes
from benchmarks.speed import overlap
from spin_hf import SpinCache
from tests.support.tuning import tune

LISTED = torch.tensor([[0, 3, 5, 7, 9, -1, 4, 4]], dtype=torch.int32)


def test_chosen_pages_leave_out_fixed_ones_and_marks() -> None:
    listed = LISTED.clone()
    listed[0, 2] += 1 << 30  # being loaded
    chosen = overlap.chosen_pages(listed, torch.tensor([6]), torch.tensor([0, 9, -1]), 10)
    assert chosen[0].nonzero().flatten().tolist() == [3, 5, 7]


def test_queries_keep_their_length_and_lose_what_turns_fast() -> None:
    config = shapes.SHAPES["llama-8b"]
    weights = overlap.pair_weights(config, overlap.FASTEST)
    assert len(weights) == 128
    assert torch.equal(weights[:64], weights[64:])  # RoPE pairs i with i + 64
    assert float(weights.square().sum()) == pytest.approx(128)
    assert [int(w > 0) for w in weights[:64]] == [0] * 12 + [1] * 52  # 500000 ** (-12 / 64) < 0.1


def test_bisection_finds_a_falling_overlap_and_the_end_that_is_closest() -> None:
    spread, found = overlap.find_spread(lambda s: 1 - 0.8 * s, 0.75)
    assert spread == pytest.approx(0.3125, abs=0.02)
    assert found == pytest.approx(0.75, abs=0.012)
    assert overlap.find_spread(lambda s: 0.9, 0.75)[0] > 0.99
    assert overlap.find_spread(lambda s: 0.5, 0.75)[0] < 0.01


def test_the_target_is_the_mean_of_the_traces() -> None:
    assert 0.7 < overlap.real_overlap() < 0.81
    assert overlap.real_overlap(16) < overlap.real_overlap(4) < overlap.real_overlap()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="interprets kernels on the CPU")
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_spread_decides_the_overlap(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from spin_hf.kernels.triton_launchers import launchers

    config = kind(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=4096, dtype=torch.float32,
        tie_word_embeddings=kind is Qwen3Config, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = shapes.condition(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    tune(monkeypatch, programs=4)
    cache = SpinCache(config, "shadowkv", budget=96)
    shapes.fill_spin(cache, config, 768, "cpu")
    monkeypatch.setattr(spin_hf.kernels, "launchers", lambda device: launchers)
    found = {}
    for spread, fastest in ((0.0, overlap.NEARLY_STILL), (0.3, overlap.FASTEST), (1.0, overlap.FASTEST)):
        overlap.set_spread(model, spread, fastest)
        found[spread] = overlap.measure(model, cache, steps=3)[1]
    assert found[0.0] > 0.95
    assert found[1.0] < 0.5
    assert found[1.0] + 0.1 < found[0.3] < found[0.0] - 0.05
    assert not any("run" in vars(layer) for layer in cache.layers)
    overlap.set_spread(model, 0.3)
    said = [20]
    with torch.no_grad():
        for _ in range(5):
            said.append(int(model(torch.tensor([said[-1:]]), use_cache=False).logits[0, -1].argmax()))
    assert said == [20, 19, 18, 17, 16, 15]  # no token comes twice, so none repeats its selection
