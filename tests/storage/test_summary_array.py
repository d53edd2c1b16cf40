"""Summaries as int8 with a scale each: their error, what stays exact, and their bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spin_hf.kernels.reference import quantize
from spin_hf.storage.summary_array import SummaryArray, bytes_per_page

CPU = torch.device("cpu")


def test_quantize_by_hand() -> None:
    vectors = torch.tensor([[1.0, -127.0, 63.5, 0.49], [0.0, 0.0, 0.0, 0.0], [2.54, 0.01, 0.03, -0.05]])
    values, scale = quantize(vectors)
    assert values.dtype == torch.int8
    assert values.tolist() == [[1, -127, 64, 0], [0, 0, 0, 0], [127, 0, 2, -2]]  # 63.5 goes to the even one
    torch.testing.assert_close(scale, torch.tensor([1.0, 1.0, 0.02]))


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_quantize_is_off_by_half_a_step_at_most(size: float) -> None:
    vectors = size * torch.randn(200, 33, generator=torch.Generator().manual_seed(1))
    values, scale = quantize(vectors)
    exact, steps = vectors.double().numpy(), scale.double().numpy()[:, None]
    np.testing.assert_allclose(steps[:, 0], abs(exact).max(1) / 127, rtol=1e-6)
    assert (abs(values.double().numpy() * steps - exact) <= 0.5001 * steps).all()
    assert (abs(values.numpy().astype(int)).max(1) == 127).all()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("shape", [(24,), ()])
def test_what_is_put_is_taken(shape: tuple[int, ...], quantized: bool) -> None:
    array = SummaryArray(shape, 4, torch.bfloat16, CPU, quantized)
    for part in array.arrays:
        part.grow(12)
    summaries = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(2))
    rows = torch.tensor([[0, 5, 11], [4, 2, 9]])
    for stored, content in zip(array.arrays, array.stored(summaries), strict=True):
        stored.put(rows, content)
    held = array.take(rows)
    assert torch.equal(held, array.rounded(summaries))
    assert array.quantized == (quantized and shape != ())
    if array.quantized:
        assert held.dtype == torch.float32
        assert bool(((held - summaries).abs() <= summaries.abs().amax(-1, keepdim=True) / 253).all())
    else:
        assert torch.equal(held, summaries.bfloat16())
    assert sum(part.row_bytes for part in array.arrays) == bytes_per_page(shape, torch.bfloat16, quantized)
