"""Partial results of attention merged by the kernel on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from spin_hf.kernels import merge_attention, merge_into

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_as_float64(dtype: torch.dtype, count: int, sinks: bool) -> None:
    torch.manual_seed(count)
    shape = (2, 2, 4, 1000, 128)
    outs = [torch.randn((2, 1000, 2, 4, 128), device="cuda").to(dtype).permute(0, 2, 3, 1, 4) for _ in range(count)]
    partials = [(out, 30 * torch.randn(shape[:4], device="cuda")) for out in outs]
    logits = 20 * torch.randn(8, device="cuda", dtype=dtype) if sinks else None
    lses = torch.stack([lse.double() for _, lse in partials])
    extra = [] if logits is None else [logits.double().view(2, 4, 1).expand(shape[:4])[None]]
    total = torch.logsumexp(torch.cat([lses, *extra]), 0)
    wanted = sum(out.double() * (lse - total).exp().unsqueeze(-1) for (out, _), lse in zip(partials, lses, strict=True))
    found = torch.empty((2, 1000, 8, 128), device="cuda", dtype=dtype)
    merge_into(partials, logits, found)
    scale = float(wanted.abs().max())
    rounding = torch.finfo(dtype).eps
    got = found.unflatten(2, (2, 4)).permute(0, 2, 3, 1, 4).double()
    assert float((got - wanted).abs().max()) <= 2 * max(rounding, 1e-6) * scale
    if not sinks:
        merged, lse = merge_attention(partials)
        assert merged.dtype == (torch.float32 if count > 1 else dtype)
        assert float((lse.double() - total).abs().max()) <= 1e-4
