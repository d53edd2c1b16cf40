"""Kernels that cluster tokens, encode keys and move pages, against the formulas, at the sizes of a prompt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spin_hf import kernels
from spin_hf.attention.methods import fitted_codes, four_bit_keys
from spin_hf.attention.methods.fitted_codes import Basis
from spin_hf.kernels import move_tokens, page_means, quantize, reference, reference_clustering, split_pages
from tests.support.coded_pages import assert_same_codes, drawn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def spread_left(points: Tensor, order: Tensor) -> float:
    """Fraction of the points' spread that is left within pages of 8."""
    points = points.double()
    pages = points.gather(1, order.unsqueeze(-1).expand_as(points)).unflatten(1, (-1, 8))
    within = (pages - pages.mean(2, keepdim=True)).square().sum()
    return float(within / (points - points.mean(1, keepdim=True)).square().sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "count", "dim"), [(3, 8192, 128), (8, 1024, 64), (2, 5000, 80), (5, 72, 128), (2, 2056, 16)]
)
def test_bisect_leaves_no_more_spread_than_the_formulas(rows: int, count: int, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(count)
    points = torch.randn((rows, count, dim), generator=generator) * torch.logspace(0.5, -0.5, dim)
    points = (points + 3 * torch.randn((rows, 1, dim), generator=generator)).to("cuda", dtype)
    order = kernels.bisect(points, 8)
    assert torch.equal(order.sort(1).values, torch.arange(count, device="cuda").expand(rows, -1))
    exact = reference_clustering.bisect(points.float(), 8)
    identity = torch.arange(count, device="cuda").expand(rows, -1)
    assert spread_left(points, exact) < 0.9 * spread_left(points, identity)
    assert spread_left(points, order) < 1.01 * spread_left(points, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_codes_of_keys(dim: int, dtype: torch.dtype) -> None:
    content = torch.randn((2, 3, 700, 8 * (dim + 16)), device="cuda").to(dtype)
    keys = split_pages(content, 8, dim)[0]
    valid = torch.rand((2, 1, 700, 8), device="cuda") < 0.9
    mean = page_means(keys, valid)
    torch.testing.assert_close(mean, reference.page_means(keys, valid), rtol=1e-5, atol=1e-6)
    codes, scale = four_bit_keys.encode_pages(keys, mean, valid)
    expected_codes, expected_scale = four_bit_keys.encode_by_formulas(keys, mean, valid)
    real = valid.expand_as(scale)
    assert torch.equal(scale < 0, ~real)
    close = real & torch.isclose(scale, expected_scale, rtol=1e-3)
    assert close.sum() > 0.99 * real.sum()
    levels = [four_bit_keys.decode(packed[close], dim) for packed in (codes, expected_codes)]
    assert (levels[0] == levels[1]).float().mean() > 0.995
    assert (levels[0] - levels[1]).abs().max() <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(128, 128), (64, 96), (16, 80), (256, 64)])
def test_codes_of_units(dims: tuple[int, int], dtype: torch.dtype) -> None:
    keys, values, valid, *bases = drawn(2, 3, 701, dims, dtype, padded=True)
    keys, values, valid = (part.cuda() for part in (keys, values, valid))
    on_gpu = [Basis(*(part.cuda() for part in vars(basis).values())) for basis in bases]
    found = fitted_codes.encode_pages(keys, values, valid, *on_gpu)
    expected = fitted_codes.encode_by_formulas(keys, values, valid, *on_gpu)
    assert_same_codes(*({name: part.cpu() for name, part in made.items()} for made in (found, expected)), dims)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_move_and_vectors_are_quantized_to_the_bit(dtype: torch.dtype) -> None:
    content = torch.randn((2, 3, 500, 8 * (80 + 64)), device="cuda").to(dtype)
    order = torch.rand((2, 3, 4000), device="cuda").argsort(2)
    parts = ((0, 80), (640, 64))
    assert torch.equal(move_tokens(content, order, 8, parts), reference.move_tokens(content, order, 8, parts))
    for found, expected in zip(quantize(content.float()), reference.quantize(content.float()), strict=True):
        assert torch.equal(found, expected)
