"""Attention of a sparse prompt's query blocks to the key blocks that they chose, on pages where they are.

    block_addresses_kernel            address of every key block of every KV head: whole pages of one segment
    attend_resident_blocks_kernel     one query block of a head, or a part of it: all listed blocks, the own one last

        list       | 0 | 5 | 9 | own |
        address        of block i, read one block ahead; its index two blocks ahead, so that no read waits for another one

    order of programs    query blocks that read everything, of all heads: they take longest; then head by head, late ones first

The result is written where the model expects it: nothing is gathered or merged. `reference_blocks.attend_blocks` and
`reference.merge_into` specify it.
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
from ..resident_pages import ResidentPages
from .attend_blocks import LOG2_E, add_tile, tile_sizes

_ADDRESSES = 128
"""Addresses that a program writes."""


def attend_resident_blocks(
    query: Tensor, pages: ResidentPages, lists: BlockLists, num_dense: int, scale: float, sinks: Tensor | None, out: Tensor
) -> None:  # fmt: skip
    """Attention of the last S tokens held to the listed blocks of all tokens held.

    Args:
        query: [B, H, G, S, Dk], from block `lists.first` on.
        num_dense: last query blocks that list everything. They are begun first; the result does not depend on it.
        pages: of all tokens held. They hold blocks (`ResidentPages.holds_blocks_of`).
        sinks: [H * G], logits in the softmax's denominator; None for none.
        out: [B, S, H * G, Dv], with contiguous rows; written.
    """
    batch_size, num_heads, group, num_queries, key_dim = query.shape
    query, value_dim = query if query.stride(-1) == 1 else query.contiguous(), pages.value_dim
    blocks, columns = lists.blocks.shape[2:]
    held, streams = lists.first + blocks, batch_size * num_heads
    width_k, width_v = max(16, power_of_two(key_dim)), max(16, power_of_two(value_dim))
    rows, tile, stages = tile_sizes(width_k, width_v, query.element_size(), device_limits.shared_memory(query.device))
    addresses = torch.empty((streams, held), dtype=torch.int64, device=query.device)
    launch_now(
        block_addresses_kernel, (triton.cdiv(held, _ADDRESSES), streams),
        pages.table, pages.rows, *pages.rows.stride()[:2], pages.rows_per_chunk, addresses, held, H=num_heads,
        BLOCK_PAGES=BLOCK_TOKENS // pages.page_size,
        PAGE_BYTES=pages.page_size * (key_dim + value_dim) * pages.dtype.itemsize, ADDRESSES=_ADDRESSES, num_warps=1,
    )  # fmt: skip
    launch_now(
        attend_resident_blocks_kernel, (blocks * (BLOCK_TOKENS // rows) * streams * group,),
        query, *query.stride()[:4], addresses, lists.blocks, lists.counts, sinks, out, *out.stride()[:3],
        scale * LOG2_E, num_queries, lists.first, num_dense, streams * group, held, columns, H=num_heads, G=group,
        DK=key_dim, DV=value_dim, BLOCK_K=width_k, BLOCK_V=width_v, BLOCK=BLOCK_TOKENS, ROWS=rows, TILE=tile,
        PAGE=pages.page_size, HAS_SINKS=sinks is not None, ALIGNED=pages.is_aligned, STAGES=stages,
        num_warps=8 if rows == BLOCK_TOKENS else 4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows_b", "rows_h", "rows_per_chunk", "num_blocks"])
def block_addresses_kernel(
    table, rows, rows_b, rows_h, rows_per_chunk, addresses, num_blocks,
    H: tl.constexpr, BLOCK_PAGES: tl.constexpr, PAGE_BYTES: tl.constexpr, ADDRESSES: tl.constexpr,
):  # fmt: skip
    """Program (i, b * H + h) writes ADDRESSES of the `addresses`, int64 [B * H, num_blocks], of blocks of BLOCK_PAGES pages.

    Args:
        table: int64, addresses of chunks of `rows_per_chunk` pages. rows: int64 [B, H, pages], rows are contiguous.
    """
    stream = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * ADDRESSES + tl.arange(0, ADDRESSES)
    inside = block < num_blocks
    row = tl.load(rows + stream // H * rows_b + stream % H * rows_h + block * BLOCK_PAGES, mask=inside, other=0)
    chunk = tl.load(table + row // rows_per_chunk, mask=inside, other=0)
    tl.store(addresses + stream * num_blocks + block, chunk + row % rows_per_chunk * PAGE_BYTES, mask=inside)


@triton.jit
def _add_pages(
    queries, address, scale, token, stop, own, top, total, acc,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PAGE: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """As `add_tile`, for tokens of the block at `address`."""
    pages = address.to(tl.pointer_type(queries.dtype))
    if ALIGNED:
        pages = tl.multiple_of(pages, 16)
    begin = pages + token // PAGE * (PAGE * (DK + DV))
    return add_tile(
        queries, begin + token % PAGE * DK, begin + (PAGE * DK + token % PAGE * DV), scale, token, stop, own, top, total,
        acc, DK, DV, BLOCK_K, BLOCK_V, MASKED,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_queries", "first_query_block", "num_dense", "num_rows", "num_blocks", "num_columns"]
)
def attend_resident_blocks_kernel(
    query, query_b, query_h, query_g, query_n, addresses, lists, counts, sinks, out, out_b, out_q, out_h,
    scale, num_queries, first_query_block, num_dense, num_rows, num_blocks, num_columns,
    H: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PAGE: tl.constexpr, HAS_SINKS: tl.constexpr,
    ALIGNED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program attends from ROWS queries of one of `num_rows` (sequence, head) pairs.

    Args:
        query: [B, H, G, num_queries, DK], rows are contiguous.
        addresses: int64 [B, H, num_blocks], of blocks of BLOCK tokens.
        lists: int32 [B, H * G, query blocks, num_columns], ascending; counts: int32 [B, H * G, query blocks]. The query
            block's own block is the last one listed.
        sinks: [H * G], logits. Read if HAS_SINKS.
        out: [B, num_queries, H * G, DV], rows are contiguous. Written.
        scale: of the scores, times log2(e).
        first_query_block: index of the first query's block.
        num_dense: last query blocks, whose programs come first.
    """
    SHARES: tl.constexpr = BLOCK // ROWS
    PARTS: tl.constexpr = BLOCK // TILE
    parts, first_parts = tl.num_programs(0) // num_rows, num_dense * SHARES
    blocks, program = parts // SHARES, tl.program_id(0)
    if program < first_parts * num_rows:
        row, part = program // first_parts, parts - 1 - program % first_parts
    else:
        program -= first_parts * num_rows
        parts -= first_parts
        row, part = program // parts, parts - 1 - program % parts
    index, row = part // SHARES, row.to(tl.int64)
    b, head = row // (H * G), row % (H * G)
    h, g = head // G, head % G
    position = part * ROWS + tl.arange(0, ROWS)
    has_query = position < num_queries
    column_k, column_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    at = query + b * query_b + h * query_h + g * query_g + position.to(tl.int64)[:, None] * query_n + column_k[None, :]
    queries = tl.load(at, mask=has_query[:, None] & (column_k < DK)[None, :], other=0.0)
    last = tl.load(counts + row * blocks + index) - 1
    entries = lists + (row * blocks + index) * num_columns
    addresses += (b * H + h) * num_blocks
    stop, own = num_queries - index * BLOCK, position - index * BLOCK
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    address = tl.load(addresses + tl.load(entries))
    following = tl.load(entries + tl.minimum(1 // PARTS, last))
    for i in tl.range(0, last * PARTS, num_stages=STAGES):
        token = (i % PARTS) * TILE + tl.arange(0, TILE)
        top, total, acc = _add_pages(
            queries, address, scale, token, stop, own, top, total, acc, DK, DV, BLOCK_K, BLOCK_V, PAGE, ALIGNED, False
        )
        address = tl.load(addresses + following)
        following = tl.load(entries + tl.minimum((i + 2) // PARTS, last))
    address = tl.load(addresses + first_query_block + index)
    for i in range(0, PARTS):
        token = i * TILE + tl.arange(0, TILE)
        top, total, acc = _add_pages(
            queries, address, scale, token, stop, own, top, total, acc, DK, DV, BLOCK_K, BLOCK_V, PAGE, ALIGNED, True
        )
    if HAS_SINKS:
        total += tl.exp2(tl.load(sinks + head).to(tl.float32) * 1.4426950408889634 - top)
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    place = out + b * out_b + position.to(tl.int64)[:, None] * out_q + head * out_h + column_v[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=has_query[:, None] & (column_v < DV)[None, :])
