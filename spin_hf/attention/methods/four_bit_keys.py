"""Vectors in four bits per number: rotated by random signs and a Hadamard matrix, which spreads outliers, then rounded.

    vector [D]  --signs, Hadamard-->  [D]  --/ scale-->  16 levels -7.5, -6.5, ... 7.5  -->  two per byte, [ceil(D / 2)] uint8

Dot products do not need the inverse rotation: q . vector = (rotated q) . (rotated vector). The scale is the one of six
multiples of the vector's root mean square that gives the smallest squared error. The block size of the Hadamard matrix is the
largest power of two that divides D.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ... import kernels
from ...kernels import device_limits

_MULTIPLES = (0.25, 0.3, 0.335, 0.4, 0.5, 0.65)
_MIDDLE = 7.5


def rotate(vectors: Tensor) -> Tensor:
    """Vectors [..., D], float32, in an orthonormal basis that depends on D alone."""
    dim = vectors.shape[-1]
    block = dim & -dim
    signs, matrix = _rotation(dim, block, vectors.device)
    return ((vectors * signs).unflatten(-1, (-1, block)) @ matrix).flatten(-2)


@lru_cache(maxsize=64)
def basis(dim: int, device: torch.device) -> Tensor:
    """[dim, dim], float32, integers: `rotate(v)` is `v @ basis` divided by the norm of a column."""
    block = dim & -dim
    signs, matrix = _rotation(dim, block, device)
    return torch.block_diag(*[(matrix * math.sqrt(block)).round()] * (dim // block)) * signs.unsqueeze(1)


def encode_pages(keys: Tensor, mean: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Encode keys minus the mean of their page.

    Args:
        keys: [B, H, n, P, D]; mean: [B, H, n, D], float32; valid: [B, 1 or H, n, P], bool.
    Returns:
        codes: [B, H, n, P, ceil(D / 2)], uint8; scale: [B, H, n, P], float32, -1 where a token is not valid.
    """
    launch, dim = kernels.launchers(keys.device), keys.shape[-1]
    if launch is not None and device_limits.multiplies(keys.device):
        root = math.sqrt(dim & -dim)
        made = launch.encode_pages(keys, mean, valid, basis(dim, keys.device), root, _MULTIPLES)
        if made is not None:
            return made
    return encode_by_formulas(keys, mean, valid)


def encode_by_formulas(keys: Tensor, mean: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """`encode_pages` in PyTorch: the specification. Also used on GPUs before Ampere, and for keys too long for the kernel."""
    codes, scale = encode(rotate(keys.float().masked_fill(~valid.unsqueeze(-1), 0.0) - mean.unsqueeze(-2)))
    return codes, scale.masked_fill(~valid, -1.0)


def encode(rotated: Tensor) -> tuple[Tensor, Tensor]:
    """Encode rotated vectors [..., D].

    Returns:
        codes: [..., ceil(D / 2)], uint8; scale: [...], float32, > 0. A number is about (code - 7.5) * scale.
    """
    size = rotated.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-20)
    best = scale = lowest = torch.empty(0)
    for index, multiple in enumerate(_MULTIPLES):
        step = size * multiple
        codes = (rotated * (1 / step) + _MIDDLE).round().clamp(0, 15)
        error = ((codes - _MIDDLE) * step - rotated).square().sum(-1, keepdim=True)
        if not index:
            best, scale, lowest = codes, step, error
            continue
        better = error < lowest
        best, scale, lowest = best.where(~better, codes), scale.where(~better, step), lowest.minimum(error)
    if best.shape[-1] % 2:
        best = torch.nn.functional.pad(best, (0, 1))
    pairs = best.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4), scale.squeeze(-1)


def decode(codes: Tensor, dim: int) -> Tensor:
    """Levels [..., D], float32, of codes [..., ceil(D / 2)]. Levels times scale approximate the rotated vectors."""
    pairs = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return pairs[..., :dim].float() - _MIDDLE


@lru_cache(maxsize=64)
def _rotation(dim: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Signs [D] and an orthonormal Hadamard matrix [block, block]."""
    matrix = torch.ones((1, 1))
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (dim,), generator=torch.Generator().manual_seed(dim)) * 2.0 - 1
    return signs.to(device), (matrix / math.sqrt(block)).to(device)
