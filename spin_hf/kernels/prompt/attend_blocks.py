"""Attention of a sparse prompt's query blocks to the key blocks that they chose. `reference_blocks.attend_blocks` specifies it.

    program    one query block of a head, or a part of it: its listed blocks among the given keys, with online softmax
    masked     only the query block's own keys: all other listed blocks are earlier, and complete

The sizes of a program follow from the shared memory. Keys and values of listed blocks are loaded ahead by the pipeline.
`attend_resident_blocks.py` does the same on pages where they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device_limits
from ..compile_ahead import launch_now
from ..launch import power_of_two
from ..reference_blocks import BLOCK_TOKENS, BlockLists
from .choose_blocks import LEAST_COLUMNS

LOG2_E = 1.4426950408889634
_SPARED = 2048
"""Bytes that reductions and weights leave free of those that `device_limits.shared_memory` spares for them: they are in
registers where the largest tiles fit."""


def attend_blocks(
    query: Tensor, keys: Tensor, values: Tensor, lists: BlockLists, scale: float, first: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """As `reference_blocks.attend_blocks`."""
    batch_size, num_heads, group, num_queries, key_dim = query.shape
    num_keys, value_dim = values.shape[2:]
    query, keys, values = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, keys, values))
    out = torch.empty((*query.shape[:4], value_dim), dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:4], dtype=torch.float32, device=query.device)
    blocks, columns = lists.blocks.shape[2:]
    width_k, width_v = max(16, power_of_two(key_dim)), max(16, power_of_two(value_dim))
    rows, tile, stages = tile_sizes(width_k, width_v, query.element_size(), device_limits.shared_memory(query.device))
    launch_now(
        attend_blocks_kernel, (blocks * (BLOCK_TOKENS // rows), batch_size * num_heads * group),
        query, *query.stride()[:4], keys, *keys.stride()[:3], values, *values.stride()[:3], lists.blocks, lists.counts,
        out, lse, scale * LOG2_E, num_queries, num_keys, lists.first, first, columns, H=num_heads, G=group, DK=key_dim,
        DV=value_dim, BLOCK_K=width_k, BLOCK_V=width_v, BLOCK=BLOCK_TOKENS, ROWS=rows, TILE=tile,
        LISTED=max(LEAST_COLUMNS, power_of_two(columns)),
        CAUSAL=causal, STAGES=stages, num_warps=8 if rows == BLOCK_TOKENS else 4,
    )  # fmt: skip
    return out, lse


def tile_sizes(width_k: int, width_v: int, item_bytes: int, shared_memory: int) -> tuple[int, int, int]:
    """Queries of a program, keys per tile and pipeline stages that fit the shared memory."""
    rows, tile, stages = 128, 128, 3
    ahead = (rows * width_k + stages * tile * (width_k + width_v)) * item_bytes
    if max(width_k, width_v) <= 128 and ahead <= shared_memory + _SPARED:
        return rows, tile, stages
    sizes = [(128, 128, 2), (128, 64, 2), (128, 32, 2), (64, 32, 2), (64, 16, 1)]
    for rows, tile, stages in sizes[3 if max(width_k, width_v) > 128 else 0 :]:
        if (rows * (width_k + tile) + stages * tile * (width_k + width_v)) * item_bytes <= shared_memory:
            return rows, tile, stages
    return 32, 16, 1


@triton.jit
def add_tile(
    queries, key_rows, value_rows, scale, token, stop, own, top, total, acc,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys and values at these addresses to the online softmax.

    Args:
        token: with MASKED, indices of the keys. Only those before `stop`, and not behind the query `own`, are added.
    """
    column_k, column_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    key_at = key_rows[None, :] + column_k[:, None]
    value_at = value_rows[:, None] + column_v[None, :]
    if MASKED:
        tile_k = tl.load(key_at, mask=(token < stop)[None, :] & (column_k < DK)[:, None], other=0.0)
        tile_v = tl.load(value_at, mask=(token < stop)[:, None] & (column_v < DV)[None, :], other=0.0)
    else:
        tile_k = tl.load(key_at) if DK == BLOCK_K else tl.load(key_at, mask=(column_k < DK)[:, None], other=0.0)
        tile_v = tl.load(value_at) if DV == BLOCK_V else tl.load(value_at, mask=(column_v < DV)[None, :], other=0.0)
    scores = tl.dot(queries, tile_k, input_precision="ieee") * scale
    if MASKED:
        scores = tl.where((token[None, :] <= own[:, None]) & (token < stop)[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    decay = tl.exp2(top - shift)
    weights = tl.exp2(scores - shift[:, None])
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(tile_v.dtype), tile_v, acc * decay[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_query_block", "first_key_block", "num_columns"])
def attend_blocks_kernel(
    query, query_b, query_h, query_g, query_n, keys, key_b, key_h, key_n, values, value_b, value_h, value_n, lists, counts,
    out, lse, scale, num_queries, num_keys, first_query_block, first_key_block, num_columns,
    H: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, LISTED: tl.constexpr, CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, (b * H + h) * G + g) attends from the i-th ROWS queries, counted from the last.

    Args:
        query: [B, H, G, num_queries, DK]; keys: [B, H, num_keys, DK]; values: [B, H, num_keys, DV]; rows are contiguous.
        lists: int32 [B, H * G, query blocks, num_columns]; counts: int32 [B, H * G, query blocks].
        out: [B, H, G, num_queries, DV]; lse: float32 [B, H, G, num_queries]; contiguous. Written.
        scale: of the scores, times log2(e).
        first_query_block, first_key_block: index of the first query's and of the first key's block.
    """
    SHARES: tl.constexpr = BLOCK // ROWS
    blocks = tl.num_programs(0) // SHARES
    part = tl.num_programs(0) - 1 - tl.program_id(0)  # late queries, which have more keys, start first
    index = part // SHARES
    row = tl.program_id(1).to(tl.int64)
    b, head = row // (H * G), row % (H * G)
    h, g = head // G, head % G
    listed = tl.arange(0, LISTED)
    count = tl.load(counts + row * blocks + index)
    entries = lists + (row * blocks + index) * num_columns
    known = tl.load(entries + listed, mask=listed < count, other=0x7FFFFFFF)
    stop_block = first_key_block + (num_keys + BLOCK - 1) // BLOCK
    begin = tl.sum((known < first_key_block).to(tl.int32), 0)
    end = tl.sum((known < stop_block).to(tl.int32), 0)
    position = part * ROWS + tl.arange(0, ROWS)
    has_query = position < num_queries
    column_k, column_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    at = query + b * query_b + h * query_h + g * query_g + position.to(tl.int64)[:, None] * query_n + column_k[None, :]
    queries = tl.load(at, mask=has_query[:, None] & (column_k < DK)[None, :], other=0.0)
    keys += b * key_b + h * key_h
    values += b * value_b + h * value_h
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    PARTS: tl.constexpr = BLOCK // TILE
    earlier = end - begin
    if CAUSAL:
        earlier -= 1  # the last one is the query block's own
    for i in tl.range(0, earlier * PARTS, num_stages=STAGES):
        block = tl.load(entries + begin + i // PARTS) - first_key_block
        token = block.to(tl.int64) * BLOCK + (i % PARTS) * TILE + tl.arange(0, TILE)
        top, total, acc = add_tile(
            queries, keys + token * key_n, values + token * value_n, scale, token, num_keys, position, top, total, acc,
            DK, DV, BLOCK_K, BLOCK_V, False,
        )  # fmt: skip
    if CAUSAL:
        for i in range(0, PARTS):
            token = index.to(tl.int64) * BLOCK + i * TILE + tl.arange(0, TILE)
            top, total, acc = add_tile(
                queries, keys + token * key_n, values + token * value_n, scale, token, num_keys, position, top, total,
                acc, DK, DV, BLOCK_K, BLOCK_V, True,
            )  # fmt: skip
    found = total > 0.0
    acc = acc / tl.where(found, total, 1.0)[:, None]
    base = row * num_queries + position
    inside = has_query[:, None] & (column_v < DV)[None, :]
    tl.store(out + base[:, None] * DV + column_v[None, :], acc.to(out.dtype.element_ty), mask=inside)
    natural = (top + tl.log2(tl.where(found, total, 1.0))) * 0.6931471805599453
    tl.store(lse + base, tl.where(found, natural, float("-inf")), mask=has_query)
