"""Operands of tensor cores from packed codes, for `scan_pages.py` and `attend_pages.py`.

A byte has four fields of two bits (`kernels/reference_scan.py`). On a device, inline assembly works on four bytes at once;
Triton would unpack each of them first.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
    """Fields less 1.5 of bytes [n, B], in place: [n, 4 * B]. `dtype` is float16 or float32."""
    if COMPILED and dtype == tl.float16:
        # A field f in the mantissa of 1024: 1024 + 4 f, 16 f or 64 f; the lowest field is moved up first. Two bytes at once.
        one, two, three, four = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 pair, up, a, b;
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
            fma.rn.f16x2 $0, a, f4, m4;
            lop3.b32 b, pair, 0x000c000c, 0x64006400, 0xea;
            fma.rn.f16x2 $2, b, f4, m4;
            lop3.b32 a, pair, 0x00300030, 0x64006400, 0xea;
            fma.rn.f16x2 $4, a, f16, m16;
            lop3.b32 b, pair, 0x00c000c0, 0x64006400, 0xea;
            fma.rn.f16x2 $6, b, f64, m64;
            prmt.b32 pair, $8, 0, 0x4342;
            shl.b32 up, pair, 2;
            lop3.b32 a, up, 0x000c000c, 0x64006400, 0xea;
            fma.rn.f16x2 $1, a, f4, m4;
            lop3.b32 b, pair, 0x000c000c, 0x64006400, 0xea;
            fma.rn.f16x2 $3, b, f4, m4;
            lop3.b32 a, pair, 0x00300030, 0x64006400, 0xea;
            fma.rn.f16x2 $5, a, f16, m16;
            lop3.b32 b, pair, 0x00c000c0, 0x64006400, 0xea;
            fma.rn.f16x2 $7, b, f64, m64;
            }
            """,
            "=r,=r,=r,=r,=r,=r,=r,=r,r", [codes], dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True,
            pack=4,
        )  # fmt: skip
    else:
        one, two = ((codes & 3).to(tl.float32) - 1.5).to(dtype), (((codes >> 2) & 3).to(tl.float32) - 1.5).to(dtype)
        three, four = (
            (((codes >> 4) & 3).to(tl.float32) - 1.5).to(dtype),
            (((codes >> 6) & 3).to(tl.float32) - 1.5).to(dtype),
        )
    joined = tl.join(tl.join(one, three), tl.join(two, four))
    return tl.reshape(joined, (codes.shape[0], 4 * codes.shape[1]))


@triton.jit
def halves(numbers, dtype: tl.constexpr):
    """Numbers [n, C] as pairs [n, 2 * C] whose sum they are: the number in `dtype`, and 2048 times what that leaves.

    Numbers above 32768 count as that.
    """
    numbers = tl.minimum(numbers, 32768.0)
    high = numbers.to(dtype)
    low = ((numbers - high.to(tl.float32)) * 2048.0).to(dtype)
    return tl.reshape(tl.join(high, low), (numbers.shape[0], 2 * numbers.shape[1]))


@triton.jit
def whole_sums(sums):
    """Sums [n, C] of numbers, from sums [n, 2 * C] of their `halves`."""
    pairs = tl.reshape(sums, (sums.shape[0], sums.shape[1] // 2, 2))
    return tl.sum(pairs * tl.where(tl.arange(0, 2) == 0, 1.0, 1.0 / 2048.0)[None, None, :], 2)
