"""Caches made from a config are captured as those made from a model are; forwards that users compiled stay right."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache

from spin_hf import SpinCache
from tests.support.padded_pair import FULL, generate_short, padded_inputs
from tests.support.zoo import build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_of_a_config_is_captured(padded: bool) -> None:
    """Its first forward shows which model runs; nothing is compiled."""
    model = build_model("llama").cuda().eval()
    expected = generate_short(model, DynamicCache(config=model.config), padded)
    for _ in range(2):
        cache = SpinCache(model.config, **FULL)
        actual = generate_short(model, cache, padded)
        assert torch.equal(actual.sequences, expected.sequences)
        a, b = torch.stack(actual.logits), torch.stack(expected.logits)
        finite = torch.isfinite(b)
        assert float((a - b)[finite].abs().max() / b[finite].abs().max()) < 1e-4
        cache.check_integrity()
        assert cache.get_seq_length() == 129
        steps = cache.calls.steps
        assert steps is not None
        assert all(step is not None for step in steps.captured.values())
    assert counters["stats"]["unique_graphs"] == 0


def test_caches_that_come_and_go_leak_nothing() -> None:
    model = build_model("llama").cuda().eval()
    for _ in range(2):
        generate_short(model, SpinCache(model.config, **FULL))
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        generate_short(model, SpinCache(model.config, **FULL))
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.parametrize("of", ["model", "config"])
def test_a_forward_that_the_user_compiled_with_graphs(of: str) -> None:
    """The op stays outside the graphs that `reduce-overhead` makes."""
    model = build_model("llama").cuda().eval()
    ids = padded_inputs()["input_ids"]
    tokens = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(2)).cuda()

    @torch.no_grad()
    def run(cache: Any, forward: Any) -> torch.Tensor:
        model(ids, past_key_values=cache)
        return torch.cat([forward(input_ids=t, past_key_values=cache).logits.clone() for t in tokens.split(1, 1)], 1)

    expected = run(DynamicCache(config=model.config), model.forward)
    compiled = torch.compile(model.forward, mode="reduce-overhead")
    cache = SpinCache(model if of == "model" else model.config, **FULL)
    torch.testing.assert_close(run(cache, compiled), expected, rtol=1e-3, atol=1e-3)
    cache.check_integrity()
