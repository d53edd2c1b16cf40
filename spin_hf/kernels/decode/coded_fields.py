"""Operands of tensor cores from packed codes, for `scan_pages.py` and `attend_pages.py`.

A byte has four fields of two bits (`kernels/reference_scan.py`). On a device, inline assembly works on four bytes at once;
Triton would unpack each of them first.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiplied_at(byte):
    """The row of a product in which byte `byte` of a code is: a thread that loads 8 bytes at once multiplies 4 and 4."""
    return byte // 32 * 32 + byte % 8 // 4 * 16 + byte % 32 // 8 * 4 + byte % 4


@triton.jit
def code_parts(codes, COMPILED: tl.constexpr):
    """Bytes as four int8 numbers b0, b1, b2, b3: byte = b0 + b1 + 16 (b2 + b3), b0 and b2 0 to 3, b1 and b3 0, 4, 8 or 12."""
    if COMPILED:
        one, two, three, four = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 high;
            and.b32 $0, $4, 0x03030303;
            and.b32 $1, $4, 0x0c0c0c0c;
            shr.u32 high, $4, 4;
            and.b32 $2, high, 0x03030303;
            and.b32 $3, high, 0x0c0c0c0c;
            }
            """,
            "=r,=r,=r,=r,r", [codes], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        one, two = codes & 3, codes & 12
        three, four = (codes >> 4) & 3, (codes >> 4) & 12
    return one, two, three, four


