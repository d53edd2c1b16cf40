"""A page of many layers in one tensor, and its summaries back to where they are kept: for formulas of methods in PyTorch.

A page is complete every so many steps, so indexing it need not be part of a captured step; but it must not wait for the device,
and pages at home in host memory are still being written. The formulas run between two such launches:
`backends/triton_indexing.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import page_rows, row_addresses
from ..descriptor_fields import LayerField
from ..launch import LaunchShape, power_of_two

_BLOCK_BYTES = 4096


def copy_page(
    step: Tensor, layers: Tensor, packed: Tensor, *, page: int, field: LayerField, put: bool, shape: LaunchShape
) -> None:
    """Copy the row of `page` in an array of every layer to `packed`, or from there if `put`.

    Args:
        step: the step descriptor.
        layers: int64 [L]: addresses of the layers' descriptors.
        packed: [L * B, H, ...], contiguous. Mutated, unless `put`.
        field: the array's table in the layer descriptor.
    """
    num_layers, row_bytes = layers.shape[0], packed[0, 0].nbytes
    copy_page_kernel[(packed.shape[0] // num_layers * shape.num_heads, num_layers)](
        step, layers, page, int(field), packed.view(-1).view(torch.uint8), PUT=put, ROW_BYTES=row_bytes,
        BLOCK=min(_BLOCK_BYTES, power_of_two(row_bytes)), H=shape.num_heads, SEGMENT=shape.segment_pages,
        ROWS=shape.rows_per_chunk,
    )  # fmt: skip


@triton.jit(do_not_specialize=["page", "field"])
def copy_page_kernel(
    step, layers, page, field, packed,
    PUT: tl.constexpr, ROW_BYTES: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr, SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, i) copies a page's row of an array of the i-th layer to `packed`, or from there if PUT.

    Args:
        layers: int64 [L]: addresses of the layers' descriptors.
        field: the `LayerField` of the array's table of addresses.
        packed: uint8 [L, B * H, ROW_BYTES]. Written, if not PUT.
        BLOCK: bytes at a time.
    """
    bh = tl.program_id(0)
    place = (tl.program_id(1) * tl.num_programs(0) + bh).to(tl.int64)
    layer = tl.load(layers + tl.program_id(1)).to(tl.pointer_type(tl.int64))
    pages = page + tl.zeros([1], tl.int64)
    row = page_rows(step, (bh // H).to(tl.int64), (bh % H).to(tl.int64), pages, pages >= 0, H, SEGMENT)
    address = tl.sum(row_addresses(tl.load(layer + field), row, row >= 0, ROWS, ROW_BYTES), 0)
    kept = address.to(tl.pointer_type(tl.uint8))
    for start in tl.static_range(0, ROW_BYTES, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        inside = offset < ROW_BYTES
        if PUT:
            tl.store(kept + offset, tl.load(packed + place * ROW_BYTES + offset, mask=inside), mask=inside)
        else:
            tl.store(packed + place * ROW_BYTES + offset, tl.load(kept + offset, mask=inside), mask=inside)
