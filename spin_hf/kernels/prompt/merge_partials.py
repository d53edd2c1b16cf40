"""Merges attention over disjoint sets of tokens into the result of a prompt's layer, in one pass over the partial results.

    partials   out 0, lse 0 | out 1, lse 1 | ...      each of all queries, over some of the tokens
    result     sum of out i * e^(lse i)  /  (sum of e^(lse i) + e^sink)

`reference.merge_into` specifies it. Partial results are as large as the output, so reading each once is most of the work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_ahead import launch_now
from ..fused_attention import MOST_PARTIALS
from ..launch import power_of_two

_BLOCK_QUERIES = 32


def merge_attention(partials: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """As `reference.merge_attention`, for at most MOST_PARTIALS partial results."""
    if len(partials) == 1:
        return partials[0]
    out, lse = (torch.empty(each.shape, dtype=torch.float32, device=each.device) for each in partials[0])
    _merge(partials, None, out.flatten(1, 2).transpose(1, 2), lse)
    return out, lse


def merge_into(partials: Sequence[tuple[Tensor, Tensor]], sinks: Tensor | None, out: Tensor) -> None:
    """As `reference.merge_into`."""
    _merge(partials, sinks, out, None)


def _merge(
    partials: Sequence[tuple[Tensor, Tensor]], sinks: Tensor | None, out: Tensor, merged_lse: Tensor | None
) -> None:  # fmt: skip
    rows = [(each if each.stride(-1) == 1 else each.contiguous(), lse.contiguous()) for each, lse in partials]
    padded = rows + rows[-1:] * (MOST_PARTIALS - len(rows))  # one variant of the kernel for all numbers
    outs, lses = tuple(out for out, _ in padded), tuple(lse for _, lse in padded)
    batch_size, num_heads, group, num_queries, dim = outs[0].shape
    blocks = triton.cdiv(num_queries, _BLOCK_QUERIES)
    launch_now(
        merge_partials_kernel, (blocks, batch_size * num_heads * group),
        outs, lses, tuple(stride for each in outs for stride in each.stride()[:4]), sinks, out, *out.stride()[:3],
        merged_lse, num_queries, len(partials), H=num_heads, G=group, D=dim, COUNT=MOST_PARTIALS,
        HAS_SINKS=sinks is not None, HAS_LSE=merged_lse is not None, BLOCK_Q=_BLOCK_QUERIES, BLOCK_D=power_of_two(dim),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_queries", "count"])
def merge_partials_kernel(
    outs, lses, strides, sinks, out, out_b, out_q, out_h, merged_lse, num_queries, count,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, COUNT: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_LSE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, (b * H + h) * G + g) writes queries [i * BLOCK_Q, (i + 1) * BLOCK_Q) of one query head.

    Args:
        outs: COUNT tensors [B, H, G, Q, D], with contiguous rows, of which `count` are read; strides: 4 numbers for each.
        lses: likewise, [B, H, G, Q], float32, contiguous.
        sinks: [H * G], logits. Read if HAS_SINKS.
        out: [B, Q, H * G, D], with contiguous rows. Written.
        merged_lse: [B, H, G, Q], float32, contiguous. Written if HAS_LSE.
    """
    row = tl.program_id(1).to(tl.int64)
    b, head = row // (H * G), row % (H * G)
    h, g = head // G, head % G
    query = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column = tl.arange(0, BLOCK_D)
    has_query = query < num_queries
    inside = has_query[:, None] & (column < D)[None, :]
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    for i in tl.static_range(COUNT):
        lse = tl.load(lses[i] + row * num_queries + query, mask=has_query & (i < count), other=float("-inf"))
        top = tl.maximum(top, lse)
    top = tl.where(top == float("-inf"), 0.0, top)  # a query without tokens
    total = tl.zeros([BLOCK_Q], tl.float32)
    merged = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for i in tl.static_range(COUNT):
        given = i < count
        lse = tl.load(lses[i] + row * num_queries + query, mask=has_query & given, other=float("-inf"))
        weight = tl.exp(lse - top)
        start = b * strides[4 * i] + h * strides[4 * i + 1] + g * strides[4 * i + 2]
        part = outs[i] + start + query[:, None] * strides[4 * i + 3] + column[None, :]
        part = tl.load(part, mask=inside & given, other=0.0)
        merged += part.to(tl.float32) * weight[:, None]
        total += weight
    if HAS_SINKS:
        total += tl.exp(tl.load(sinks + head).to(tl.float32) - top)
    merged = merged / tl.where(total > 0.0, total, 1.0)[:, None]
    place = out + b * out_b + query[:, None] * out_q + head * out_h + column[None, :]
    tl.store(place, merged.to(out.dtype.element_ty), mask=inside)
    if HAS_LSE:
        tl.store(merged_lse + row * num_queries + query, top + tl.log(total), mask=has_query)
