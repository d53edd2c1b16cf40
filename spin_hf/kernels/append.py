"""New tokens to their pages: home page, page frame if it is resident, and ShadowKV's summaries of complete pages.

The specification is `PageStore.append` and `ShadowKV.index`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    FRAMES,
    HOME,
    LANDMARK,
    MIN_COSINE,
    NUM_SLOTS,
    PAGE_SLOT,
    PAGE_SLOT_STRIDE,
    POSITION,
    page_rows,
    tokens_valid,
)


@triton.jit
def append_kernel(
    step, layer, key, value, count, key_b, key_h, key_n, value_b, value_h, value_n,
    SUMMARY: tl.constexpr, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Program (page, b * H + h) writes those of `count` tokens, from POSITION on, that
    belong to one page, and its summaries if they complete it.

    Args:
        key, value: [B, H, count, D]; the last dimension is contiguous.
    """
    bh = tl.program_id(1)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    start = tl.load(step + POSITION)
    page = start // PAGE + tl.program_id(0)
    dtype: tl.constexpr = key.dtype.element_ty
    item: tl.constexpr = key.dtype.element_ty.primitive_bitwidth // 8
    tokens = page * PAGE + tl.arange(0, PAGE)
    new = (tokens >= start) & (tokens < start + count)
    column_k = tl.arange(0, BLOCK_K)
    column_v = tl.arange(0, BLOCK_V)
    inside_k = new[:, None] & (column_k < DK)[None, :]
    inside_v = new[:, None] & (column_v < DV)[None, :]
    source = tl.where(new, tokens - start, 0)
    keys = tl.load(key + b * key_b + h * key_h + source[:, None] * key_n + column_k[None, :], mask=inside_k, other=0.0)
    values = tl.load(
        value + b * value_b + h * value_h + source[:, None] * value_n + column_v[None, :], mask=inside_v, other=0.0
    )
    row = tl.sum(page_rows(step, b, h, page + tl.zeros([1], tl.int64), tl.full([1], 1, tl.int1), H, SEGMENT), 0)
    table = tl.load(layer + HOME).to(tl.pointer_type(tl.int64))
    home = tl.load(table + row // ROWS) + (row % ROWS) * (PAGE * (DK + DV) * item)
    place_k = tl.arange(0, PAGE)[:, None] * DK + column_k[None, :]
    place_v = PAGE * DK + tl.arange(0, PAGE)[:, None] * DV + column_v[None, :]
    pointer = tl.multiple_of(home.to(tl.pointer_type(dtype)), 16)
    tl.store(pointer + place_k, keys, mask=inside_k)
    tl.store(pointer + place_v, values, mask=inside_v)
    num_slots = tl.load(layer + NUM_SLOTS)
    if num_slots > 0:
        slots = tl.load(layer + PAGE_SLOT).to(tl.pointer_type(tl.int32))
        slot = tl.load(slots + (b * H + h) * tl.load(layer + PAGE_SLOT_STRIDE) + page)
        if slot >= 0:
            frame = tl.load(layer + FRAMES) + ((b * H + h) * num_slots + slot) * (PAGE * (DK + DV) * item)
            resident = tl.multiple_of(frame.to(tl.pointer_type(dtype)), 16)
            tl.store(resident + place_k, keys, mask=inside_k)
            tl.store(resident + place_v, values, mask=inside_v)
    if (page + 1) * PAGE <= start + count:
        old = (tokens < start)[:, None] & (column_k < DK)[None, :]
        everything = tl.load(pointer + place_k, mask=old, other=0.0).to(tl.float32) + keys.to(tl.float32)
        valid = tokens >= 0
        if PADDED:
            valid = tokens_valid(step, b, tokens, tokens >= 0)
        weight = valid.to(tl.float32)
        landmark = tl.sum(everything * weight[:, None], 0) / tl.maximum(tl.sum(weight, 0), 1.0)
        norm = tl.maximum(tl.sqrt(tl.sum(landmark * landmark, 0)), 1e-8)
        norms = tl.maximum(tl.sqrt(tl.sum(everything * everything, 1)), 1e-8)
        cosine = tl.sum(everything * landmark[None, :], 1) / (norms * norm)
        worst = tl.min(tl.where(valid, cosine, 1.0), 0)
        size: tl.constexpr = SUMMARY.primitive_bitwidth // 8
        table = tl.load(layer + LANDMARK).to(tl.pointer_type(tl.int64))
        address = tl.load(table + row // ROWS) + (row % ROWS) * (DK * size)
        tl.store(address.to(tl.pointer_type(SUMMARY)) + column_k, landmark.to(SUMMARY), mask=column_k < DK)
        table = tl.load(layer + MIN_COSINE).to(tl.pointer_type(tl.int64))
        address = tl.load(table + row // ROWS) + (row % ROWS) * size
        tl.store(address.to(tl.pointer_type(SUMMARY)), worst.to(SUMMARY))
