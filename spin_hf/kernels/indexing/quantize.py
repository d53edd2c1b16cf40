"""Quantization in one pass over the vectors.

quantize        int8                                               specified by `reference.quantize`
encode_pages    4-bit codes of keys minus page mean, rotated       specified by `attention/methods/four_bit_keys.py`
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device_limits
from ..common import rounded, to_int8
from ..compile_ahead import launch_now
from ..device_guard import on_device_of

_TILE, _TILES = 128, 4


def quantize(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.quantize`."""
    rows = vectors.reshape(-1, vectors.shape[-1]).contiguous()
    count, dim = rows.shape
    values = torch.empty((count, dim), dtype=torch.int8, device=rows.device)
    scale = torch.empty((count,), dtype=torch.float32, device=rows.device)
    if count:
        with on_device_of(rows):
            launch_now(
                quantize_kernel, (triton.cdiv(count, _TILE),), rows, values, scale, count, D=dim,
                BLOCK_D=triton.next_power_of_2(dim), TILE=_TILE,
            )  # fmt: skip
    return values.view(vectors.shape), scale.view(vectors.shape[:-1])


def encode_pages(
    keys: Tensor, mean: Tensor, valid: Tensor, basis: Tensor, length: float, multiples: tuple[float, ...]
) -> tuple[Tensor, Tensor] | None:
    """As `four_bit_keys.encode_pages`; None if the GPU has too little shared memory for keys of this size.

    Args:
        basis: float32 [D, D], integers.
        length: of the columns of `basis`.
        multiples: step sizes to try, in units of the root mean square.
    """
    batch_size, num_heads, count, page_size, dim = keys.shape
    found = tiling(dim, keys.element_size(), device_limits.shared_memory(keys.device))
    if found is None:
        return None
    tile, stages = found
    half = -(-dim // 2)
    codes = torch.empty((*keys.shape[:4], half), dtype=torch.uint8, device=keys.device)
    scale = torch.empty(keys.shape[:4], dtype=torch.float32, device=keys.device)
    if not scale.numel():
        return codes, scale
    if keys.stride(3) != dim or keys.stride(4) != 1:
        keys = keys.contiguous()
    valid = valid.expand(batch_size, 1, count, page_size).contiguous()
    steps = torch.tensor(multiples, dtype=torch.float32).to(keys.device, non_blocking=True)
    with on_device_of(keys):
        launch_now(
            encode_pages_kernel, (triton.cdiv(count * page_size, tile * _TILES), batch_size * num_heads), keys,
            mean.contiguous(), valid.view(torch.uint8), basis.to(keys.dtype), steps, codes, scale, count, length,
            *keys.stride()[:3],
            H=num_heads, D=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), HALF=max(16, triton.next_power_of_2(half)),
            PAGE=page_size, STEPS=len(multiples), TILE=tile, TILES=_TILES, num_warps=8, num_stages=stages,
        )  # fmt: skip
    return codes, scale


def tiling(dim: int, itemsize: int, room: int) -> tuple[int, int] | None:
    """Tokens per tile and pipeline stages, for `room` bytes of shared memory; None if no tile fits.

    Shared memory holds the basis and a tile of keys. Keys of 16 bits take two copies: the rounded numbers and the remainders.
    """
    dim = max(16, triton.next_power_of_2(dim))
    copies = 2 if itemsize == 2 else 1
    if dim <= 128 and copies == 2 and room >= 3 * copies * _TILE * dim * itemsize:
        return _TILE, 3
    fitting = (tile for tile in (128, 64, 32, 16) if (copies * tile + dim) * dim * itemsize <= room)
    return next(((tile, 1) for tile in fitting), None)