@triton.jit
def value_fields(codes, dtype: tl.constexpr, COMPILED: tl.constexpr):
    """Fields less 1.5, exactly, of bytes [n, B]: [n, 4 * B], float16 or float32. Field f of byte i is at f * B + i."""
    if COMPILED and dtype == tl.float16:
        # A field f in the mantissa of 1024: 1024 + 4 f, 16 f or 64 f; the lowest field is moved up first. Two bytes at once.
        one, two, three, four = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 pair, up, a, b, c, d;
            .reg .b32 f4, f16, f64, m4, m16, m64;
            mov.b32 f4, 0x34003400;
            mov.b32 f16, 0x2c002c00;
            mov.b32 f64, 0x24002400;
            mov.b32 m4, 0xdc06dc06;
            mov.b32 m16, 0xd418d418;
            mov.b32 m64, 0xcc60cc60;
            prmt.b32 pair, $8, 0, 0x4140;
            shl.b32 up, pair, 2;
            lop3.b32 a, up, 0x000c000c, 0x64006400, 0xea;
            lop3.b32 b, pair, 0x000c000c, 0x64006400, 0xea;
            lop3.b32 c, pair, 0x00300030, 0x64006400, 0xea;
            lop3.b32 d, pair, 0x00c000c0, 0x64006400, 0xea;
            fma.rn.f16x2 $0, a, f4, m4;
            fma.rn.f16x2 $2, b, f4, m4;
            fma.rn.f16x2 $4, c, f16, m16;
            fma.rn.f16x2 $6, d, f64, m64;
            prmt.b32 pair, $8, 0, 0x4342;
            shl.b32 up, pair, 2;
            lop3.b32 a, up, 0x000c000c, 0x64006400, 0xea;
            lop3.b32 b, pair, 0x000c000c, 0x64006400, 0xea;
            lop3.b32 c, pair, 0x00300030, 0x64006400, 0xea;
            lop3.b32 d, pair, 0x00c000c0, 0x64006400, 0xea;
            fma.rn.f16x2 $1, a, f4, m4;
            fma.rn.f16x2 $3, b, f4, m4;
            fma.rn.f16x2 $5, c, f16, m16;
            fma.rn.f16x2 $7, d, f64, m64;
            }
            """,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r", [codes],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        one, two = _field(codes, 0, dtype), _field(codes, 2, dtype)
        three, four = _field(codes, 4, dtype), _field(codes, 6, dtype)
    joined = tl.permute(tl.join(tl.join(one, three), tl.join(two, four)), (0, 2, 3, 1))  # [n, 2, 2, B], by field
    return tl.reshape(joined, (codes.shape[0], 4 * codes.shape[1]))


@triton.jit
def word_fields(words, dtype: tl.constexpr, COMPILED: tl.constexpr):
    """Fields f of the bytes of int32 words, each as 4^f * 2^-24 times its number: [4 * bytes, pages], float16 or float32.

    `words` are [n, W, 2, 2, p]: dimensions p, n, the fourth and the third make a page's number, so that a thread has numbers of
    neighbouring columns. Field f of byte i of word w is in row (4 * i + f) * W + w. In float16 the number is the masked field,
    with exponent 0.
    """
    if COMPILED and dtype == tl.float16:
        parts = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b, c, d;
            prmt.b32 a, $16, $17, 0x5410;
            prmt.b32 c, $16, $17, 0x7632;
            shr.u32 b, a, 8;
            shr.u32 d, c, 8;
            and.b32 $0, a, 0x00030003;
            and.b32 $1, a, 0x000c000c;
            and.b32 $2, a, 0x00300030;
            and.b32 $3, a, 0x00c000c0;
            and.b32 $4, b, 0x00030003;
            and.b32 $5, b, 0x000c000c;
            and.b32 $6, b, 0x00300030;
            and.b32 $7, b, 0x00c000c0;
            and.b32 $8, c, 0x00030003;
            and.b32 $9, c, 0x000c000c;
            and.b32 $10, c, 0x00300030;
            and.b32 $11, c, 0x00c000c0;
            and.b32 $12, d, 0x00030003;
            and.b32 $13, d, 0x000c000c;
            and.b32 $14, d, 0x00300030;
            and.b32 $15, d, 0x00c000c0;
            }
            """,
            "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words],
            dtype=(
                tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16,
                tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16,
            ),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        parts = (
            _masked(words, 0, dtype), _masked(words, 1, dtype), _masked(words, 2, dtype), _masked(words, 3, dtype),
            _masked(words, 4, dtype), _masked(words, 5, dtype), _masked(words, 6, dtype), _masked(words, 7, dtype),
            _masked(words, 8, dtype), _masked(words, 9, dtype), _masked(words, 10, dtype), _masked(words, 11, dtype),
            _masked(words, 12, dtype), _masked(words, 13, dtype), _masked(words, 14, dtype), _masked(words, 15, dtype),
        )  # fmt: skip
    even = tl.join(_four(parts[0], parts[4], parts[8], parts[12]), _four(parts[2], parts[6], parts[10], parts[14]))
    odd = tl.join(_four(parts[1], parts[5], parts[9], parts[13]), _four(parts[3], parts[7], parts[11], parts[15]))
    joined = tl.permute(tl.join(even, odd), (5, 6, 7, 8, 1, 4, 0, 3, 2))
    rows: tl.constexpr = 16 * words.shape[1]
    return tl.reshape(joined, (rows, words.shape[4] * words.shape[0] * 4))


