"""`generate` compiles the forward of a cache made from a config: exact, once, and replayed without Python or waiting."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from spin_hf import SpinCache
from spin_hf.layer import SpinLayer
from tests.support.padded_pair import FULL, generate_short, padded_inputs
from tests.support.synchronisation import no_synchronisation
from tests.support.zoo import build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


class Calls:
    """Counts calls of a method."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.count, original = 0, getattr(SpinLayer, name)

        def counting(*args: Any) -> None:
            self.count += 1
            original(*args)

        monkeypatch.setattr(SpinLayer, name, counting)


@pytest.mark.parametrize("padded", [False, True])
def test_compiled_generation_equals_dynamic_cache(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama").cuda().eval()
    expected = generate_short(model, DynamicCache(config=model.config), padded)
    calls = Calls(monkeypatch, "launch")
    for turn in range(3):
        cache = SpinCache(model.config, **FULL)
        actual = generate_short(model, cache, padded)
        assert torch.equal(actual.sequences, expected.sequences)
        a, b = torch.stack(actual.logits), torch.stack(expected.logits)
        finite = torch.isfinite(b)
        assert float((a - b)[finite].abs().max() / b[finite].abs().max()) < 1e-4
        cache.check_integrity()
        assert cache.get_seq_length() == 129
        if turn == 0:
            first, graphs = calls.count, counters["stats"]["unique_graphs"]
        del cache, actual
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert counters["stats"]["unique_graphs"] == graphs
    assert first <= 4 * len(model.model.layers), "replays call Python"
    assert calls.count == first, "another cache is recorded anew"


@torch.no_grad()
def test_no_step_waits_for_the_host_and_what_is_evicted_comes_back() -> None:
    model = build_model("llama").cuda().eval()
    cache = SpinCache(model.config, "shadowkv", budget=24, recent_window=8, gpu_memory=100_000)
    model(padded_inputs()["input_ids"], past_key_values=cache)
    token, embeds = torch.full((2, 1), 5, device="cuda"), torch.empty((2, 1, 0), device="cuda")
    forward = model.get_compiled_call(None)

    def step() -> Any:
        create_causal_mask(model.config, embeds, None, cache)  # as `generate` does, but for a mask of its own
        return forward(input_ids=token, past_key_values=cache)

    for _ in range(5):
        step()
    with no_synchronisation():
        for _ in range(300):
            step()
    assert cache.get_seq_length() == 90 + 305
    assert cache.stats().evictions > 300
    cache.check_integrity()
    assert counters["inductor"]["cudagraph_skips"] == 0


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
    """Without a step prepared beforehand, the op stays outside the graphs that `reduce-overhead` makes."""
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