@triton.jit(do_not_specialize=["count"])
def quantize_kernel(rows, values, scale, count, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr):
    """Program i quantizes TILE of the `rows`, float32 [count, D], to `values`, int8, and `scale`, float32 [count]."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, BLOCK_D)
    inside = (row < count)[:, None] & (column < D)[None, :]
    x = tl.load(rows + row[:, None] * D + column[None, :], mask=inside, other=0.0)
    codes, unit = to_int8(x)
    tl.store(values + row[:, None] * D + column[None, :], codes, mask=inside)
    tl.store(scale + row, unit, mask=row < count)


@triton.jit(do_not_specialize=["count", "stride_b", "stride_h", "stride_n"])
def encode_pages_kernel(
    keys, mean, valid, basis, steps, codes, scale, count, length, stride_b, stride_h, stride_n,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
    STEPS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program (i, b * H + h) encodes TILES tiles of TILE tokens.

    Args:
        keys: [B, H, count, PAGE, D], with these strides; mean: float32 [B, H, count, D]; valid: uint8 [B, 1, count, PAGE].
        basis: [D, D], in the dtype of the keys; `length`: of its columns.
        steps: float32 [STEPS]: step sizes to try, in units of the root mean square. The one of the least error is used.
        codes: uint8 [B, H, count, PAGE, ceil(D / 2)]; scale: float32 [B, H, count, PAGE], -1 for padding. Written.
    """
    bh = tl.program_id(1).to(tl.int64)
    b = bh // H
    column = tl.arange(0, BLOCK_D)
    pair = tl.arange(0, HALF)
    inside = (column < D)[:, None]
    from_low = tl.load(
        basis + column[:, None] * D + 2 * pair[None, :], mask=inside & (2 * pair < D)[None, :], other=0.0
    )
    from_high = tl.load(
        basis + column[:, None] * D + 2 * pair[None, :] + 1, mask=inside & (2 * pair + 1 < D)[None, :], other=0.0
    )
    for tile in range(TILES):
        token = (tl.program_id(0) * TILES + tile) * TILE + tl.arange(0, TILE)
        page = (token // PAGE).to(tl.int64)
        there = token < count * PAGE
        real = tl.load(valid + b * count * PAGE + token, mask=there, other=0) != 0
        first = keys + b * stride_b + (bh % H) * stride_h + page * stride_n + token % PAGE * D
        x = tl.load(first[:, None] + column[None, :], mask=real[:, None] & (column < D)[None, :], other=0.0).to(
            tl.float32
        )
        middle = mean + (bh * count + page) * D
        x -= tl.load(middle[:, None] + column[None, :], mask=there[:, None] & (column < D)[None, :], other=0.0)
        large = x.to(basis.dtype.element_ty)  # plus the remainder below: each product with an integer is exact
        low = tl.dot(large, from_low, input_precision="ieee")
        high = tl.dot(large, from_high, input_precision="ieee")
        if basis.dtype.element_ty != tl.float32:
            small = (x - large.to(tl.float32)).to(basis.dtype.element_ty)
            low = tl.dot(small, from_low, low)
            high = tl.dot(small, from_high, high)
        low = low / length
        high = high / length
        low_in = there[:, None] & (2 * pair < D)[None, :]
        high_in = there[:, None] & (2 * pair + 1 < D)[None, :]
        size = tl.maximum(tl.sqrt_rn(tl.sum(low * low + high * high, 1) * (1.0 / D)), 1e-20)
        lowest = tl.full([TILE], float("inf"), tl.float32)
        best = size
        for index in tl.static_range(STEPS):
            step = size * tl.load(steps + index)
            error = tl.sum(_error(low, step, low_in) + _error(high, step, high_in), 1)
            best = tl.where(error < lowest, step, best)
            lowest = tl.minimum(error, lowest)
        packed = _level(low, best).to(tl.uint8)
        upper = tl.where(high_in, _level(high, best), 0.0).to(tl.uint8)
        to = bh * count * PAGE + token
        tl.store(codes + to[:, None] * ((D + 1) // 2) + pair[None, :], packed | (upper << 4), mask=low_in)
        tl.store(scale + to, tl.where(real, best, -1.0), mask=there)


@triton.jit
def _level(numbers, step):
    """Codes 0 to 15 of numbers [TILE, HALF], with step sizes [TILE]."""
    code = rounded(numbers * (1.0 / step)[:, None] + 7.5)
    return tl.minimum(tl.maximum(code, 0.0), 15.0)


@triton.jit
def _error(numbers, step, inside):
    """Squared quantization error of each number."""
    off = (_level(numbers, step) - 7.5) * step[:, None] - numbers
    return tl.where(inside, off * off, 0.0)
