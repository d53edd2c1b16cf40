"""Queries in the basis in which keys are kept in four bits (see `attention/lowbit.py`). Called by `rate_kernel`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_queries(
    query, query_b, query_h, basis, rotated, bh, H: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Write the product of the queries of one (sequence, KV head) and the basis.

    Args:
        query: [B, H * G, 1, DK]; the last dimension is contiguous.
        basis: [DK, DK] of the query's dtype: whole numbers, times the lengths of the columns.
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
