"""Codes of pages in a fitted basis, by units of four pages, in one pass over the pages.

encode_units        units of whole pages [S, H, n, P, D]                 -> summaries
encode_last_unit    the last unit of every sequence, in many layers, through descriptors, for pages that captured steps complete

    tile of T units, n = 16 T tokens
    keys [n, D]    -> coordinates, by the field of a byte that codes them: 4 x [n, D / 4], and 1 x [n, D / 4] without a code
                   -> mean of each unit, int8;  minus it: codes and scale of each token
    values [n, Dv] -> the same coordinates, mean of each page -> codes and scale of each page

Program (.., .., 0) encodes keys, program (.., .., 1) values. Both kernels do the same for a unit, in tiles of the same size, so
their results are equal. A matrix is loaded once per tile, with its columns in the order of the fields, so that numbers of one
byte are in one thread. The specification is `attention/methods/fitted_codes.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device_limits
from ..common import (
    BACKING, BASIS_VECTORS, KEY_FORWARD, POSITION, SCALE_0, SUMMARY_0, SUMMARY_1, SUMMARY_2, SUMMARY_3, SUMMARY_4, VALUE_BASIS,
    from_int8, own_layer, own_step, page_rows, rounded, scale_addresses, tokens_valid, triton_dtype,
)  # fmt: skip
from ..compile_ahead import launch_now
from ..launch import Launch, LaunchShape, power_of_two
from ..reference_scan import UNIT_PAGES
from .code_levels import encode_levels, numbers_of

PAGES = tl.constexpr(UNIT_PAGES)
_TILE_UNITS = 4
"""Units per tile, where shared memory has room: the matrix is loaded for 64 tokens at a time."""
_TILES = 4
"""Tiles per program of `encode_units`."""


def encode_units(
    keys: Tensor, values: Tensor, valid: Tensor, key_basis: tuple[Tensor, Tensor, Tensor],
    value_basis: tuple[Tensor, Tensor, Tensor], *, launch: Launch = launch_now,
) -> dict[str, Tensor] | None:  # fmt: skip
    """As `fitted_codes.encode_by_formulas`; None if the GPU has too little shared memory for vectors of this size.

    Args:
        keys, values: [S, H, n, P, D] and [S, H, n, P, Dv]; the last two dimensions are contiguous.
        valid: [S, 1, n, P], bool.
        key_basis, value_basis: origin [S, H, D], matrix [S, H, D, D] and widths [S, H, D].
    """
    size, heads, count, page, key_dim = keys.shape
    value_dim, device, dtype = values.shape[-1], keys.device, keys.dtype
    tile = tile_units(
        max(key_dim, value_dim), dtype.itemsize, device_limits.shared_memory(device), device_limits.multiplies(device)
    )
    if not tile:
        return None
    units, each = -(-count // UNIT_PAGES), (size, heads)

    def new(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return torch.empty((*each, *shape), dtype=kind, device=device)

    mean, unit = new((units, key_dim), torch.int8), new((units,), torch.float32)
    made = {
        "codes": new((count, page, key_dim // 4), torch.uint8), "scale": new((count, page), torch.bfloat16),
        "value": new((count, value_dim // 4), torch.uint8), "value_scale": new((count,), torch.bfloat16),
    }  # fmt: skip
    if mean.numel():
        valid = valid.expand(size, 1, count, page).contiguous().view(torch.uint8)
        bases = [part.contiguous() for part in (*key_basis, *value_basis)]
        bases[1], bases[4] = bases[1].to(dtype), bases[4].to(dtype)
        with torch.cuda.device_of(keys):
            launch(
                encode_units_kernel, (triton.cdiv(units, tile * _TILES), size * heads, 2), keys, values, valid, *bases, mean,
                unit, *made.values(), count, *keys.stride()[:3], *values.stride()[:3], H=heads, DK=key_dim, DV=value_dim,
                PAGE=page, UNITS=tile, TILES=_TILES, num_warps=2 * tile, **_blocks(key_dim, value_dim),
            )  # fmt: skip
    return {"mean": mean * unit.unsqueeze(-1), **made}


def encode_last_unit(
    launch: Launch, step: Tensor, layers: Tensor, *, batch_size: int, first: int, num_pages: int, shape: LaunchShape
) -> bool:
    """Write the summaries of pages [first, first + num_pages), the last unit of each sequence, in many layers.

    Args:
        step: the step descriptor.
        layers: int64 [L]: addresses of the layers' descriptors.
        first, num_pages: not read if sequences have descriptors of their own; each has its own unit then.
    Returns:
        False if the GPU has too little shared memory; nothing is written then.
    """
    tile = tile_units(
        max(shape.key_dim, shape.value_dim), shape.dtype.itemsize, shape.shared_memory, shape.multiplies_int8
    )
    if not tile:
        return False
    launch(
        encode_last_unit_kernel, (batch_size * shape.num_heads, layers.shape[0], 2), step, layers, first, num_pages,
        H=shape.num_heads, DK=shape.key_dim, DV=shape.value_dim, PAGE=shape.page_size, SEGMENT=shape.segment_pages,
        ROWS=shape.rows_per_chunk, PADDED=shape.padded, DTYPE=triton_dtype(shape.dtype), BACKING_BYTES=shape.backing_bytes,
        UNITS=tile, APART=shape.apart, num_warps=2 * tile, **_blocks(shape.key_dim, shape.value_dim),
    )  # fmt: skip
    return True


def tile_units(dim: int, itemsize: int, room: int, multiplies: bool) -> int:
    """Units per tile; 0 if a program has too little shared memory: for a part of the matrix, a tile, and a second copy of both.

    Args:
        dim: the longer of the vectors.
        multiplies: whether products are made by tensor cores. Without them both operands are in registers too.
    """
    for units in (_TILE_UNITS, 1) if multiplies else (1,):
        if 2 * power_of_two(dim) * (max(16, power_of_two(dim // 4)) + units * UNIT_PAGES * 4) * itemsize <= room:
            return units
    return 0


def _blocks(key_dim: int, value_dim: int) -> dict[str, int]:
    """Padded sizes of vectors and of their codes."""
    return {
        "BLOCK_K": max(16, power_of_two(key_dim)), "BLOCK_V": max(16, power_of_two(value_dim)),
        "KEY_BYTES": max(16, power_of_two(key_dim // 4)), "VALUE_BYTES": max(16, power_of_two(value_dim // 4)),
    }  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def encode_units_kernel(
    keys, values, valid, key_origin, key_matrix, key_widths, value_origin, value_matrix, value_widths,
    mean, unit, codes, scale, value_codes, value_scale, count, key_s, key_h, key_n, value_s, value_h, value_n,
    H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, UNITS: tl.constexpr, TILES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr,
):  # fmt: skip
    """Program (i, s * H + h, part) encodes TILES tiles of UNITS units.

    Args:
        keys, values: [S, H, count, PAGE, D], with these strides; valid: uint8 [S, 1, count, PAGE].
        key_origin to value_widths: contiguous, matrices in the dtype of the keys, the others float32.
        mean: int8 [S, H, units, DK]; unit: float32 [S, H, units]; codes: uint8 [S, H, count, PAGE, DK / 4];
            scale: bfloat16 [S, H, count, PAGE]; value_codes, value_scale: likewise for each page. Written.
    """
    sh = tl.program_id(1).to(tl.int64)
    s = sh // H
    h = sh % H
    units = tl.cdiv(count, PAGES)
    first = tl.program_id(0) * TILES * UNITS
    for index in range(first, tl.minimum(first + TILES * UNITS, units), UNITS):
        token = tl.arange(0, UNITS * PAGES * PAGE)
        page = index * PAGES + token // PAGE
        there = page < count
        present = tl.load(valid + s * count * PAGE + index * PAGES * PAGE + token, mask=there, other=0) != 0
        at = sh * count + index * PAGES
        num_pages = count - index * PAGES
        if tl.program_id(2) == 0:
            key = _vectors(keys + s * key_s + h * key_h, page, key_n, token % PAGE, present, DK, BLOCK_K)
            _encode_keys(
                key, present, key_matrix + sh * DK * DK, key_origin + sh * DK, key_widths + sh * DK,
                mean + (sh * units + index) * DK, unit + sh * units + index, codes + at * PAGE * (DK // 4),
                scale + at * PAGE, num_pages, DK, BLOCK_K, KEY_BYTES, PAGE, UNITS, False,
            )  # fmt: skip
        else:
            value = _vectors(values + s * value_s + h * value_h, page, value_n, token % PAGE, present, DV, BLOCK_V)
            _encode_values(
                value, present, value_matrix + sh * DV * DV, value_origin + sh * DV, value_widths + sh * DV,
                value_codes + at * (DV // 4), value_scale + at, num_pages, DV, BLOCK_V, VALUE_BYTES, PAGE, UNITS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["first", "num_pages"])
def encode_last_unit_kernel(
    step, layers, first, num_pages, H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr, BACKING_BYTES: tl.constexpr,
    UNITS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, KEY_BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, i, part) encodes pages [first, first + num_pages) of the i-th layer, the first unit of a tile.

    With APART, `first` and `num_pages` are those of the unit in which the step of sequence b completed a page, if it did.

    Args:
        layers: int64 [L]: addresses of the layers' descriptors.
        BACKING_BYTES: size of an int8 page in the backing store; 0 if backing pages are of DTYPE.
    """
    bh = tl.program_id(0).to(tl.int64)
    b = bh // H
    h = bh % H
    step = own_step(step, b, APART)
    layer = own_layer(tl.load(layers + tl.program_id(1)).to(tl.pointer_type(tl.int64)), b, APART)
    if APART:
        length = tl.load(step + POSITION) + 1
        if (length == 0) | (length % PAGE != 0):  # no sequence, or no page was completed
            return
        first = (length // PAGE - 1) // PAGES * PAGES
        num_pages = length // PAGE - first
    token = tl.arange(0, UNITS * PAGES * PAGE)
    there = token // PAGE < num_pages
    present = there
    if PADDED:
        present = tokens_valid(step, b, first * PAGE + token, there)
    row = tl.sum(page_rows(step, b, h, first + tl.zeros([1], tl.int64), tl.full([1], 1, tl.int1), H, SEGMENT), 0)
    chunk = row // ROWS
    inside = row % ROWS
    item: tl.constexpr = DTYPE.primitive_bitwidth // 8
    row_bytes: tl.constexpr = BACKING_BYTES if BACKING_BYTES else PAGE * (DK + DV) * item
    stored: tl.constexpr = tl.int8 if BACKING_BYTES else DTYPE
    page = tl.load(tl.load(layer + BACKING).to(tl.pointer_type(tl.int64)) + chunk) + inside * row_bytes
    pages = page + (token // PAGE) * row_bytes
    vectors = tl.load(layer + BASIS_VECTORS).to(tl.pointer_type(tl.float32)) + bh * (2 * DK + 2 * DV)
    scales = pages.to(tl.pointer_type(tl.float32))
    if BACKING_BYTES:
        scales = scale_addresses(pages, PAGE, BACKING_BYTES) + token % PAGE
    if tl.program_id(2) == 0:
        key = _vectors(pages.to(tl.pointer_type(stored)), token * 0, 0, token % PAGE, present, DK, BLOCK_K)
        if BACKING_BYTES:
            key = from_int8(key, tl.load(scales, mask=present, other=0.0), DTYPE)
        _encode_keys(
            key, present, tl.load(layer + KEY_FORWARD).to(tl.pointer_type(DTYPE)) + bh * DK * DK, vectors, vectors + DK,
            _summary(layer, SUMMARY_0, chunk, inside // PAGES, DK).to(tl.pointer_type(tl.int8)),
            _summary(layer, SCALE_0, chunk, inside // PAGES, 4).to(tl.pointer_type(tl.float32)),
            _summary(layer, SUMMARY_1, chunk, inside, PAGE * (DK // 4)).to(tl.pointer_type(tl.uint8)),
            _summary(layer, SUMMARY_2, chunk, inside, PAGE * 2).to(tl.pointer_type(tl.bfloat16)),
            num_pages, DK, BLOCK_K, KEY_BYTES, PAGE, UNITS, True,
        )  # fmt: skip
    else:
        start = (pages + PAGE * DK * (stored.primitive_bitwidth // 8)).to(tl.pointer_type(stored))
        value = _vectors(start, token * 0, 0, token % PAGE, present, DV, BLOCK_V)
        if BACKING_BYTES:
            value = from_int8(value, tl.load(scales + PAGE, mask=present, other=0.0), DTYPE)
        _encode_values(
            value, present, tl.load(layer + VALUE_BASIS).to(tl.pointer_type(DTYPE)) + bh * DV * DV, vectors + 2 * DK,
            vectors + 2 * DK + DV, _summary(layer, SUMMARY_3, chunk, inside, DV // 4).to(tl.pointer_type(tl.uint8)),
            _summary(layer, SUMMARY_4, chunk, inside, 2).to(tl.pointer_type(tl.bfloat16)),
            num_pages, DV, BLOCK_V, VALUE_BYTES, PAGE, UNITS,
        )  # fmt: skip


@triton.jit
def _summary(layer, FIELD: tl.constexpr, chunk, inside, ROW_BYTES: tl.constexpr):
    """The address of a row of a summary's array."""
    return tl.load(tl.load(layer + FIELD).to(tl.pointer_type(tl.int64)) + chunk) + inside * ROW_BYTES


@triton.jit
def _vectors(base, page, stride, place, present, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the vectors [n, BLOCK_D] of a tile's tokens; zeros for tokens that are not present.

    Args:
        base: a pointer, or one for each token.
    """
    column = tl.arange(0, BLOCK_D)
    first = base + page.to(tl.int64) * stride + place * D
    return tl.load(first[:, None] + column[None, :], mask=present[:, None] & (column < D)[None, :], other=0)


@triton.jit
def _encode_keys(
    x, present, matrix, origin, widths, mean, unit, codes, scale, num_pages, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BYTES: tl.constexpr, PAGE: tl.constexpr, UNITS: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Encode the keys of UNITS units, [n, BLOCK_D], and store them at the places of the first unit and of those behind it.

    Args:
        num_pages: pages that there are from the first unit on; others are not written.
        STORED: whether `unit` is rounded as if the decoded mean were encoded again.
    """
    one, width_one = _coordinates(x, matrix, origin, widths, 0, D, BLOCK_D, BYTES)
    two, width_two = _coordinates(x, matrix, origin, widths, 1, D, BLOCK_D, BYTES)
    three, width_three = _coordinates(x, matrix, origin, widths, 2, D, BLOCK_D, BYTES)
    four, width_four = _coordinates(x, matrix, origin, widths, 3, D, BLOCK_D, BYTES)
    rest, _ = _coordinates(x, matrix, origin, widths, 4, D, BLOCK_D, BYTES)
    tokens = tl.maximum(tl.sum(tl.reshape(present.to(tl.float32), (UNITS, PAGES * PAGE)), 1), 1.0)
    real = present[:, None]
    one = tl.where(real, one, 0.0)
    two = tl.where(real, two, 0.0)
    three = tl.where(real, three, 0.0)
    four = tl.where(real, four, 0.0)
    of_one = _unit_means(one, tokens, UNITS)
    of_two = _unit_means(two, tokens, UNITS)
    of_three = _unit_means(three, tokens, UNITS)
    of_four = _unit_means(four, tokens, UNITS)
    of_rest = _unit_means(tl.where(real, rest, 0.0), tokens, UNITS)
    largest = tl.maximum(tl.maximum(tl.abs(of_one), tl.abs(of_two)), tl.maximum(tl.abs(of_three), tl.abs(of_four)))
    largest = tl.max(tl.maximum(largest, tl.abs(of_rest)), 1)
    size = tl.where(largest > 0.0, largest * (1 / 127), 1.0)  # as `reference.quantize`
    of_one = rounded(of_one / size[:, None])
    of_two = rounded(of_two / size[:, None])
    of_three = rounded(of_three / size[:, None])
    of_four = rounded(of_four / size[:, None])
    _store_means(mean, of_one, num_pages, 0, D, BYTES, UNITS)
    _store_means(mean, of_two, num_pages, 1, D, BYTES, UNITS)
    _store_means(mean, of_three, num_pages, 2, D, BYTES, UNITS)
    _store_means(mean, of_four, num_pages, 3, D, BYTES, UNITS)
    _store_means(mean, rounded(of_rest / size[:, None]), num_pages, 4, D, BYTES, UNITS)
    index = tl.arange(0, UNITS)
    stored = tl.where(largest > 0.0, (size * 127.0) * (1 / 127), 1.0) if STORED else size
    tl.store(unit + index, stored, mask=index * PAGES < num_pages)
    packed, found = encode_levels(
        one - _of_tokens(of_one * size[:, None], PAGE), two - _of_tokens(of_two * size[:, None], PAGE),
        three - _of_tokens(of_three * size[:, None], PAGE), four - _of_tokens(of_four * size[:, None], PAGE),
        width_one, width_two, width_three, width_four, D, BYTES,
    )  # fmt: skip
    token = tl.arange(0, UNITS * PAGES * PAGE)
    byte = tl.arange(0, BYTES)
    there = token // PAGE < num_pages
    tl.store(codes + token[:, None] * (D // 4) + byte[None, :], packed, mask=there[:, None] & (byte < D // 4)[None, :])
    tl.store(scale + token, tl.where(present, found, -1.0).to(tl.bfloat16), mask=there)


@triton.jit
def _unit_means(numbers, tokens, UNITS: tl.constexpr):
    """Means [UNITS, BYTES] of [n, BYTES], for so many `tokens` [UNITS] that are not zeros."""
    apart = tl.reshape(numbers, (UNITS, numbers.shape[0] // UNITS, numbers.shape[1]))
    return tl.sum(apart, 1) / tokens[:, None]


@triton.jit
def _of_tokens(means, PAGE: tl.constexpr):
    """Numbers of units [UNITS, BYTES] for each of their tokens, [n, BYTES]."""
    each = tl.broadcast_to(means[:, None, :], (means.shape[0], PAGES * PAGE, means.shape[1]))
    return tl.reshape(each, (means.shape[0] * PAGES * PAGE, means.shape[1]))


@triton.jit
def _encode_values(
    x, present, matrix, origin, widths, codes, scale, num_pages, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BYTES: tl.constexpr, PAGE: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Encode the mean values of the pages of UNITS units, from values [n, BLOCK_D], as `_encode_keys`."""
    real = tl.reshape(present.to(tl.float32), (UNITS * PAGES, PAGE))
    tokens = tl.maximum(tl.sum(real, 1), 1.0)
    one, width_one = _mean_coordinates(x, tokens, matrix, origin, widths, 0, D, BLOCK_D, BYTES, PAGE)
    two, width_two = _mean_coordinates(x, tokens, matrix, origin, widths, 1, D, BLOCK_D, BYTES, PAGE)
    three, width_three = _mean_coordinates(x, tokens, matrix, origin, widths, 2, D, BLOCK_D, BYTES, PAGE)
    four, width_four = _mean_coordinates(x, tokens, matrix, origin, widths, 3, D, BLOCK_D, BYTES, PAGE)
    packed, found = encode_levels(one, two, three, four, width_one, width_two, width_three, width_four, D, BYTES)
    page = tl.arange(0, UNITS * PAGES)
    byte = tl.arange(0, BYTES)
    there = page < num_pages
    tl.store(codes + page[:, None] * (D // 4) + byte[None, :], packed, mask=there[:, None] & (byte < D // 4)[None, :])
    tl.store(scale + page, found.to(tl.bfloat16), mask=there)


@triton.jit
def _projected(
    x, matrix, origin, widths, FIELD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BYTES: tl.constexpr
):
    """Of the numbers of FIELD: vectors [n, BLOCK_D] times the matrix, [n, BYTES], the origin likewise, widths."""
    number, there = numbers_of(FIELD, D, BYTES)
    row = tl.arange(0, BLOCK_D)
    inside = (row < D)[:, None] & there[None, :]
    part = tl.load(matrix + row[:, None] * D + number[None, :], mask=inside, other=0.0)
    middle = tl.sum(part.to(tl.float32) * tl.load(origin + row, mask=row < D, other=0.0)[:, None], 0)
    width = tl.load(widths + number, mask=there, other=1.0)
    return tl.dot(x.to(part.dtype), part, input_precision="ieee"), middle, width


@triton.jit
def _coordinates(
    x, matrix, origin, widths, FIELD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BYTES: tl.constexpr
):
    """Coordinates [n, BYTES] of vectors [n, BLOCK_D], those of FIELD, and their widths [BYTES]."""
    found, middle, width = _projected(x, matrix, origin, widths, FIELD, D, BLOCK_D, BYTES)
    return found - middle[None, :], width


@triton.jit
def _mean_coordinates(
    x, tokens, matrix, origin, widths, FIELD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BYTES: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """The same of the means of pages, of which each has so many `tokens`: [pages, BYTES]."""
    found, middle, width = _projected(x, matrix, origin, widths, FIELD, D, BLOCK_D, BYTES)
    sums = tl.sum(tl.reshape(found, (found.shape[0] // PAGE, PAGE, BYTES)), 1)
    return sums / tokens[:, None] - middle[None, :], width


@triton.jit
def _store_means(
    mean, numbers, num_pages, FIELD: tl.constexpr, D: tl.constexpr, BYTES: tl.constexpr, UNITS: tl.constexpr
):
    """Store those numbers [UNITS, BYTES] of the means that belong to FIELD."""
    number, there = numbers_of(FIELD, D, BYTES)
    if FIELD == 1 or FIELD == 3:  # numbers of four bits have two fields
        there = there & (tl.arange(0, BYTES) >= D // 8)
    unit = tl.arange(0, UNITS)
    place = mean + unit[:, None] * D + number[None, :]
    tl.store(place, numbers.to(tl.int8), mask=(unit * PAGES < num_pages)[:, None] & there[None, :])
