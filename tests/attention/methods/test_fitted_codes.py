"""Codes of two bits per number in a fitted basis: exact algebra, packing, and errors of dot products with huge channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spin_hf.attention.methods import fitted_codes, four_bit_keys

HEADS, UNITS, QUERIES = 2, 64, 48


def _states(dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys [H, n, D] with four huge channels and queries [H, m, D] that hardly use them, as in Qwen2.5."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0, -1.5, dim)
    spread[:4] = 30.0
    middle = torch.randn(HEADS, UNITS, 1, dim, generator=draw) * 2
    keys = (middle + torch.randn(HEADS, UNITS, fitted_codes.UNIT_TOKENS, dim, generator=draw)) * spread
    queries = torch.randn(HEADS, QUERIES, dim, generator=draw) / dim**0.5
    queries[..., :4] /= 30.0
    return keys.flatten(1, 2), queries


def _encoded(dim: int) -> tuple[Tensor, Tensor, fitted_codes.Basis, tuple[Tensor, Tensor, Tensor, Tensor]]:
    keys, queries = _states(dim)
    basis = fitted_codes.fit_keys(keys, queries)
    return keys, queries, basis, fitted_codes.encode_keys(keys.unflatten(1, (UNITS, -1)), basis)


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_a_basis_preserves_dot_products(dim: int) -> None:
    keys, queries = _states(dim)
    basis = fitted_codes.fit_keys(keys, queries)
    exact = queries @ keys.mT
    shifted = (queries @ basis.inverse) @ basis.coordinates(keys).mT + queries @ basis.origin.unsqueeze(-1)
    torch.testing.assert_close(shifted, exact, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(basis.vectors(basis.coordinates(keys)), keys, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_packed_levels_come_back(dim: int) -> None:
    draw = torch.Generator().manual_seed(1)
    fine = torch.randint(0, 16, (3, 5, dim // 4), generator=draw) - 7.5
    rough = torch.randint(0, 4, (3, 5, dim // 2), generator=draw) - 1.5
    levels = torch.nn.functional.pad(torch.cat([fine, rough], -1), (0, dim // 4))
    widths = fitted_codes.fit_values(torch.randn(64, dim, generator=draw)).widths
    codes, scale = fitted_codes.encode(levels * widths * 2.0, widths)
    assert codes.dtype == torch.uint8
    assert codes.shape == (3, 5, dim // 4)
    assert torch.equal(scale, scale.bfloat16().float())
    error = fitted_codes.decode(codes, dim) * widths * scale.unsqueeze(-1) - levels * widths * 2.0
    assert error.square().mean() < 0.15 * (levels * widths * 2.0).square().mean()


def test_logits_are_those_of_the_decoded_keys() -> None:
    _, queries, basis, (mean, unit, codes, scale) = _encoded(64)
    inside = fitted_codes.decode(codes, 64) * basis.widths[:, None, None] * scale.unsqueeze(-1)
    decoded = basis.vectors((inside + (mean * unit.unsqueeze(-1)).unsqueeze(2)).flatten(1, 2))
    logits = fitted_codes.key_logits(queries, basis, mean * unit.unsqueeze(-1), codes, scale)
    assert logits.shape == (HEADS, QUERIES, UNITS, fitted_codes.UNIT_TOKENS)
    torch.testing.assert_close(logits.flatten(-2), queries @ decoded.mT, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dim", [64, 128])
def test_logits_are_nearer_than_those_of_four_bit_codes_without_a_fit(dim: int) -> None:
    keys, queries, basis, (middle, unit, *encoded) = _encoded(dim)
    exact = queries @ keys.mT
    fitted = fitted_codes.key_logits(queries, basis, middle * unit.unsqueeze(-1), *encoded).flatten(-2) - exact
    units = keys.unflatten(1, (UNITS, -1))
    mean = units.mean(2, keepdim=True)
    codes, scale = four_bit_keys.encode(four_bit_keys.rotate(units - mean))
    turned = four_bit_keys.decode(codes, dim) * scale.unsqueeze(-1)
    rotated = four_bit_keys.rotate(queries) @ (turned + four_bit_keys.rotate(mean)).flatten(1, 2).mT - exact
    assert fitted.square().mean() < 0.5 * rotated.square().mean()


def test_values_are_summed_in_the_basis() -> None:
    draw = torch.Generator().manual_seed(2)
    means = torch.randn(HEADS, 200, 64, generator=draw) * torch.logspace(0, -1, 64) + 3.0
    basis = fitted_codes.fit_values(means)
    codes, scale = fitted_codes.encode_values(means, basis)
    weights = torch.rand(HEADS, 3, 200, generator=draw)
    decoded = basis.vectors(fitted_codes.decode(codes, 64) * basis.widths.unsqueeze(1) * scale.unsqueeze(-1))
    summed = fitted_codes.weighted_values(weights, basis, codes, scale)
    torch.testing.assert_close(summed, weights @ decoded, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(fitted_codes.decode_values(basis, codes, scale), decoded)
    error = (decoded - means).square().mean() / (means - means.mean(1, keepdim=True)).square().mean()
    assert error < 0.12


def test_keys_that_are_all_alike_and_queries_of_zero_give_finite_codes() -> None:
    keys = torch.full((1, 32, 64), 5.0)
    basis = fitted_codes.fit_keys(keys, torch.zeros(1, 4, 64))
    mean, unit, *encoded = fitted_codes.encode_keys(keys.unflatten(1, (2, -1)), basis)
    logits = fitted_codes.key_logits(torch.ones(1, 1, 64), basis, mean * unit.unsqueeze(-1), *encoded)
    torch.testing.assert_close(logits, torch.full_like(logits, 320.0), rtol=1e-2, atol=1.0)


@pytest.mark.parametrize("dim", [6, 8, 24, 33, 64])
@pytest.mark.parametrize("observed", [True, False])
def test_any_head_size_is_coded(dim: int, observed: bool) -> None:
    keys, queries = _states(dim)
    basis = fitted_codes.fit_keys(keys, queries if observed else None)
    assert torch.allclose(basis.forward @ basis.inverse.mT, torch.eye(dim), atol=1e-3)
    mean, unit, *encoded = fitted_codes.encode_keys(keys.unflatten(1, (UNITS, -1)), basis)
    logits = fitted_codes.key_logits(queries, basis, mean * unit.unsqueeze(-1), *encoded).flatten(-2)
    exact = queries @ keys.mT
    most = 0.1 if observed else 0.2  # without queries the huge channels take the bits
    assert (logits - exact).square().mean() < most * (exact - exact.mean(-1, keepdim=True)).square().mean()


def test_places_that_are_not_valid_do_not_count() -> None:
    keys, queries = _states(64)
    basis = fitted_codes.fit_keys(keys, queries)
    units = keys.unflatten(1, (UNITS, -1))
    valid = torch.arange(fitted_codes.UNIT_TOKENS) < 5
    mean, unit, codes, scale = fitted_codes.encode_keys(units, basis, valid)
    again = fitted_codes.encode_keys(units.masked_fill(~valid.unsqueeze(-1), float("nan")), basis, valid)
    assert torch.equal(mean, again[0])
    assert torch.equal(scale, again[3])
    assert torch.equal(codes[:, :, :5], again[2][:, :, :5])
    assert bool((scale[..., 5:] == -1).all())
    logits = fitted_codes.key_logits(queries, basis, mean * unit.unsqueeze(-1), codes, scale)
    assert torch.equal(logits.isinf(), (~valid).expand_as(logits))


def test_the_fixed_basis_is_orthonormal() -> None:
    for dim in (8, 64):
        basis = fitted_codes.fixed_basis(dim, torch.device("cpu"))
        torch.testing.assert_close(basis.forward @ basis.inverse.mT, torch.eye(dim))


def test_codes_do_not_depend_on_the_other_units() -> None:
    keys, queries = _states(64)
    basis = fitted_codes.fit_keys(keys, queries)
    units = keys.unflatten(1, (UNITS, -1))
    whole = fitted_codes.encode_keys(units, basis)
    for first, stop in ((0, 1), (3, 8), (63, 64)):
        part = fitted_codes.encode_keys(units[:, first:stop], basis)
        assert all(torch.equal(mine, all_of[:, first:stop]) for mine, all_of in zip(part, whole, strict=True))


def test_summaries_take_a_tenth_of_keys_and_values() -> None:
    for dim, most in ((64, 0.105), (128, 0.1)):
        assert fitted_codes.bytes_per_token(dim, dim) / (2 * dim * 2) < most
