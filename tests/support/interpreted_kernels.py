"""Triton kernels, interpreted, for caches on the CPU, and forwards that use them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import spin_hf.kernels
from spin_hf import SpinCache
from spin_hf.backends import descriptors, triton_step
from spin_hf.kernels import launch
from tests.support.cluster_by_formulas import cluster_by_formulas
from tests.support.tuning import tune
from tests.support.zoo import PAD_TOKEN_ID


def prompt_inputs(padding: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 100, (2, 61), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        ids[0, :11], mask[0, :11] = PAD_TOKEN_ID, 0
    elif padding == "holes":  # few tokens on many pages
        mask[0, :-1] = 0
        mask[0, ::7] = 1
    return {"input_ids": ids, "attention_mask": mask}


def interpret_kernels(monkeypatch: pytest.MonkeyPatch, **constants: int) -> list[torch.device]:
    """Let kernels serve the CPU from here on, with few programs. Returns the devices that they are asked to serve.

    Args:
        constants: sizes of tiles and bins, by their names in the kernels' modules.
    """
    from spin_hf.kernels.decode import bin_scores, estimate_rest, rank_pages, rerank_pages, score_pages, select_pages
    from spin_hf.kernels.triton_launchers import launchers

    launches = (score_pages, bin_scores, rank_pages, rerank_pages, select_pages, estimate_rest)
    cluster_by_formulas(monkeypatch)
    asked: list[torch.device] = []
    monkeypatch.setattr(spin_hf.kernels, "launchers", lambda device: asked.append(device) or launchers)
    tune(monkeypatch, programs=8)
    for name, number in constants.items():
        modules = [module for module in (triton_step, descriptors, launch, *launches) if hasattr(module, name)]
        assert modules
        for module in modules:
            monkeypatch.setattr(module, name, number)
    return asked


def teach_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bfloat16 as bits; it multiplies these as integers in `tl.dot`, and cuts off instead of rounding."""
    import triton.language as tl
    from triton.runtime import interpreter

    dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def dot_of_floats(self: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *others)

    def rounded(data: np.ndarray, old: Any, new: Any, mode: Any) -> np.ndarray:
        if new != tl.bfloat16 or old != tl.float32:
            return convert(data, old, new, mode)
        return torch.from_numpy(np.array(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_floats)
    monkeypatch.setattr(interpreter, "_convert_float", rounded)


@torch.no_grad()
def forward_steps(model: Any, cache: SpinCache, padding: str, sizes: list[int]) -> torch.Tensor:
    """Logits of calls of these many tokens behind the prompt."""
    inputs = prompt_inputs(padding)
    model(**inputs, past_key_values=cache)
    mask, logits = inputs["attention_mask"], []
    tokens = torch.randint(3, 100, (2, sum(sizes)), generator=torch.Generator().manual_seed(2))
    for part in tokens.split(sizes, 1):
        mask = torch.cat([mask, torch.ones_like(part)], 1)
        logits.append(model(input_ids=part, attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(logits, 1)
