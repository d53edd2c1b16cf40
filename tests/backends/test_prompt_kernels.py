"""Prompts in chunks, dense and sparse, by interpreted kernels on the CPU: what a DynamicCache gives."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from spin_hf import SpinCache
from spin_hf.kernels import triton_launchers
from tests.support.compare import RELATIVE_TOLERANCE, difference
from tests.support.interpreted_kernels import interpret_kernels
from tests.support.zoo import build_model, left_padded, random_tokens

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]


def count(monkeypatch: pytest.MonkeyPatch, name: str) -> list[None]:
    """One entry for each launch of this name from here on."""
    found: list[None] = []
    original = getattr(triton_launchers.Launchers, name)
    noting = staticmethod(lambda *given: found.append(None) or original(*given))
    monkeypatch.setattr(triton_launchers.Launchers, name, noting)
    return found


@torch.no_grad()
def logits(model: Any, cache: Any, parts: list[torch.Tensor], **given: Any) -> torch.Tensor:
    return torch.cat([model(ids, past_key_values=cache, **given).logits for ids in parts], 1)


@pytest.mark.parametrize(("family", "method"), [("llama", "fitted"), ("gpt_oss", "quest")])
def test_dense_chunks(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier tokens are gathered in one launch for each layer and chunk; padding is left out behind it."""
    model = build_model(family)
    ids, mask = left_padded([90, 71])
    given = dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    wanted = logits(model, DynamicCache(config=model.config), [ids], **given)
    interpret_kernels(monkeypatch)
    gathered = count(monkeypatch, "gather_tokens")
    cache = SpinCache(model, method, budget=1 << 20, prefill_chunk_size=25)
    ours = logits(model, cache, [ids], **given)
    real = mask.bool()
    assert difference(ours[real], wanted[real]) <= RELATIVE_TOLERANCE
    assert len(gathered) == 3 * len(cache.paged_layers)
    cache.check_integrity()


@pytest.mark.parametrize(("family", "method"), [("llama", "shadowkv"), ("gpt_oss", "quest")])
def test_sparse_chunks(family: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a share of 1. Sparse chunks read pages in place, from the first token of a turn's first whole block on."""
    model = build_model(family)
    parts = [random_tokens(1, 130), random_tokens(1, 1100, seed=1)]
    wanted = logits(model, DynamicCache(config=model.config), parts)
    interpret_kernels(monkeypatch)
    in_place, gathered = count(monkeypatch, "attend_resident_blocks"), count(monkeypatch, "gather_tokens")
    options: dict[str, Any] = dict(prefill="sparse", prefill_top_p=1.0, prefill_chunk_size=256, budget=1 << 20)
    cache = SpinCache(model, method, **options)
    ours = logits(model, cache, parts)
    assert difference(ours, wanted) <= RELATIVE_TOLERANCE
    layers = len(cache.paged_layers)
    assert len(in_place) == 2 * layers
    assert len(gathered) == 4 * layers  # for means of the first turn, its lead, and two chunks that are read densely
    cache.check_integrity()
