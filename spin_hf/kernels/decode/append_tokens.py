"""Appends new tokens to their pages: in the backing store, in the page frame of a resident page, and in ShadowKV's summaries.

    append_page     the tokens of a call in one page; `score_kernel` calls it for the single token of a step
    append_kernel   all pages of a call

An int8 backing store gets encoded tokens. Page frames and summaries are then made from the decoded tokens. The specification is
`PageStore.append`, `ShadowKV.index`, `reference.quantize` and `storage/page_layout.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    BACKING, FRAMES, PAGE_SLOT, PAGE_SLOT_STRIDE, POSITION, SCALE_0, SUMMARY_0, SUMMARY_1, from_int8, own_layer,
    own_step, page_rows,
    rounded, scale_addresses, slots_of, to_int8, tokens_valid, triton_dtype, wait_for_launch,
)  # fmt: skip
from ..launch import Launch, LaunchShape, LayerBuffers, StepBuffers, dependent

_WARP_TOKENS = 8
"""Tokens that one warp appends."""


def append_tokens(
    launch: Launch, buffers: StepBuffers, layer: LayerBuffers, key: Tensor, value: Tensor, *, num_pages: int,
    summarizes: bool, shape: LaunchShape,
) -> None:  # fmt: skip
    """Write the tokens of a call to their `num_pages` pages.

    Args:
        key, value: [B, H, n, D]; the last dimension is contiguous.
        summarizes: whether ShadowKV's summaries of pages that become complete are written too.
    """
    launch(
        append_kernel, (num_pages, buffers.num_streams), buffers.step, layer.descriptor, key, value, key.shape[2],
        *key.stride()[:3], *value.stride()[:3], SUMMARY=triton_dtype(shape.dtype), QUANTIZED=shape.quantized[0],
        H=shape.num_heads, DK=shape.key_dim, DV=shape.value_dim, BLOCK_K=shape.block_k, BLOCK_V=shape.block_v,
        PAGE=shape.page_size, SEGMENT=shape.segment_pages, ROWS=shape.rows_per_chunk, PADDED=shape.padded,
        BACKING_BYTES=shape.backing_bytes, SUMMARISE=summarizes, APART=shape.apart,
        num_warps=max(1, shape.page_size // _WARP_TOKENS), **dependent(shape),
    )  # fmt: skip


@triton.jit
def append_page(
    step, layer, key, value, count, key_b, key_h, key_n, value_b, value_h, value_n, page, bh,
    SUMMARY: tl.constexpr, QUANTIZED: tl.constexpr, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr,
    PADDED: tl.constexpr, BACKING_BYTES: tl.constexpr, SUMMARISE: tl.constexpr,
):  # fmt: skip
    """Write the tokens of a call that belong to `page`. With SUMMARISE, also write the page's summaries if it is complete.

    Args:
        key, value: [B, H, count, D], the tokens from POSITION on; the last dimension is contiguous.
        SUMMARY: dtype of the lowest cosines, and of landmarks unless they are QUANTIZED.
        BACKING_BYTES: size of an int8 page in the backing store; 0 if backing pages have the dtype of the tokens.
    """
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    start = tl.load(step + POSITION)
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
    table = tl.load(layer + BACKING).to(tl.pointer_type(tl.int64))
    backing_row_bytes: tl.constexpr = BACKING_BYTES if BACKING_BYTES else PAGE * (DK + DV) * item
    backing = tl.load(table + row // ROWS) + (row % ROWS) * backing_row_bytes
    place_k = tl.arange(0, PAGE)[:, None] * DK + column_k[None, :]
    place_v = PAGE * DK + tl.arange(0, PAGE)[:, None] * DV + column_v[None, :]
    stored: tl.constexpr = tl.int8 if BACKING_BYTES else dtype
    pointer = tl.multiple_of(backing.to(tl.pointer_type(stored)), 16)
    if BACKING_BYTES:
        key_codes, key_scale = to_int8(keys)
        value_codes, value_scale = to_int8(values)
        tl.store(pointer + place_k, key_codes, mask=inside_k)
        tl.store(pointer + place_v, value_codes, mask=inside_v)
        place = scale_addresses(backing, PAGE, BACKING_BYTES) + tl.arange(0, PAGE)
        tl.store(place, key_scale, mask=new)
        tl.store(place + PAGE, value_scale, mask=new)
        keys = from_int8(key_codes, key_scale, dtype)
        values = from_int8(value_codes, value_scale, dtype)
    else:
        tl.store(pointer + place_k, keys, mask=inside_k)
        tl.store(pointer + place_v, values, mask=inside_v)
    num_slots, first_frame = slots_of(layer, b, h, H)
    if num_slots > 0:
        slots = tl.load(layer + PAGE_SLOT).to(tl.pointer_type(tl.int32))
        slot = tl.load(slots + (b * H + h) * tl.load(layer + PAGE_SLOT_STRIDE) + page)
        if slot >= 0:
            frame = tl.load(layer + FRAMES) + (first_frame + slot) * (PAGE * (DK + DV) * item)
            resident = tl.multiple_of(frame.to(tl.pointer_type(dtype)), 16)
            tl.store(resident + place_k, keys, mask=inside_k)
            tl.store(resident + place_v, values, mask=inside_v)
    if SUMMARISE and (page + 1) * PAGE <= start + count:
        old = (tokens < start)[:, None] & (column_k < DK)[None, :]
        if BACKING_BYTES:
            before = tl.load(place, mask=tokens < start, other=0.0)
            held = from_int8(tl.load(pointer + place_k, mask=old, other=0), before, dtype)
        else:
            held = tl.load(pointer + place_k, mask=old, other=0.0)
        everything = held.to(tl.float32) + keys.to(tl.float32)
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
        chunk = row // ROWS
        inside = row % ROWS
        base = tl.load(tl.load(layer + SUMMARY_0).to(tl.pointer_type(tl.int64)) + chunk)
        if QUANTIZED:
            largest = tl.max(tl.abs(landmark), 0)
            unit = tl.where(largest > 0.0, largest * (1 / 127), 1.0)  # as `reference.quantize`
            whole = rounded(landmark / unit)
            tl.store(
                (base + inside * DK).to(tl.pointer_type(tl.int8)) + column_k, whole.to(tl.int8), mask=column_k < DK
            )
            scales = tl.load(tl.load(layer + SCALE_0).to(tl.pointer_type(tl.int64)) + chunk)
            tl.store((scales + inside * 4).to(tl.pointer_type(tl.float32)), unit)
        else:
            address = (base + inside * (DK * size)).to(tl.pointer_type(SUMMARY))
            tl.store(address + column_k, landmark.to(SUMMARY), mask=column_k < DK)
        cosines = tl.load(tl.load(layer + SUMMARY_1).to(tl.pointer_type(tl.int64)) + chunk)
        tl.store((cosines + inside * size).to(tl.pointer_type(SUMMARY)), worst.to(SUMMARY))


@triton.jit
def append_kernel(
    step, layer, key, value, count, key_b, key_h, key_n, value_b, value_h, value_n,
    SUMMARY: tl.constexpr, QUANTIZED: tl.constexpr, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr,
    PADDED: tl.constexpr, BACKING_BYTES: tl.constexpr, SUMMARISE: tl.constexpr, APART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, b * H + h) runs `append_page` for the i-th page of a call."""
    wait_for_launch(PDL)
    step = own_step(step, tl.program_id(1) // H, APART)
    layer = own_layer(layer, tl.program_id(1) // H, APART)
    if APART and tl.load(step + POSITION) < 0:  # no sequence
        return
    page = tl.load(step + POSITION) // PAGE + tl.program_id(0)
    append_page(
        step, layer, key, value, count, key_b, key_h, key_n, value_b, value_h, value_n, page, tl.program_id(1),
        SUMMARY, QUANTIZED, H, DK, DV, BLOCK_K, BLOCK_V, PAGE, SEGMENT, ROWS, PADDED, BACKING_BYTES, SUMMARISE,
    )  # fmt: skip