@triton.jit
def _masked(words, NUMBER: tl.constexpr, dtype: tl.constexpr):
    """Field NUMBER % 4 of byte NUMBER // 4, times 4^(NUMBER % 4) * 2^-24."""
    field = (words >> (NUMBER // 4 * 8)) & (3 << (NUMBER % 4 * 2))
    return (field.to(tl.float32) * 5.9604644775390625e-08).to(dtype)


@triton.jit
def _four(zero, one, two, three):
    """Four tensors in two new dimensions [2, 2], behind the others."""
    return tl.join(tl.join(zero, two), tl.join(one, three))


@triton.jit
def word_field_places(VALUE_BYTES: tl.constexpr, DV: tl.constexpr):
    """Where the fields of `word_fields` are stored: field f of byte i at 4 * i + f; whether there is one; 1 / its unit."""
    row = tl.arange(0, 4 * VALUE_BYTES)
    word, number = row % (VALUE_BYTES // 4), row // (VALUE_BYTES // 4)
    place = 16 * word + number
    return place, place < DV, 16777216.0 / (1 << (number % 4 * 2)).to(tl.float32)


@triton.jit
def four_numbers(words, COMPILED: tl.constexpr):
    """The four bfloat16 numbers in each of `words`, int64 [...]: float32 [..., 2, 2]."""
    if COMPILED:
        zero, one, two, three = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high;
            mov.b64 {low, high}, $4;
            shl.b32 $0, low, 16;
            and.b32 $1, low, 0xffff0000;
            shl.b32 $2, high, 16;
            and.b32 $3, high, 0xffff0000;
            }
            """,
            "=r,=r,=r,=r,l", [words], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        zero, one = _sixteen_bits(words, 0), _sixteen_bits(words, 16)
        two, three = _sixteen_bits(words, 32), _sixteen_bits(words, 48)
    return _four(zero, one, two, three)


@triton.jit
def _sixteen_bits(words, BIT: tl.constexpr):
    """The bfloat16 number at bit BIT of `words`, float32."""
    return ((((words >> BIT) & 0xFFFF) << 16).to(tl.uint32)).to(tl.float32, bitcast=True)


@triton.jit
def _field(codes, BIT: tl.constexpr, dtype: tl.constexpr):
    return (((codes >> BIT) & 3).to(tl.float32) - 1.5).to(dtype)


@triton.jit
def coordinate_fields(BLOCK_V: tl.constexpr, DV: tl.constexpr):
    """The two fields of each coordinate (`reference_scan.levels`), whether it has a code, and whether it has a second field."""
    column = tl.arange(0, BLOCK_V)
    fine = column < DV // 4
    first = tl.where(fine, 2 * column, tl.minimum(column + DV // 4, DV - 1))
    return first, tl.minimum(first + 1, DV - 1), column < 3 * (DV // 4), fine


@triton.jit
def value_weights(weights, scale):
    """Weights [..., C] of values with scales [..., 1 or C], for `halves`: up to 32768. NaN, without codes, counts as 0."""
    scale = tl.where(tl.abs(scale) < 32768.0, scale, 0.0)
    return tl.minimum(weights * scale, 32768.0)


@triton.jit
def halves(numbers, dtype: tl.constexpr):
    """Numbers [n, C] of 0 to 32768 as pairs [n, 2 * C]: the number in `dtype`, and 2048 times what that leaves."""
    high = numbers.to(dtype).to(tl.float32)
    pairs = tl.join(high, (numbers - high) * 2048.0)
    # The last operation is the conversion: Triton fails to compile the product with what is reshaped last.
    return tl.reshape(pairs, (numbers.shape[0], 2 * numbers.shape[1])).to(dtype)


@triton.jit
def whole_sums(sums):
    """Sums [n, C] of numbers, from sums [n, 2 * C] of their `halves`."""
    pairs = tl.reshape(sums, (sums.shape[0], sums.shape[1] // 2, 2))
    return tl.sum(pairs * tl.where(tl.arange(0, 2) == 0, 1.0, 1.0 / 2048.0)[None, None, :], 2)


@triton.jit
def natural_log(numbers, shift, COMPILED: tl.constexpr):
    """Natural logarithms of numbers * 2^shift, in two instructions."""
    if COMPILED:
        logs = tl.inline_asm_elementwise(
            "{ .reg .f32 log; lg2.approx.ftz.f32 log, $1; add.f32 log, log, $2; mul.f32 $0, log, 0f3F317218; }", "=r,r,r",
            [numbers, tl.broadcast_to(shift, numbers.shape)], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        logs = tl.where(numbers > 0.0, tl.log2(tl.maximum(numbers, 1e-38)), float("-inf")) + shift
        logs = logs * 0.6931471805599453
    return logs


@triton.jit
def power2(numbers, COMPILED: tl.constexpr):
    """Powers of 2 in one instruction; 0 below 2^-126."""
    if COMPILED:
        powers = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [numbers], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        powers = tl.exp2(numbers)
    return powers
