"""Forks on a GPU: replayed steps of both sides against deep copies, and what a fork allocates."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from spin_hf import Bisection, Quest, RetroInfer, ShadowKV, SpinCache
from tests.support.clustering_methods import clustering_often, little_slack
from tests.support.zoo import build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

METHODS = [
    ShadowKV(), Quest(), clustering_often(Bisection, 64, 32)(2), clustering_often(RetroInfer, 64, 32)()
]  # fmt: skip
OPTIONS: dict[str, Any] = {"budget": 24, "recent_window": 8}


def _decode(model: Any, cache: SpinCache, seed: int, steps: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 100, (cache.stats().sequences, steps), generator=generator).cuda()
    return torch.cat([model(token, past_key_values=cache).logits for token in tokens.split(1, 1)], 1)


@torch.no_grad()
@pytest.mark.parametrize("gpu_memory", ["auto", 220_000])
@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_both_sides_equal_deep_copies(family: str, method: Any, gpu_memory: Any) -> None:
    model = build_model(family).cuda().eval()
    with little_slack():
        cache = SpinCache(model, method, gpu_memory=gpu_memory, **OPTIONS)
    model(torch.randint(3, 100, (2, 270), generator=torch.Generator().manual_seed(0)).cuda(), past_key_values=cache)
    _decode(model, cache, 1)
    fork = cache.fork()
    mirrors = deepcopy(cache), deepcopy(fork)
    croppable = family == "llama"  # a full sliding window forgets what a crop would need
    for turn in range(3):
        for side, (held, mirror) in enumerate(zip((cache, fork), mirrors, strict=True)):
            seed = 10 + 2 * turn + side
            torch.testing.assert_close(_decode(model, held, seed), _decode(model, mirror, seed), rtol=1e-4, atol=1e-4)
            held.check_integrity()
        if croppable:
            fork.crop(-40)
            mirrors[1].crop(-40)
    del cache, held
    _decode(model, fork, 99)
    fork.check_integrity()


@torch.no_grad()
def test_a_fork_allocates_little() -> None:
    model = build_model("llama").cuda().eval()
    cache = SpinCache(model, "shadowkv", **OPTIONS)
    model(torch.randint(3, 100, (1, 400), generator=torch.Generator().manual_seed(0)).cuda(), past_key_values=cache)
    _decode(model, cache, 1, 2)
    cache.fork()
    before = torch.cuda.memory_allocated()
    fork = cache.fork(8)
    assert torch.cuda.memory_allocated() - before <= 1 << 14
    assert fork.stats().sequences == 8
