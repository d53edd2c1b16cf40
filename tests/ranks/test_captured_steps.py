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
EXACT: dict[str, Any] = {"budget": 1 << 20}


def one_process(folder: str, options: dict[str, Any]) -> torch.Tensor:
    """Tokens of the reference in one process."""
    model = whole_model(folder)
    return sequences(model, SpinCache(model, **options), random_tokens(1, 41), 8)


@pytest.mark.parametrize(("options", "head_dim"), [(OPTIONS, 8), (EXACT, 16)], ids=["shadowkv", "default"])
def test_steps_are_replayed_without_a_word_to_other_ranks(options: dict[str, Any], head_dim: int) -> None:
    folder = four_heads(head_dim)
    expected = one_process(folder, options)
    for tokens, replays, refused, exchanged in rank_pool().run(2, "captured", folder, options):
        assert refused is None
        assert replays == 5  # one token by the prompt, and one of each way of calling eagerly
        assert torch.equal(tokens, expected)
        assert exchanged == ["capture a step"]  # the first steps by hand have no mask


def test_a_rank_that_cannot_capture() -> None:
    """Nobody replays: NCCL expects all ranks to capture a collective together."""
    expected = one_process(four_heads(), OPTIONS)
    found = rank_pool().run(2, "captured", four_heads(), OPTIONS, 1)
    assert {each[2] for each in found} == {"capturing failed: this rank cannot capture"}
    for tokens, replays, _, _ in found:
        assert not replays
        assert torch.equal(tokens, expected)
