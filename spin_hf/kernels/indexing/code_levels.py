"""Levels of coordinates: codes of two and four bits, packed to bytes, and the scale of each vector.

Vectors come as four tiles [rows, BYTES], one for each field of two bits of a byte, as `reference_scan.py` lays out bytes. A
number of four bits is in the tiles of both of its fields. The specification is `fitted_codes.encode`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import rounded

FINE_STEP, ROUGH_STEP = tl.constexpr(0.335), tl.constexpr(0.996)
"""As `fitted_codes._STEPS`."""


@triton.jit
def numbers_of(FIELD: tl.constexpr, D: tl.constexpr, BYTES: tl.constexpr):
    """The coordinate that field FIELD of each byte belongs to, 4 for those without a code; whether there is one."""
    byte = tl.arange(0, BYTES)
    if FIELD == 4:
        number = 3 * (D // 4) + byte
    else:
        number = tl.where(byte < D // 8, 2 * byte + FIELD // 2, 4 * byte - D // 4 + FIELD)
    return number, byte < D // 4


@triton.jit
def encode_levels(
    one, two, three, four, width_one, width_two, width_three, width_four, D: tl.constexpr, BYTES: tl.constexpr
):
    """Codes of coordinates [rows, BYTES] of the four fields, packed to bytes, and the scale of each row."""
    byte = tl.arange(0, BYTES)
    fine = byte < D // 8
    coded = byte < D // 4
    usual = tl.where(fine, FINE_STEP, ROUGH_STEP)
    first = coded.to(tl.float32)[None, :]  # whether the field is the first of its number
    second = (coded & (byte >= D // 8)).to(tl.float32)[None, :]
    spread = _square(one * (usual / width_one)[None, :], first) + _square(two * (usual / width_two)[None, :], second)
    spread += _square(three * (usual / width_three)[None, :], first)
    spread += _square(four * (usual / width_four)[None, :], second)
    size = tl.maximum(tl.sqrt_rn(spread * (1.0 / (3 * (D // 4)))), 1e-20)
    lowest = tl.full(size.shape, float("inf"), tl.float32)
    best = size
    scale = size
    for index in tl.range(5):  # not unrolled, which would take the compiler five times as long
        guess = tl.where(index == 0, 0.75, tl.where(index == 1, 0.87, tl.where(index == 2, 1.0, 0.0)))
        guess = tl.where(index == 3, 1.15, tl.where(index == 4, 1.35, guess))  # as `fitted_codes._GUESSES`
        step = size * guess
        level_one = (_code(one, width_one, step, fine) - _half(fine)) * width_one[None, :]
        level_two = (_code(two, width_two, step, fine) - _half(fine)) * width_two[None, :]
        level_three = (_code(three, width_three, step, fine) - _half(fine)) * width_three[None, :]
        level_four = (_code(four, width_four, step, fine) - _half(fine)) * width_four[None, :]
        along = tl.sum(
            first * (level_one * one + level_three * three) + second * (level_two * two + level_four * four), 1
        )
        power = _square(level_one, first) + _square(level_two, second)
        power += _square(level_three, first) + _square(level_four, second)
        fitted = _as_bfloat16(tl.maximum(along / power, 1e-20))
        error = _square(level_one * fitted[:, None] - one, first) + _square(level_two * fitted[:, None] - two, second)
        error += _square(level_three * fitted[:, None] - three, first)
        error += _square(level_four * fitted[:, None] - four, second)
        better = (error < lowest) | (index == 0)
        best = tl.where(better, step, best)
        scale = tl.where(better, fitted, scale)
        lowest = tl.where(better, error, lowest)
    low = _code(one, width_one, best, fine).to(tl.int32)
    middle_low = _code(two, width_two, best, fine).to(tl.int32)
    middle_high = _code(three, width_three, best, fine).to(tl.int32)
    high = _code(four, width_four, best, fine).to(tl.int32)
    of_two = low | (middle_high << 4)
    of_four = low | (middle_low << 2) | (middle_high << 4) | (high << 6)
    return tl.where(fine[None, :], of_two, of_four).to(tl.uint8), scale


@triton.jit
def _as_bfloat16(numbers):
    """Positive numbers, rounded to the nearest in bfloat16, halves to even. The interpreter's conversion cuts off."""
    bits = numbers.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _half(fine):
    """Half of the largest code: [1, BYTES]."""
    return tl.where(fine, 7.5, 1.5)[None, :]


@triton.jit
def _code(numbers, width, step, fine):
    """Codes of numbers [rows, BYTES], for widths [BYTES] and steps [rows]."""
    code = rounded(numbers / (width[None, :] * step[:, None]) + _half(fine))
    return tl.minimum(tl.maximum(code, 0.0), 2.0 * _half(fine))


@triton.jit
def _square(numbers, counted):
    """Sums of squares of rows."""
    return tl.sum(numbers * numbers * counted, 1)
