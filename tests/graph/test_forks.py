"""Captured steps of a cache and of its forks, in turns: each equals a deep copy that gets the same tokens."""

from __future__ import annotations

import os
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch

from spin_hf import Bisection, SpinCache
from tests.support.clustering_methods import clustering_often, little_slack
from tests.support.graph_recorder import capture_on_cpu
from tests.support.zoo import build_model

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu captures graphs"),
]

PROMPT, STEPS, TURNS = 85, 3, 2
TIERS: dict[str, dict[str, Any]] = {"resident": {}, "tiered": {"gpu_memory": 110_000}}


def _tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 100, (2, count), generator=torch.Generator().manual_seed(seed))


def _decode(model: Any, cache: SpinCache, seed: int) -> torch.Tensor:
    tokens = _tokens(STEPS, seed).split(1, 1)
    return torch.cat([model(token, past_key_values=cache).logits for token in tokens], 1)


@torch.no_grad()
@pytest.mark.sweep
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bisection"])
def test_replayed_steps_of_forks(family: str, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are in static tensors of the captured step when the fork is made."""
    clusters = family == "bisection"
    model = build_model("llama" if clusters else family).eval()
    recorder = capture_on_cpu(monkeypatch)
    method = clustering_often(Bisection, 32, 16)(2) if clusters else "shadowkv"
    with little_slack():
        cache = SpinCache(model, method, budget=16, num_sink_tokens=4, recent_window=8, **TIERS[tier])
    model(_tokens(PROMPT, 0), past_key_values=cache)
    _decode(model, cache, 1)
    fork = cache.fork()
    mirrors = deepcopy(cache), deepcopy(fork)
    replays = recorder.replays
    for turn in range(TURNS):
        for side, (held, mirror) in enumerate(zip((cache, fork), mirrors, strict=True)):
            ours = _decode(model, held, 10 + 2 * turn + side)
            torch.testing.assert_close(ours, _decode(model, mirror, 10 + 2 * turn + side), rtol=1e-5, atol=1e-5)
        cache.check_integrity()
        fork.check_integrity()
    assert recorder.replays >= replays + 4 * (TURNS * STEPS - 2)
