"""Captured steps of tensor-parallel models, with fake graphs and interpreted kernels: all ranks replay, or none does."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

from spin_hf import SpinCache
from tests.support.rank_cases import sequences
from tests.support.ranks import four_heads, rank_pool, whole_model
from tests.support.zoo import random_tokens

pytestmark = [
    pytest.mark.slow,  # kernels are interpreted on every rank
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu captures graphs"),
]
OPTIONS: dict[str, Any] = {"method": "shadowkv", "budget": 16, "recent_window": 8}


def one_process() -> torch.Tensor:
    """Tokens of the reference in one process."""
    model = whole_model(four_heads())
    return sequences(model, SpinCache(model, **OPTIONS), random_tokens(1, 41), 8)


def test_steps_are_replayed_without_a_word_to_other_ranks() -> None:
    expected = one_process()
    for tokens, replays, refused, exchanged in rank_pool().run(2, "captured", four_heads(), OPTIONS):
        assert refused is None
        assert replays == 5  # one token by the prompt, and one of each way of calling eagerly
        assert torch.equal(tokens, expected)
        assert exchanged == ["capture a step"]  # the first steps by hand have no mask


def test_a_rank_that_cannot_capture() -> None:
    """Nobody replays: NCCL expects all ranks to capture a collective together."""
    expected = one_process()
    found = rank_pool().run(2, "captured", four_heads(), OPTIONS, 1)
    assert {each[2] for each in found} == {"capturing failed: this rank cannot capture"}
    for tokens, replays, _, _ in found:
        assert not replays
        assert torch.equal(tokens, expected)
