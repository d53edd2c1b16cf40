"""Operands of the scan over coded pages, made from the queries of a step.

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

from ..common import (
    BASIS_VECTORS, KEY_BASIS, POSITION, own_layer, own_step, rounded, triton_dtype, wait_for_launch,
)  # fmt: skip
from ..descriptor_fields import NUM_BINS
from ..launch import Launch, LaunchShape, LayerBuffers, ScanBuffers, StepBuffers, scan_columns, dependent
from .coded_fields import multiplied_at

_LOG2_E = 1.4426950408889634


def project_queries(
    launch: Launch, buffers: StepBuffers, scan: ScanBuffers, layer: LayerBuffers, query: Tensor, *,
    scale: float, shape: LaunchShape,
) -> None:  # fmt: skip
    """Make the operands of `scan_pages` for one query of a step.

    Args:
        query: [B, H * G, 1, D]; the last dimension is contiguous.
    """
    group = query.shape[1] // shape.num_heads
    columns, rows = scan_columns(group, shape)
    launch(
        project_kernel, (buffers.num_streams,), buffers.step, layer.descriptor, query, scan.states,
        scan.mean_operand, scan.code_operand, scan.factors, buffers.histogram, *query.stride()[:2], scale * _LOG2_E,
        DIGITS=shape.multiplies_int8, DTYPE=triton_dtype(shape.dtype), H=shape.num_heads, G=group, COLUMNS=columns,
        ROWS_OF=rows, DK=shape.key_dim, DV=shape.value_dim, BLOCK_K=shape.block_k, BYTES=scan.code_operand.shape[-1],
        BINS=NUM_BINS, APART=shape.apart, num_warps=8, **dependent(shape),
    )  # fmt: skip


@triton.jit
def project_kernel(
    step, layer, query, states, mean_operand, code_operand, factors, histogram, query_b, query_h, scale,
    DIGITS: tl.constexpr, DTYPE: tl.constexpr, H: tl.constexpr, G: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS_OF: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr,
    BYTES: tl.constexpr, BINS: tl.constexpr, APART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program b * H + h makes the operands of a KV head's queries.

    Args:
        states, mean_operand, code_operand, factors: see `ScanBuffers`. Written; `states` only without tensor cores.
        histogram: int32 [B * H, BINS]: zeroed for `rate_kernel`.
        scale: of attention scores, times log2(e).
        COLUMNS: query heads, padded; ROWS_OF: rows of the operands.
        BYTES: DK / 4, padded.
    """
    wait_for_launch(PDL)
    bh = tl.program_id(0)
    step = own_step(step, bh // H, APART)
    layer = own_layer(layer, bh // H, APART)
    if APART and tl.load(step + POSITION) < 0:  # no sequence
        return
    tl.store(histogram + bh * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
    vectors = tl.load(layer + BASIS_VECTORS).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * (2 * DK + 2 * DV)
    basis = tl.load(layer + KEY_BASIS)
    copies: tl.constexpr = ROWS_OF // COLUMNS
    rows_at: tl.constexpr = ROWS_OF if ROWS_OF > 16 else 16
    copy = tl.arange(0, rows_at)
    head = copy // copies
    column = tl.arange(0, BLOCK_K)
    byte = tl.arange(0, 4 * BYTES) % BYTES
    field = tl.arange(0, 4 * BYTES) // BYTES
    coded = byte < DK // 4
    number = tl.where(byte < DK // 8, 2 * byte + field // 2, 4 * byte - DK // 4 + field)  # the field's coordinate
    number = tl.minimum(number, DK - 1)
    source = query + (bh // H).to(tl.int64) * query_b + ((bh % H) * G + head).to(tl.int64)[:, None] * query_h
    inside = (head < G)[:, None] & (column < DK)[None, :]
    queries = tl.load(source + column[None, :], mask=inside, other=0.0)
    if tl.float32 == DTYPE or not DIGITS:
        mine = states + bh * G * DK
        _project(query, query_b, query_h, basis, mine, bh, scale, DTYPE, H, G, DK, BLOCK_K)
        tl.debug_barrier()
        rows = tl.load(mine + head[:, None] * DK + column[None, :], mask=inside, other=0.0)
        origin = tl.load(vectors + column, mask=column < DK, other=0.0)
        widths = tl.load(vectors + DK + number, mask=coded, other=0.0)
    else:
        PART: tl.constexpr = BLOCK_K if BLOCK_K < 128 else 128
        matrix = tl.multiple_of(basis.to(tl.pointer_type(DTYPE)) + bh.to(tl.int64) * DK * DK, 16)
        into = tl.arange(0, PART)[:, None]
        part = tl.load(matrix + into * DK + column[None, :], mask=(into < DK) & (column < DK)[None, :], other=0.0)
        # All loads before the first product.
        origin = tl.load(vectors + column, mask=column < DK, other=0.0)
        widths = tl.load(vectors + DK + number, mask=coded, other=0.0)
        if PART == BLOCK_K:
            rows = tl.dot(queries.to(DTYPE), part) * scale
        else:
            rows = tl.zeros([rows_at, BLOCK_K], tl.float32)
            for start in tl.static_range(0, BLOCK_K, PART):
                into = start + tl.arange(0, PART)
                part = tl.load(
                    matrix + into[:, None] * DK + column[None, :],
                    mask=(into < DK)[:, None] & (column < DK)[None, :], other=0.0,
                )  # fmt: skip
                some = tl.load(source + into[None, :], mask=(head < G)[:, None] & (into < DK)[None, :], other=0.0)
                rows = tl.dot(some.to(DTYPE), part, acc=rows)
            rows = rows * scale
    group = tl.arange(0, rows_at // copies)
    factor = factors + bh * 4 * COLUMNS + group
    stored = group < COLUMNS
    written = (copy < ROWS_OF)[:, None]
    constant = tl.sum(queries.to(tl.float32) * origin[None, :], 1) * scale
    unit = _unit(tl.max(tl.abs(rows), 1), DIGITS)
    place = mean_operand + bh * ROWS_OF * BLOCK_K + copy[:, None] * BLOCK_K + multiplied_at(column)[None, :]
    tl.store(place, _operand(rows, unit, DIGITS, rows_at).to(mean_operand.dtype.element_ty), mask=written)
    tl.store(factor + 2 * COLUMNS, _per_head(unit, copies), mask=stored)
    tl.store(factor + 3 * COLUMNS, _per_head(constant, copies), mask=stored)
    # What each field is multiplied by, in place; 0 for bytes of padding.
    weights = tl.gather(rows, tl.broadcast_to(number[None, :], (rows_at, 4 * BYTES)), 1)
    weights = weights * (widths * tl.where((byte >= DK // 8) & (field % 2 == 1), 0.25, 1.0))[None, :]
    unit = _unit(tl.max(tl.abs(weights), 1), DIGITS)
    place = code_operand + bh * 4 * ROWS_OF * BYTES + field[None, :] * (ROWS_OF * BYTES) + copy[:, None] * BYTES
    operand = _operand(weights, unit, DIGITS, rows_at).to(code_operand.dtype.element_ty)
    tl.store(place + multiplied_at(byte)[None, :], operand, mask=written)
    middle = tl.where(field % 2 == 1, 6.0, 1.5)[None, :] * _exact(weights, unit, DIGITS)
    tl.store(factor, _per_head(unit, copies), mask=stored)
    tl.store(factor + COLUMNS, _per_head(tl.sum(middle, 1), copies), mask=stored)


@triton.jit
def _project(
    query, query_b, query_h, basis, states, bh, scale,
    DTYPE: tl.constexpr, H: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write scale * q @ inverse, float32 [G, DK], for the queries of one (sequence, KV head), without tensor cores."""
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
        for head in range(G):  # Triton would unroll a product number by number
            row = tl.load(source + head * query_h + column, mask=column < DK, other=0.0).to(tl.float32)
            product = tl.sum(row[:, None] * part.to(tl.float32), 0) * scale
            tl.store(states + head * DK + into, product, mask=into < DK)


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
def _per_head(numbers, COPIES: tl.constexpr):
    """One number per head, of numbers that are equal in all of its rows."""
    return tl.max(tl.reshape(numbers, (numbers.shape[0] // COPIES, COPIES)), 1)
