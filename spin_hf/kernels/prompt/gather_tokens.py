"""Gathers keys and values of consecutive pages into one tensor each, for fused attention. Each is read and written once.

    pages     | K K K K V V V V | K K K K V V V V | ...        rows of a chunked array, in the model's dtype
    result    keys   | K K K K K K K K ...      values   | V V V V V V V V ...

`PageLayout.take` of `reference.take_rows`, flattened, specifies it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_ahead import launch_now
from ..launch import power_of_two
from ..resident_pages import ResidentPages

_TILE_NUMBERS = 8192
"""Numbers of the keys, or of the values, that a program copies, unless a page has more."""


def gather_tokens(pages: ResidentPages, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys [B, H, num_tokens, Dk] and values [B, H, num_tokens, Dv] of the first tokens of `pages`, contiguous."""
    batch_size, num_heads, _ = pages.rows.shape
    sizes, dtype, device = (batch_size, num_heads, num_tokens), pages.dtype, pages.rows.device
    keys = torch.empty((*sizes, pages.key_dim), dtype=dtype, device=device)
    values = torch.empty((*sizes, pages.value_dim), dtype=dtype, device=device)
    widths = power_of_two(pages.key_dim), power_of_two(pages.value_dim)
    fitting = max(1, _TILE_NUMBERS // (max(widths) * pages.page_size))
    tile_pages = min(pages.segment_pages, power_of_two(fitting + 1) // 2)
    launch_now(
        gather_tokens_kernel, (triton.cdiv(num_tokens, tile_pages * pages.page_size), batch_size * num_heads),
        pages.table, pages.rows, *pages.rows.stride()[:2], pages.rows_per_chunk, keys, values, num_tokens, H=num_heads,
        DK=pages.key_dim, DV=pages.value_dim, BLOCK_K=widths[0], BLOCK_V=widths[1], PAGE=pages.page_size,
        PAGES=tile_pages, TILE=power_of_two(tile_pages * pages.page_size), ALIGNED=pages.is_aligned, num_warps=4,
    )  # fmt: skip
    return keys, values


@triton.jit(do_not_specialize=["rows_b", "rows_h", "rows_per_chunk", "num_tokens"])
def gather_tokens_kernel(
    table, rows, rows_b, rows_h, rows_per_chunk, keys, values, num_tokens,
    H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGE: tl.constexpr, PAGES: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Program (i, b * H + h) copies PAGES pages of a KV head, from page i * PAGES on. They are in one segment.

    Args:
        table: int64, addresses of chunks of `rows_per_chunk` pages. rows: int64 [B, H, pages], rows are contiguous.
        keys: [B, H, num_tokens, DK], values: [B, H, num_tokens, DV], contiguous. Written.
    """
    dtype: tl.constexpr = keys.dtype.element_ty
    NUMBERS: tl.constexpr = PAGE * (DK + DV)
    stream = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * PAGES
    row = tl.load(rows + stream // H * rows_b + stream % H * rows_h + first)
    chunk = tl.load(table + row // rows_per_chunk).to(tl.pointer_type(dtype))
    page = chunk + row % rows_per_chunk * NUMBERS
    if ALIGNED:
        page = tl.multiple_of(page, 16)
    token = tl.arange(0, TILE)
    place = first * PAGE + token
    inside = (token < PAGES * PAGE) & (place < num_tokens)
    begin = page + token // PAGE * NUMBERS
    column_k, column_v = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    has_k, has_v = inside[:, None] & (column_k < DK)[None, :], inside[:, None] & (column_v < DV)[None, :]
    key = tl.load((begin + token % PAGE * DK)[:, None] + column_k[None, :], mask=has_k)
    value = tl.load((begin + PAGE * DK + token % PAGE * DV)[:, None] + column_v[None, :], mask=has_v)
    target = stream * num_tokens + place
    tl.store(keys + target[:, None] * DK + column_k[None, :], key, mask=has_k)
    tl.store(values + target[:, None] * DV + column_v[None, :], value, mask=has_v)
