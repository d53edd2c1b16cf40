"""Partial results of attention merged by the kernel, interpreted on the CPU, against PyTorch."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from spin_hf.kernels import reference

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]
SHAPES = [(2, 2, 3, 5, 16), (1, 1, 4, 70, 20), (2, 3, 1, 33, 5)]


def partial_results(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Results in the layouts that fused kernels and padding give them; some queries have no tokens in some of them."""
    generator = torch.Generator().manual_seed(count)
    batch_size, num_heads, group, num_queries, dim = shape
    found = []
    for index in range(count):
        out = torch.randn((batch_size, num_queries, num_heads, group, dim), generator=generator).to(dtype)
        out = out.permute(0, 2, 3, 1, 4)
        lse = 30 * torch.randn(shape[:4], generator=generator)
        lse[:, :, :, index % num_queries], lse[:, :, :, -1] = float("-inf"), float("-inf")
        out = out.masked_fill(lse.isneginf().unsqueeze(-1), 0.0)
        found.append((out.contiguous() if index % 2 else out, lse))
    return found


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge_into(shape: tuple[int, ...], dtype: torch.dtype, count: int, sinks: bool) -> None:
    from spin_hf.kernels.prompt.merge_partials import merge_into

    partials = partial_results(shape, count, dtype)
    logits = 20 * torch.randn(shape[1] * shape[2], dtype=dtype) if sinks else None
    whole = torch.full((shape[0], shape[3], shape[1] * shape[2] + 1, shape[4]), 7.0, dtype=dtype)
    out, wanted = whole[:, :, :-1], torch.empty_like(whole[:, :, :-1])
    merge_into(partials, logits, out)
    reference.merge_into(partials, logits, wanted)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)
    assert bool((whole[:, :, -1] == 7).all())


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge_attention(shape: tuple[int, ...], count: int) -> None:
    from spin_hf.kernels.prompt.merge_partials import merge_attention

    partials = partial_results(shape, count, torch.float32)
    for ours, theirs in zip(merge_attention(partials), reference.merge_attention(partials), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
