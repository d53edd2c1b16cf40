"""Operands of the scan over coded pages, made from the queries of a step, and the step's token appended.

    state    =  scale * log2(e) * q @ inverse                  [G, D] per (sequence, KV head)
    mean     =  state, multiplied with the means of units
    code     =  state * width, multiplied with the fields of codes, in place: a byte is b0 + b1 + 16 (b2 + b3), with b0 and b2
                of 0 to 3, b1 and b3 of 0, 4, 8, 12
                first D / 8 bytes    both fields of a number have its weight
                other bytes          the upper field has a quarter of its weight
    constant    scale * log2(e) * q . origin, and the product with codes of half their largest number

Logits are in powers of two, so that the scan needs no multiplication before `exp2`. With DIGITS operands are integers of two
digits (`common.digits`), and all fields have the same unit, so one accumulator takes their products. The specification is
`reference_scan.page_log_weights`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import BASIS_VECTORS, KEY_BASIS, POSITION, rounded, triton_dtype
from ..descriptor_fields import NUM_BINS
from ..launch import Launch, LaunchShape, LayerBuffers, ScanBuffers, StepBuffers, scan_columns
from .append_tokens import append_page

_LOG2_E = 1.4426950408889634


def project_queries(
    launch: Launch, buffers: StepBuffers, scan: ScanBuffers, layer: LayerBuffers, query: Tensor,
    new: tuple[Tensor, Tensor] | None, *, scale: float, shape: LaunchShape,
) -> None:  # fmt: skip
    """Make the operands of `scan_pages` for one query of a step, and append the step's token.

    Args:
        query: [B, H * G, 1, D]; the last dimension is contiguous.
        new: key and value [B, H, 1, D] of the token to append; None for none.
    """
    group = query.shape[1] // shape.num_heads
    columns, rows = scan_columns(group, shape)
    key, value = (query, query) if new is None else new
    launch(
        project_kernel, (buffers.num_streams, 1 + (new is not None)), buffers.step, layer.descriptor, query, scan.states,
        scan.mean_operand, scan.code_operand, scan.factors, buffers.histogram, *query.stride()[:2], scale * _LOG2_E, key,
        value, *key.stride()[:2], *value.stride()[:2], DIGITS=shape.multiplies_int8, DTYPE=triton_dtype(shape.dtype),
        H=shape.num_heads, G=group, COLUMNS=columns, ROWS_OF=rows, DK=shape.key_dim, DV=shape.value_dim,
        BLOCK_K=shape.block_k, BLOCK_V=shape.block_v, BYTES=scan.code_operand.shape[-1], PAGE=shape.page_size,
        SEGMENT=shape.segment_pages, ROWS=shape.rows_per_chunk, PADDED=shape.padded, BACKING_BYTES=shape.backing_bytes,
        BINS=NUM_BINS, num_warps=4,
    )  # fmt: skip


@triton.jit
def project_kernel(
    step, layer, query, states, mean_operand, code_operand, factors, histogram, query_b, query_h, scale,
    key, value, key_b, key_h, value_b, value_h,
    DIGITS: tl.constexpr, DTYPE: tl.constexpr, H: tl.constexpr, G: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS_OF: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BYTES: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
    BACKING_BYTES: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, 0) makes the operands of a KV head's queries; program (b * H + h, 1) appends the new token.

    Args:
        states, mean_operand, code_operand, factors: see `ScanBuffers`. Written.
        histogram: int32 [B * H, BINS]: zeroed for `rate_kernel`.
        scale: of attention scores, times log2(e).
        key, value: [B, H, 1, D], the new token, as for `append_page`.
        COLUMNS: query heads, padded; ROWS_OF: rows of the operands.
        BYTES: DK / 4, padded.
    """
    bh = tl.program_id(0)
    if tl.program_id(1) == 1:
        append_page(
            step, layer, key, value, 1, key_b, key_h, 0, value_b, value_h, 0, tl.load(step + POSITION) // PAGE, bh,
            DTYPE, False, H, DK, DV, BLOCK_K, BLOCK_V, PAGE, SEGMENT, ROWS, PADDED, BACKING_BYTES, False,
        )  # fmt: skip
    else:
        tl.store(histogram + bh * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
        vectors = tl.load(layer + BASIS_VECTORS).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * (2 * DK + 2 * DV)
        mine = states + bh * G * DK
        _project(query, query_b, query_h, tl.load(layer + KEY_BASIS), mine, bh, scale, DIGITS, DTYPE, H, G, DK, BLOCK_K)
        tl.debug_barrier()
        copies: tl.constexpr = ROWS_OF // COLUMNS
        copy = tl.arange(0, ROWS_OF)
        head = copy // copies
        real = (head < G)[:, None]
        group = tl.arange(0, COLUMNS)
        factor = factors + bh * 4 * COLUMNS + group
        column = tl.arange(0, BLOCK_K)
        inside = real & (column < DK)[None, :]
        rows = tl.load(mine + head[:, None] * DK + column[None, :], mask=inside, other=0.0)
        unit = _unit(tl.max(tl.abs(rows), 1), DIGITS)
        place = mean_operand + bh * ROWS_OF * BLOCK_K + copy[:, None] * BLOCK_K + column[None, :]
        tl.store(place, _operand(rows, unit, DIGITS, ROWS_OF).to(mean_operand.dtype.element_ty))
        tl.store(factor + 2 * COLUMNS, _per_head(unit, COLUMNS, copies))
        queries = tl.load(
            query + (bh // H).to(tl.int64) * query_b + ((bh % H) * G + head).to(tl.int64)[:, None] * query_h + column[None, :],
            mask=inside, other=0.0,
        ).to(tl.float32)  # fmt: skip
        origin = tl.load(vectors + column, mask=column < DK, other=0.0)
        tl.store(factor + 3 * COLUMNS, _per_head(tl.sum(queries * origin[None, :], 1) * scale, COLUMNS, copies))
        one = _weights(mine, vectors + DK, head, real, 0, DK, BYTES)
        two = _weights(mine, vectors + DK, head, real, 1, DK, BYTES)
        three = _weights(mine, vectors + DK, head, real, 2, DK, BYTES)
        four = _weights(mine, vectors + DK, head, real, 3, DK, BYTES)
        largest = tl.maximum(tl.maximum(tl.abs(one), tl.abs(two)), tl.maximum(tl.abs(three), tl.abs(four)))
        unit = _unit(tl.max(largest, 1), DIGITS)
        size: tl.constexpr = ROWS_OF * BYTES
        place = code_operand + bh * 4 * size + copy[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
        kind: tl.constexpr = code_operand.dtype.element_ty
        tl.store(place, _operand(one, unit, DIGITS, ROWS_OF).to(kind))
        tl.store(place + size, _operand(two, unit, DIGITS, ROWS_OF).to(kind))
        tl.store(place + 2 * size, _operand(three, unit, DIGITS, ROWS_OF).to(kind))
        tl.store(place + 3 * size, _operand(four, unit, DIGITS, ROWS_OF).to(kind))
        middle = tl.sum(1.5 * (_exact(one, unit, DIGITS) + _exact(three, unit, DIGITS)), 1)
        middle += tl.sum(6.0 * (_exact(two, unit, DIGITS) + _exact(four, unit, DIGITS)), 1)
        tl.store(factor, _per_head(unit, COLUMNS, copies))
        tl.store(factor + COLUMNS, _per_head(middle, COLUMNS, copies))


@triton.jit
def _project(
    query, query_b, query_h, basis, states, bh, scale,
    DIGITS: tl.constexpr, DTYPE: tl.constexpr, H: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write scale * q @ inverse, float32 [G, DK], for the queries of one (sequence, KV head)."""
    TILE: tl.constexpr = 32
    column = tl.arange(0, BLOCK_K)
    matrix = tl.multiple_of(basis.to(tl.pointer_type(DTYPE)) + bh.to(tl.int64) * DK * DK, 16)
    source = query + (bh // H).to(tl.int64) * query_b + ((bh % H) * G).to(tl.int64) * query_h
    for start in tl.static_range(0, DK, TILE):
        into = start + tl.arange(0, TILE)
        part = tl.load(
            matrix + column[:, None] * DK + into[None, :],
            mask=(column < DK)[:, None] & (into < DK)[None, :],
            other=0.0,
        )
        if tl.float32 == DTYPE or not DIGITS:  # without tensor cores Triton would unroll a product number by number
            for head in range(G):
                row = tl.load(source + head * query_h + column, mask=column < DK, other=0.0).to(tl.float32)
                product = tl.sum(row[:, None] * part.to(tl.float32), 0) * scale
                tl.store(states + head * DK + into, product, mask=into < DK)
        else:
            for group in tl.static_range(0, G, 16):
                heads = group + tl.arange(0, 16)
                rows = tl.load(
                    source + heads[:, None] * query_h + column[None, :],
                    mask=(heads < G)[:, None] & (column < DK)[None, :], other=0.0,
                ).to(DTYPE)  # fmt: skip
                product = tl.dot(rows, part) * scale
                place = states + heads[:, None] * DK + into[None, :]
                tl.store(place, product, mask=(heads < G)[:, None] & (into < DK)[None, :])


@triton.jit
def _weights(states, widths, head, real, FIELD: tl.constexpr, DK: tl.constexpr, BYTES: tl.constexpr):
    """What field FIELD of each byte is multiplied by, in place: float32 [rows, BYTES]."""
    byte = tl.arange(0, BYTES)
    fine = byte < DK // 8
    number = tl.where(fine, 2 * byte + FIELD // 2, 4 * byte - DK // 4 + FIELD)
    there = byte < DK // 4
    weight = tl.load(states + head[:, None] * DK + number[None, :], mask=real & there[None, :], other=0.0)
    width = tl.load(widths + number, mask=there, other=0.0)
    return weight * (width * tl.where(fine, 1.0, 0.25 if FIELD % 2 == 1 else 1.0))[None, :]


@triton.jit
def _unit(largest, DIGITS: tl.constexpr):
    """The value of an integer step for numbers up to `largest`; 1 without DIGITS."""
    return tl.maximum(largest, 1e-30) / 32512.0 if DIGITS else largest * 0.0 + 1.0


@triton.jit
def _exact(rows, unit, DIGITS: tl.constexpr):
    """The numbers that `_operand` stands for."""
    return rounded(rows / unit[:, None]) * unit[:, None] if DIGITS else rows


@triton.jit
def _operand(rows, unit, DIGITS: tl.constexpr, ROWS_OF: tl.constexpr):
    """Rows as digits: the high one in even rows, the low one in odd rows; see `common.digits`. Unchanged without DIGITS."""
    if DIGITS:
        whole = rounded(rows / unit[:, None])
        high = tl.floor((whole + 128.0) / 256.0)
        rows = tl.where((tl.arange(0, ROWS_OF) % 2 == 0)[:, None], high, whole - high * 256.0)
    return rows


@triton.jit
def _per_head(numbers, COLUMNS: tl.constexpr, COPIES: tl.constexpr):
    """One number per head, of numbers that are equal in all of its rows."""
    return tl.max(tl.reshape(numbers, (COLUMNS, COPIES)), 1)
