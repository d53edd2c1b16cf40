"""Query operands for the products with 4-bit keys (see `attention/methods/four_bit_keys.py`). Called by `rate_kernel`.

    byte = low + 16 * high, two codes of four bits

    even * (low - 7.5) + odd * (high - 7.5)  =  (even - odd / 16) * low  +  odd / 16 * (byte - 128)  +  odd / 2 - 7.5 * even

So only the low code is unpacked. The byte itself takes the place of the high code. Each of the two has its own operand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import digits, log_sums


@triton.jit
def _rotate(
    query, query_b, query_h, basis, rotated, bh, H: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Multiply the queries of one (sequence, KV head) by the basis.

    Args:
        query: [B, H * G, 1, DK]; the last dimension is contiguous.
        basis: [DK, DK] of the query's dtype: the rotation, times the length of its columns, so that entries are integers.
        rotated: float32 [B * H, G, DK]. Written.
    """
    TILE: tl.constexpr = 32
    heads = tl.arange(0, 16)
    column = tl.arange(0, BLOCK_K)
    source = query + (bh // H).to(tl.int64) * query_b + ((bh % H) * G).to(tl.int64) * query_h
    for group in tl.static_range(0, G, 16):
        inside = (group + heads < G)[:, None]
        rows = tl.load(
            source + (group + heads)[:, None] * query_h + column[None, :],
            mask=inside & (column < DK)[None, :],
            other=0.0,
        )
        for start in tl.static_range(0, DK, TILE):
            into = start + tl.arange(0, TILE)
            turned = tl.load(
                basis + column[:, None] * DK + into[None, :],
                mask=(column < DK)[:, None] & (into < DK)[None, :],
                other=0.0,
            )
            product = tl.dot(rows, turned, input_precision="ieee")
            place = rotated + (bh * G + group + heads)[:, None] * DK + into[None, :]
            tl.store(place, product, mask=inside & (into < DK)[None, :])


@triton.jit
def prepare_queries(
    query, query_b, query_h, basis, rotated, operands, factors, stats, num_splits, bh, scale, DIGITS: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, RERANK_G: tl.constexpr, SPLITS: tl.constexpr,
    DK: tl.constexpr, BLOCK_K: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Write the operands of `rerank_kernel` for one (sequence, KV head).

    Args:
        query, query_b, query_h, basis, rotated: as for `_rotate`.
        operands: [B * H, 2, rows, HALF], for low codes and for bytes. With DIGITS int8 and 2 * RERANK_G rows
            (`common.digits`), else RERANK_G rows in the dtype of the products. Written.
        factors: float32 [B * H, 4, RERANK_G]: the factors of both products, the constant added to their sum, and the
            log-sum-exp of the logits of all pages by their means. Written.
        stats, num_splits: written by `score_kernel` with SINKS.
        scale: factor of the products.
    """
    _rotate(query, query_b, query_h, basis, rotated, bh, H, G, DK, BLOCK_K)
    tl.debug_barrier()
    copies: tl.constexpr = 2 if DIGITS else 1
    copy = tl.arange(0, copies * RERANK_G)
    half = tl.arange(0, HALF)
    group = tl.arange(0, RERANK_G)
    source = rotated + (bh * G + copy // copies)[:, None] * DK + 2 * half[None, :]
    real = (copy < copies * G)[:, None]
    even = tl.load(source, mask=real & (2 * half < DK)[None, :], other=0.0)
    odd = tl.load(source + 1, mask=real & (2 * half + 1 < DK)[None, :], other=0.0)
    constant = tl.sum(odd * 0.5 - even * 7.5, 1)
    odd *= 0.0625
    even -= odd
    low_factor = tl.full([RERANK_G], 1.0, tl.float32) * scale
    byte_factor = low_factor
    if DIGITS:
        even, low_unit = digits(even, 2 * RERANK_G)
        odd, byte_unit = digits(odd, 2 * RERANK_G)
        low_factor *= tl.max(tl.reshape(low_unit, (RERANK_G, 2)), 1)
        byte_factor *= tl.max(tl.reshape(byte_unit, (RERANK_G, 2)), 1)
        constant = tl.max(tl.reshape(constant, (RERANK_G, 2)), 1)
    size: tl.constexpr = copies * RERANK_G * HALF
    place = operands + bh * 2 * size + copy[:, None] * HALF + half[None, :]
    tl.store(place, even.to(operands.dtype.element_ty))
    tl.store(place + size, odd.to(operands.dtype.element_ty))
    factor = factors + bh * 4 * RERANK_G + group
    tl.store(factor, low_factor)
    tl.store(factor + RERANK_G, byte_factor)
    tl.store(factor + 2 * RERANK_G, constant * scale)
    tl.store(factor + 3 * RERANK_G, log_sums(stats, bh, num_splits, BLOCK_G, RERANK_G, SPLITS))
