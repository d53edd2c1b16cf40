"""Vectors in four bits a number, in one pass over them. The specification is `attention/lowbit.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 16


def encode_rows(rotated: Tensor, multiples: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """As `lowbit.encode`, of vectors [..., D], float32."""
    rows = rotated.reshape(-1, rotated.shape[-1]).contiguous()
    count, dim = rows.shape
    codes = torch.empty((count, -(-dim // 2)), dtype=torch.uint8, device=rows.device)
    scale = torch.empty((count,), dtype=torch.float32, device=rows.device)
    steps = torch.tensor(multiples, dtype=torch.float32).to(rows.device, non_blocking=True)
    if count:
        with torch.cuda.device_of(rows):
            encode_rows_kernel[(triton.cdiv(count, _TILE),)](
                rows, steps, codes, scale, count, DIM=dim, HALF=triton.next_power_of_2(codes.shape[1]),
                STEPS=len(multiples), TILE=_TILE,
            )  # fmt: skip
    return codes.view(*rotated.shape[:-1], codes.shape[1]), scale.view(rotated.shape[:-1])


@triton.jit(do_not_specialize=["count"])
def encode_rows_kernel(
    rows, steps, codes, scale, count, DIM: tl.constexpr, HALF: tl.constexpr, STEPS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Program i encodes TILE of the rows.

    Args:
        rows: float32 [count, DIM]; steps: float32 [STEPS], multiples of the root mean square.
        codes: uint8 [count, ceil(DIM / 2)]; scale: float32 [count]. Written.
    """
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    there = row < count
    column = tl.arange(0, HALF)
    low_in = there[:, None] & (2 * column < DIM)[None, :]
    high_in = there[:, None] & (2 * column + 1 < DIM)[None, :]
    low = tl.load(rows + row[:, None] * DIM + 2 * column[None, :], mask=low_in, other=0.0)
    high = tl.load(rows + row[:, None] * DIM + 2 * column[None, :] + 1, mask=high_in, other=0.0)
    size = tl.maximum(tl.sqrt_rn(tl.sum(low * low + high * high, 1) * (1.0 / DIM)), 1e-20)
    lowest = tl.full([TILE], float("inf"), tl.float32)
    best = size
    for index in tl.static_range(STEPS):
        step = size * tl.load(steps + index)
        error = tl.sum(_error(low, step, low_in) + _error(high, step, high_in), 1)
        best = tl.where(error < lowest, step, best)
        lowest = tl.minimum(error, lowest)
    packed = _level(low, best).to(tl.uint8)
    upper = tl.where(high_in, _level(high, best), 0.0).to(tl.uint8)
    tl.store(codes + row[:, None] * ((DIM + 1) // 2) + column[None, :], packed | (upper << 4), mask=low_in)
    tl.store(scale + row, best, mask=there)


@triton.jit
def _level(numbers, step):
    """Codes, 0 to 15, of numbers [TILE, HALF] in steps [TILE]; halves are rounded to even."""
    code = (tl.div_rn(numbers, tl.broadcast_to(step[:, None], numbers.shape)) + 7.5 + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(code, 0.0), 15.0)


@triton.jit
def _error(numbers, step, inside):
    """Squared error of each number."""
    off = (_level(numbers, step) - 7.5) * step[:, None] - numbers
    return tl.where(inside, off * off, 0.0)
