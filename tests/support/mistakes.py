"""A filled cache of a tiny model, and the check that a refused call has changed nothing in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from spin_hf import SpinCache
from tests.support.memory import SMALL_ZONES
from tests.support.zoo import random_tokens

IDS = random_tokens(3, 120, seed=6)
EXACT: dict[str, Any] = {"method": "shadowkv", "budget": 1 << 20, **SMALL_ZONES}


TIERS = {"one tier": {}, "two tiers": {"gpu_memory": "200kB"}}


@torch.no_grad()
def feed(model: Any, cache: Any, start: int, stop: int, rows: Any = slice(0, 2), **kwargs: Any) -> Tensor:
    """Logits of tokens [start, stop) of the sequences `rows` of `IDS`."""
    logits: Tensor = model(IDS[rows, start:stop], past_key_values=cache, **kwargs).logits
    return logits


def filled(model: Any, tokens: int = 60, **options: Any) -> SpinCache:
    cache = SpinCache(model.config, **EXACT | options)
    feed(model, cache, 0, tokens)
    return cache


def assert_untouched(model: Any, cache: SpinCache, tokens: int = 60) -> None:
    """The cache holds what it held, and the next step gives what a DynamicCache gives."""
    assert cache.get_seq_length() == tokens
    cache.check_integrity()
    expected = DynamicCache(config=model.config)
    feed(model, expected, 0, tokens)
    ours, theirs = (feed(model, each, tokens, tokens + 1) for each in (cache, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)
