"""int8 to a floating dtype by integer operations, which the interpreter cannot run: every number, to the bit."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from spin_hf.kernels.common import triton_dtype  # noqa: E402
from spin_hf.kernels.decode.estimate_rest import whole_numbers  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@triton.jit
def convert_kernel(codes, made, dtype: tl.constexpr):
    place = tl.arange(0, 256)
    tl.store(made + place, whole_numbers(tl.load(codes + place), dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_number(dtype: torch.dtype) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8, device="cuda")
    made = torch.empty(256, dtype=dtype, device="cuda")
    convert_kernel[(1,)](codes, made, triton_dtype(dtype))
    assert torch.equal(made, codes.to(dtype))
