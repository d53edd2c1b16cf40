"""Vectors in fewer bits by the kernels, interpreted on the CPU, against PyTorch."""

from __future__ import annotations

import math
import os
import sys

import pytest
import torch

from spin_hf.attention.methods import four_bit_keys
from spin_hf.kernels import device_limits, reference

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]


@pytest.mark.parametrize("dim", [1, 6, 16, 64, 80, 128])
@pytest.mark.parametrize(("batch_size", "heads", "pages", "page_size"), [(1, 2, 9, 8), (2, 3, 5, 4), (1, 1, 0, 8)])
def test_encode_pages(
    batch_size: int, heads: int, pages: int, page_size: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spin_hf.kernels.indexing.quantize import encode_pages

    monkeypatch.setattr(device_limits, "shared_memory", lambda device: 1 << 20)
    generator = torch.Generator().manual_seed(dim)
    whole = torch.randn((batch_size, heads, pages, page_size * (dim + 3)), generator=generator)
    keys = reference.split_pages(whole, page_size, dim)[0]  # a view, as in a page
    keys *= torch.logspace(-3, 3, max(1, pages))[:pages, None, None]
    valid = torch.rand((batch_size, 1, pages, page_size), generator=generator) < 0.8
    if pages > 1:
        keys[:, :, 1] = 0
        valid[:, :, 2] = False
    mean = reference.page_means(keys, valid)
    keys.masked_fill_(~valid.unsqueeze(-1), float("nan"))
    root = math.sqrt(dim & -dim)
    made = encode_pages(keys, mean, valid, four_bit_keys.basis(dim, keys.device), root, four_bit_keys._MULTIPLES)
    assert made is not None
    codes, scale = made
    expected_codes, expected_scale = four_bit_keys.encode_by_formulas(keys, mean, valid)
    assert codes.dtype == torch.uint8
    assert codes.shape == expected_codes.shape
    assert torch.equal(scale < 0, ~valid.expand_as(scale))
    if not scale.numel():
        return
    real = valid.expand_as(scale)
    close = torch.isclose(scale, expected_scale, rtol=1e-4)
    assert close[real].float().mean() > 0.98  # a tie between two multiples may fall either way
    levels = [four_bit_keys.decode(packed[real & close], dim) for packed in (codes, expected_codes)]
    assert (levels[0] - levels[1]).abs().max() <= 1
    assert (levels[0] == levels[1]).float().mean() > 0.99


def test_keys_too_long_for_the_gpu_are_encoded_by_the_formulas() -> None:
    from spin_hf.kernels.indexing.quantize import encode_pages, tiling

    keys, valid = torch.randn((1, 2, 5, 8, 256)), torch.ones((1, 1, 5, 8), dtype=torch.bool)
    mean = reference.page_means(keys, valid)
    assert (
        encode_pages(keys, mean, valid, four_bit_keys.basis(256, keys.device), 16.0, four_bit_keys._MULTIPLES) is None
    )
    for found, expected in zip(
        four_bit_keys.encode_pages(keys, mean, valid), four_bit_keys.encode_by_formulas(keys, mean, valid), strict=True
    ):
        assert torch.equal(found, expected)
    hopper, ada = (227 << 10) - 4096, (99 << 10) - 4096
    assert tiling(128, 2, hopper) == (128, 3)
    assert [tiling(dim, 2, hopper) for dim in (64, 80, 256)] == [(128, 3), (128, 3), (64, 1)]
    assert [tiling(dim, 2, ada) for dim in (64, 128, 256)] == [(128, 1), (64, 1), None]
    assert [tiling(dim, 4, ada) for dim in (64, 128, 256)] == [(128, 1), (32, 1), None]


@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 7), (130, 128), (1, 1), (0, 8)])
def test_quantize(shape: tuple[int, ...]) -> None:
    from spin_hf.kernels.indexing.quantize import quantize

    vectors = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    if shape[0] > 1:
        vectors[0] = 0
        vectors[1] = (torch.arange(vectors[1].numel()).view(vectors[1].shape) % 127) + 0.5  # halves
    for found, expected in zip(quantize(vectors), reference.quantize(vectors), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
