"""Pages for codes of a fitted basis, and what makes two encodings of them the same."""

from __future__ import annotations

import torch
from torch import Tensor

from spin_hf.attention.methods import fitted_codes
from spin_hf.attention.methods.fitted_codes import Basis
from spin_hf.kernels import reference


def rounded_to(basis: Basis, dtype: torch.dtype) -> Basis:
    """The basis with matrices that `dtype` holds."""
    return Basis(basis.origin, basis.forward.to(dtype).float(), basis.inverse.to(dtype).float(), basis.widths)


def drawn(
    size: int, heads: int, pages: int, dims: tuple[int, int], dtype: torch.dtype, padded: bool
) -> tuple[Tensor, Tensor, Tensor, Basis, Basis]:
    """Keys and values of pages, as views in whole pages, which tokens are valid, and bases fitted to them."""
    generator = torch.Generator().manual_seed(sum(dims))
    whole = torch.randn((size, heads, pages, 4 * sum(dims)), generator=generator)
    keys, values = reference.split_pages(whole, 4, dims[0])
    keys *= torch.logspace(0, -2, dims[0])
    keys += 3 * torch.randn((size, heads, 1, 1, dims[0]), generator=generator)
    values += torch.randn((size, heads, 1, 1, dims[1]), generator=generator)
    whole = whole.to(dtype)
    keys, values = reference.split_pages(whole, 4, dims[0])
    queries = torch.randn((size, heads, 40, dims[0]), generator=generator)
    valid = torch.rand((size, 1, pages, 4), generator=generator) < (0.8 if padded else 1.1)
    if padded:
        valid[:, :, 2] = False
        whole[:, :, 2] = float("nan")
    units = pages // 4 * 4
    bases = (
        fitted_codes.fit_keys(keys[:, :, :units].nan_to_num().flatten(2, 3), queries),
        fitted_codes.fit_values(reference.page_means(values, valid)),
    )
    return keys, values, valid, *(rounded_to(basis, torch.bfloat16) for basis in bases)


def assert_same_codes(found: dict[str, Tensor], expected: dict[str, Tensor], dims: tuple[int, int]) -> None:
    """Equal but for numbers in the middle between two levels or guesses, which rounding of sums decides."""
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in expected.items()}
    step = expected["mean"].abs().amax(-1, keepdim=True) / 127
    assert bool(((found["mean"] - expected["mean"]).abs() <= 1.01 * step).all())
    assert float((found["mean"] - expected["mean"]).abs().gt(0.01 * step).float().mean()) < 0.01
    for codes, scale, dim in (("codes", "scale", dims[0]), ("value", "value_scale", dims[1])):
        ours, theirs = found[scale].float(), expected[scale].float()
        assert torch.equal(ours < 0, theirs < 0)
        assert found[codes].dtype == torch.uint8
        alike = torch.isclose(ours, theirs, rtol=0.02)
        assert float(alike.float().mean()) > 0.95
        levels = [fitted_codes.decode(part[codes], dim)[alike] for part in (found, expected)]
        assert float((levels[0] != levels[1]).float().mean()) < 0.01
        assert float(((levels[0] - levels[1]).abs() > 1).float().mean()) < 1e-3
