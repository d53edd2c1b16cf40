"""Chooses the key blocks of a sparse prompt's query blocks. `reference_blocks.choose_blocks` specifies it.

    weigh_blocks_kernel    two query blocks of all heads of a KV head  ->  mass of every key block
    list_blocks_kernel     one query block of a head  ->  least mass that is read, by bisection over its bits  ->  list

The first kernel passes over the mean keys twice: for the softmax's denominator, then for the masses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device_limits, reference_blocks
from ..compile_ahead import launch_now
from ..launch import power_of_two
from ..reference_blocks import BLOCK_TOKENS, MEAN_TOKENS, BlockLists

_PAIR = 2
"""Query blocks of a program: with them, matrix products have at least 16 rows."""
_MEANS = BLOCK_TOKENS // MEAN_TOKENS
LEAST_COLUMNS = 1024
"""Key blocks that all variants of the kernels can list: 128K tokens. More of them need another variant."""


def choose_blocks(
    query_means: Tensor, key_means: Tensor, scale: float, top_p: float, first: int, dense_from: int
) -> BlockLists:  # fmt: skip
    """As `reference_blocks.choose_blocks`, by which the choice is made where the shared memory is too small."""
    batch_size, heads, num_queries, dim = query_means.shape
    num_heads, num_keys = key_means.shape[1:3]
    blocks, columns = triton.cdiv(num_queries, _MEANS), triton.cdiv(num_keys, _MEANS)
    width, rows = max(16, power_of_two(dim)), power_of_two(heads // num_heads) * _PAIR * _MEANS
    sizes = _sizes(rows, width, query_means.element_size(), device_limits.shared_memory(query_means.device))
    if sizes is None:
        return reference_blocks.choose_blocks(query_means, key_means, scale, top_p, first, dense_from)
    masses = torch.empty((batch_size, heads, blocks, columns), dtype=torch.float32, device=query_means.device)
    group, means = heads // num_heads, key_means if key_means.stride(-1) == 1 else key_means.contiguous()
    launch_now(
        weigh_blocks_kernel, (triton.cdiv(blocks, _PAIR), batch_size * num_heads),
        query_means.contiguous(), means, *means.stride()[:3], masses, num_queries, num_keys, first * _MEANS, scale,
        blocks, columns, H=num_heads, G=group, BLOCK_G=power_of_two(group), D=dim, BLOCK_D=width,
        TILE=sizes[0], MEANS=_MEANS, num_warps=4 if group <= 4 else 8, num_stages=sizes[1],
    )  # fmt: skip
    lists = torch.empty(masses.shape, dtype=torch.int32, device=masses.device)
    counts = torch.empty(masses.shape[:3], dtype=torch.int32, device=masses.device)
    launch_now(
        list_blocks_kernel, (batch_size * heads * blocks,),
        masses, lists, counts, top_p, first, dense_from, blocks, columns, BLOCK=max(LEAST_COLUMNS, power_of_two(columns)),
        num_warps=4 if columns <= 2048 else 8,
    )  # fmt: skip
    return BlockLists(lists, counts, first)


def _sizes(rows: int, width: int, item_bytes: int, shared_memory: int) -> tuple[int, int] | None:
    """Mean keys per tile and pipeline stages that fit the shared memory; None if none do."""
    for tile, stages in ((64, 3), (64, 2), (32, 2), (16, 2), (16, 1)):
        if (rows + stages * tile) * width * item_bytes + rows * tile * 4 <= shared_memory:
            return tile, stages
    return None


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_mean", "num_blocks", "num_columns"])
def weigh_blocks_kernel(
    query_means, key_means, key_b, key_h, key_n, masses, num_queries, num_keys, first_mean, scale, num_blocks, num_columns,
    H: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
    MEANS: tl.constexpr,
):  # fmt: skip
    """Program (i, b * H + h) writes the masses of query blocks 2 i and 2 i + 1 for the heads of a KV head.

    Args:
        query_means: [B, H * G, num_queries, D], contiguous; `first_mean` of all means are before them.
        key_means: [B, H, num_keys, D], with contiguous rows.
        masses: [B, H * G, num_blocks, num_columns], float32. Written up to the query blocks' own columns.
    """
    PAIR: tl.constexpr = 2 * MEANS
    pair = tl.program_id(0)
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    row = tl.arange(0, BLOCK_G * PAIR)
    g, index = row // PAIR, pair * PAIR + row % PAIR
    column = tl.arange(0, BLOCK_D)
    has_query = (g < G) & (index < num_queries)
    source = ((b * H + h) * G + g) * num_queries + index
    inside = has_query[:, None] & (column < D)[None, :]
    queries = tl.load(query_means + source[:, None] * D + column[None, :], mask=inside, other=0.0)
    own = first_mean + index
    stop = tl.minimum(num_keys, first_mean + (pair + 1) * PAIR)
    keys = key_means + b * key_b + h * key_h
    top = tl.full([BLOCK_G * PAIR], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G * PAIR], tl.float32)
    for start in range(0, stop, TILE):
        n = start + tl.arange(0, TILE)
        there = (n < stop)[None, :] & (column < D)[:, None]
        tile = tl.load(keys + n[None, :] * key_n + column[:, None], mask=there, other=0.0)
        scores = tl.dot(queries, tile, input_precision="ieee") * scale
        scores = tl.where((n[None, :] <= own[:, None]) & (n < stop)[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(scores - shift[:, None]), 1)
        top = higher
    shift = tl.where(top == float("-inf"), 0.0, top)
    factor = tl.where(has_query & (total > 0.0), 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)
    block = pair * 2 + tl.arange(0, BLOCK_G * 2) % 2
    of_head = ((b * H + h) * G + tl.arange(0, BLOCK_G * 2) // 2) * num_blocks + block
    has_block = (tl.arange(0, BLOCK_G * 2) // 2 < G) & (block < num_blocks)
    count = tl.minimum(num_queries - block * MEANS, MEANS)
    share = tl.where(has_block, 1.0 / tl.maximum(count, 1).to(tl.float32), 0.0)
    for start in range(0, stop, TILE):
        n = start + tl.arange(0, TILE)
        there = (n < stop)[None, :] & (column < D)[:, None]
        tile = tl.load(keys + n[None, :] * key_n + column[:, None], mask=there, other=0.0)
        scores = tl.dot(queries, tile, input_precision="ieee") * scale
        allowed = (n[None, :] <= own[:, None]) & (n < stop)[None, :]
        weights = tl.where(allowed, tl.exp(scores - shift[:, None]), 0.0) * factor[:, None]
        weights = tl.reshape(weights, (BLOCK_G * 2, MEANS, TILE // MEANS, MEANS))
        mass = tl.sum(tl.sum(weights, 3), 1) * share[:, None]
        column_block = start // MEANS + tl.arange(0, TILE // MEANS)
        written = has_block[:, None] & (column_block < num_columns)[None, :]
        tl.store(masses + of_head[:, None] * num_columns + column_block[None, :], mass, mask=written)


@triton.jit(do_not_specialize=["first", "dense_from", "num_blocks", "num_columns"])
def list_blocks_kernel(
    masses, lists, counts, top_p, first, dense_from, num_blocks, num_columns, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (b * heads + head) * num_blocks + i lists the key blocks of query block `first + i`.

    Args:
        masses: float32 [programs, num_columns]. Read up to the query block's own column.
        lists: int32 [programs, num_columns], counts: int32 [programs]. Written.
    """
    row = tl.program_id(0).to(tl.int64)
    own = first + (row % num_blocks).to(tl.int32)
    block = tl.arange(0, BLOCK)
    causal = (block <= own) & (block < num_columns)
    mass = tl.load(masses + row * num_columns + block, mask=causal, other=0.0)
    always = causal & ((block == 0) | (block == own) | (own >= dense_from))
    given = tl.sum(tl.where(always, mass, 0.0), 0)
    mass = tl.where(always, 0.0, mass)
    bits = mass.to(tl.int32, bitcast=True)  # in the order of the masses, which are not negative
    low, high = 1, 0x7F800000  # `low` reaches top_p, or nothing does; `high` does not
    for _ in range(31):
        middle = low + (high - low) // 2
        enough = given + tl.sum(tl.where(bits >= middle, mass, 0.0), 0) >= top_p
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    least = tl.where(given < top_p, low, high)
    chosen = always | (causal & (bits >= least))
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(lists + row * num_columns + place, block, mask=chosen)
    tl.store(counts + row, tl.sum(chosen.to(tl.int32), 0))
