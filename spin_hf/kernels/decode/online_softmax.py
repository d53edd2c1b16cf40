"""Attention to one tile of keys and values, with a running maximum (online softmax). Called by the kernels that attend.

The specification is `reference.attend`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import ATTEND_TOKENS, LaunchShape, power_of_two


def tile_pages(shape: LaunchShape) -> int:
    """Pages per tile, limited by the shared memory of a program."""
    token_bytes = (shape.block_k + shape.block_v) * shape.dtype.itemsize
    tokens = min(ATTEND_TOKENS, power_of_two(shape.shared_memory // (2 * token_bytes) + 1) // 2)  # two in flight
    return max(16, tokens, shape.page_size) // shape.page_size


@triton.jit
def attend_tile(
    queries, keys, values, allowed, most, total, acc, scale, softcap, CAPPED: tl.constexpr, DTYPE: tl.constexpr
):
    """Add a tile to attention.

    Args:
        queries: [G, Dk]; keys, values: [tokens, Dk] and [tokens, Dv]; all in DTYPE.
        allowed: [tokens]: whether queries attend to a token. Values of other tokens must be finite.
        most, total, acc: [G], [G] and [G, Dv], float32: maximum of the scores so far, sum of their exponentials, and weighted
            sum of values, both relative to the maximum.
        softcap: scores become softcap * tanh(scores / softcap), if CAPPED.
    Returns:
        `most`, `total` and `acc` with the tile.
    """
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    if CAPPED:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # softcap * tanh(scores / softcap)
    scores = tl.where(allowed[None, :], scores, float("-inf"))
    higher = tl.maximum(most, tl.max(scores, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    decay = tl.exp(most - shift)
    weights = tl.exp(scores - shift[:, None])
    total = total * decay + tl.sum(weights, 1)
    acc = acc * decay[:, None] + tl.dot(weights.to(DTYPE), values, input_precision="ieee")
    return higher, total, acc


@triton.jit
def attended(most, total, acc):
    """Output [G, Dv] and log-sum-exp [G] of all tiles; zeros and -infinity without tokens."""
    lse = tl.where(total > 0, most + tl.log(tl.maximum(total, 1e-37)), float("-inf"))
    return acc / tl.maximum(total, 1e-37)[:, None], lse
