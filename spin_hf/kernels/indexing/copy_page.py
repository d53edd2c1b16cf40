"""Copies pages of many layers to a packed tensor, and their summaries back, for methods that summarise in PyTorch.

A page becomes complete only once in page_size steps, so it is summarised outside the captured step. The host must neither
wait for the device nor read pages in host memory, which the device may still be writing. `backends/triton_indexing.py` runs
`Method.index_pages` between two of these launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import POSITION, own_layer, own_step, page_rows, row_addresses
from ..descriptor_fields import LayerField
from ..launch import LaunchShape, power_of_two

_BLOCK_BYTES = 4096


def copy_page(
    step: Tensor, layers: Tensor, packed: Tensor, *, page: int, field: LayerField, put: bool, shape: LaunchShape,
    pages_per_row: int = 1,
) -> None:  # fmt: skip
    """Copy consecutive rows in one array of every layer, those of `page` first, to `packed`, or from it if `put`.

    Args:
        step: the step descriptor.
        layers: int64 [L]: addresses of the layers' descriptors.
        packed: [L * B, H, n, ...] of n rows, contiguous. Mutated, unless `put`.
        page: not read if sequences have descriptors of their own: that which the step of each completed, if it did. Others are
            left alone.
        field: the layer descriptor's field of the array's address table.
        pages_per_row: pages that have one row.
    """
    num_layers, row_bytes = layers.shape[0], packed[0, 0, 0].nbytes
    copy_page_kernel[(packed.shape[0] // num_layers * shape.num_heads, num_layers, packed.shape[2])](
        step, layers, page, int(field), packed.view(-1).view(torch.uint8), PUT=put, ROW_BYTES=row_bytes,
        BLOCK=min(_BLOCK_BYTES, power_of_two(row_bytes)), H=shape.num_heads, SEGMENT=shape.segment_pages,
        ROWS=shape.rows_per_chunk, PAGES=pages_per_row, PAGE=shape.page_size, APART=shape.apart,
    )  # fmt: skip


@triton.jit(do_not_specialize=["page", "field"])
def copy_page_kernel(
    step, layers, page, field, packed,
    PUT: tl.constexpr, ROW_BYTES: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr, SEGMENT: tl.constexpr,
    ROWS: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, i, j) copies row j from `page` on, of an array of layer i, to `packed`, or from it if PUT.

    Args:
        layers: int64 [L]: addresses of the layers' descriptors.
        field: the `LayerField` of the array's address table.
        packed: uint8 [L, B * H, num_programs(2), ROW_BYTES]. Written, unless PUT.
        ROWS: pages per chunk of arrays with a row for each page; PAGES: pages that have one row in this array.
        BLOCK: bytes per load.
    """
    bh = tl.program_id(0)
    place = (tl.program_id(1) * tl.num_programs(0) + bh).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    step = own_step(step, bh // H, APART)
    layer = own_layer(tl.load(layers + tl.program_id(1)).to(tl.pointer_type(tl.int64)), bh // H, APART)
    if APART:
        length = tl.load(step + POSITION) + 1
        if (length == 0) | (length % PAGE != 0):  # no sequence, or no page was completed
            return
        page = (length // PAGE - 1) // PAGES * PAGES
    pages = page + tl.program_id(2) * PAGES + tl.zeros([1], tl.int64)
    row = page_rows(step, (bh // H).to(tl.int64), (bh % H).to(tl.int64), pages, pages >= 0, H, SEGMENT) // PAGES
    address = tl.sum(row_addresses(tl.load(layer + field), row, row >= 0, ROWS // PAGES, ROW_BYTES), 0)
    stored = address.to(tl.pointer_type(tl.uint8))
    for start in tl.static_range(0, ROW_BYTES, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        inside = offset < ROW_BYTES
        if PUT:
            tl.store(stored + offset, tl.load(packed + place * ROW_BYTES + offset, mask=inside), mask=inside)
        else:
            tl.store(packed + place * ROW_BYTES + offset, tl.load(stored + offset, mask=inside), mask=inside)
