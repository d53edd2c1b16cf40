"""A page of many layers in one tensor, and its summaries back to where they are kept: for formulas of methods in PyTorch.

A page is complete every so many steps, so indexing it need not be part of a captured step; but it must not wait for the device,
and pages at home in host memory are still being written. The formulas run between two such launches:
`backends/triton_indexing.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common import page_rows, row_addresses


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
