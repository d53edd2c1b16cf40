"""Pages of many layers in one tensor, and their summaries back to where they are kept: for formulas of methods in PyTorch.

A page is complete every so many steps, so indexing it need not be part of a captured step; but it must not wait for the device,
and pages at home in host memory are still being written. The formulas run between these two launches: `index_completed`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import HOME, page_rows, row_addresses


@triton.jit(do_not_specialize=["page"])
def take_pages_kernel(
    step, layers, page, out,
    ROW_BYTES: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, i) copies a page of the i-th layer from its home.

    Args:
        layers: int64 [L]: addresses of the layers' descriptors.
        out: uint8 [L, B * H, ROW_BYTES]. Written.
        BLOCK: bytes at a time.
    """
    source, place = _row(step, layers, page, HOME, ROW_BYTES, H, SEGMENT, ROWS)
    for start in tl.static_range(0, ROW_BYTES, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        content = tl.load(source + offset, mask=offset < ROW_BYTES)
        tl.store(out + place * ROW_BYTES + offset, content, mask=offset < ROW_BYTES)


@triton.jit(do_not_specialize=["page", "field"])
def put_summaries_kernel(
    step, layers, page, summaries, field,
    ROW_BYTES: tl.constexpr, BLOCK: tl.constexpr, H: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, i) copies what is kept of a page of the i-th layer to the array of a `LayerField`.

    Args:
        layers: as for `take_pages_kernel`; summaries: uint8 [L, B * H, ROW_BYTES].
    """
    target, place = _row(step, layers, page, field, ROW_BYTES, H, SEGMENT, ROWS)
    for start in tl.static_range(0, ROW_BYTES, BLOCK):
        offset = start + tl.arange(0, BLOCK)
        content = tl.load(summaries + place * ROW_BYTES + offset, mask=offset < ROW_BYTES)
        tl.store(target + offset, content, mask=offset < ROW_BYTES)


@triton.jit
def _row(
    step, layers, page, field, ROW_BYTES: tl.constexpr, H: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr
):
    """Address of the program's row of an array, and the program's number."""
    bh = tl.program_id(0)
    place = (tl.program_id(1) * tl.num_programs(0) + bh).to(tl.int64)
    layer = tl.load(layers + tl.program_id(1)).to(tl.pointer_type(tl.int64))
    pages = page + tl.zeros([1], tl.int64)
    row = page_rows(step, (bh // H).to(tl.int64), (bh % H).to(tl.int64), pages, pages >= 0, H, SEGMENT)
    address = tl.sum(row_addresses(tl.load(layer + field), row, row >= 0, ROWS, ROW_BYTES), 0)
    return address.to(tl.pointer_type(tl.uint8)), place
