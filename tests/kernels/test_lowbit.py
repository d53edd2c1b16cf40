"""Keys in four bits by the kernel, interpreted on the CPU, against PyTorch."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from spin_hf.attention import lowbit

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 7), (40, 128), (1, 1), (0, 8)])
def test_codes_and_scales(shape: tuple[int, ...]) -> None:
    from spin_hf.kernels.lowbit import encode_rows

    generator = torch.Generator().manual_seed(len(shape))
    vectors = (
        torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[0])[(...,) + (None,) * (len(shape) - 1)]
    )
    if shape[0] > 2:
        vectors[1] = 0
    codes, scale = encode_rows(vectors, lowbit._MULTIPLES)
    expected_codes, expected_scale = lowbit.encode(vectors)
    assert codes.dtype == torch.uint8
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    assert torch.equal(codes, expected_codes)
