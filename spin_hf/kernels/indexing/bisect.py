"""Orders points as `reference_clustering.bisect`, on a GPU: nodes of a binary tree are split at the median of their main axis.

    nodes of more than 1,024 points   gram         products [D, D] of the points, one matrix per 1,024 points
                                      axis         main axis [D] of each node, from these
                                      along        projection of each point
                                      halve        the lower half before the upper half
    nodes of 128 to 1,024 points      halve_part   all of this in one program
    nodes of up to 64 points          halve_all    all levels at once, from products of the points with each other

A level of large nodes reads the keys twice. Nothing is sorted, and order within a half stays. Sums and projections are matrix
products too, because Triton prefetches only the loads of `tl.dot`. float32 uses tf32 products: an order needs no more
precision, and exact products, without tensor cores, take minutes to compile. The specification is `reference_clustering.halve`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import triton_dtype
from ..compile_ahead import compile_ahead, launch_now
from ..device_guard import on_device_of
from ..launch import Launch

_CHUNK, _TILE, _GROUP = 1024, 128, 64


def bisect(points: Tensor, page_size: int) -> Tensor:
    """As `reference_clustering.bisect`, for points [R, n, D].

    D is at most 128: a larger [D, D] matrix does not fit the registers.
    """
    points = points.contiguous()
    variants = (points.device, points.dtype, points.shape[2], page_size, triton.next_power_of_2(points.shape[1]))
    with on_device_of(points):
        if variants not in _compiled and compile_ahead(lambda launch: _launches(launch, points, page_size)):
            _compiled.add(variants)
        return _launches(launch_now, points, page_size).long()


_compiled: set[tuple[object, ...]] = set()


def _launches(launch: Launch, points: Tensor, page_size: int) -> Tensor:
    """The order of the points, int32 [R, n]."""
    rows, count, dim = points.shape
    order = torch.arange(count, dtype=torch.int32, device=points.device).expand(rows, -1).contiguous()
    spare = torch.empty_like(order)
    along = torch.empty((rows, count), dtype=torch.float32, device=points.device)
    shape = {"D": dim, "BLOCK_D": max(16, triton.next_power_of_2(dim))}
    size = page_size
    while size < count:
        size *= 2
    while size > max(_GROUP, page_size):
        nodes = triton.cdiv(count, size)
        if size > _CHUNK:
            chunks = triton.cdiv(count, _CHUNK)
            grams = along.new_empty((rows, chunks, dim + 1, dim))
            axes = along.new_empty((rows, nodes, dim))
            launch(
                gram_kernel, (chunks, rows), points, order, grams, count, CHUNK=_CHUNK, TILE=_TILE, num_warps=8, **shape
            )
            launch(
                axis_kernel, (nodes, rows), grams, axes, count, size, CHUNK=_CHUNK, DTYPE=triton_dtype(points.dtype),
                num_warps=8, **shape,
            )  # fmt: skip
            launch(
                along_kernel, (triton.cdiv(count, _TILE), rows), points, order, axes, along, count, size, TILE=_TILE,
                num_warps=8, **shape,
            )  # fmt: skip
            launch(halve_kernel, (nodes, rows), order, along, spare, count, SIZE=size, num_warps=8)
        else:
            launch(
                halve_part_kernel, (nodes, rows), points, order, along, spare, count, size, TILE=_TILE // 2,
                SIZE=max(size, _CHUNK) if size > 2 * _GROUP else size, num_warps=4, **shape,
            )  # fmt: skip
        order, spare, size = spare, order, size // 2
    if size > page_size:
        launch(
            halve_all_kernel, (triton.cdiv(count, _GROUP), rows), points, order, count, FIRST=size, PAGE=page_size,
            GROUP=_GROUP, num_warps=4, **shape,
        )  # fmt: skip
    return order


@triton.jit
def _points(points, order, place, stop, column, D: tl.constexpr):
    """Points [places, BLOCK_D] at the given places of a row; zeros from `stop` on."""
    there = place < stop
    token = tl.load(order + place, mask=there, other=0)
    return tl.load(
        points + token[:, None].to(tl.int64) * D + column[None, :],
        mask=there[:, None] & (column < D)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def _gram(points, order, first, stop, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr):
    """Gram matrix [BLOCK_D, BLOCK_D] and sum [BLOCK_D] of the points at places [first, stop) of a row."""
    dtype: tl.constexpr = points.dtype.element_ty
    column = tl.arange(0, BLOCK_D)
    gram = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    totals = tl.zeros([BLOCK_D, 16], tl.float32)
    ones = tl.full([TILE, 16], 1.0, dtype)
    for begin in range(first, stop, TILE):
        x = tl.trans(_points(points, order, begin + tl.arange(0, TILE), stop, column, D))
        gram = tl.dot(x, tl.trans(x), gram, input_precision="tf32")
        totals = tl.dot(x, ones, totals, input_precision="tf32")
    return gram, tl.sum(totals, 1) * (1.0 / 16)


@triton.jit
def _project(x, axis, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Projection of points [TILE, BLOCK_D] onto an axis [BLOCK_D]: [TILE]."""
    axes = tl.broadcast_to(axis[:, None], (BLOCK_D, 16)).to(x.dtype)
    return tl.sum(tl.dot(x, axes, input_precision="tf32"), 1) * (1.0 / 16)


@triton.jit
def _main_axis(gram, total, count, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr):
    """First principal axis [BLOCK_D] of `count` points, up to a factor, by nine power iterations."""
    row = tl.arange(0, BLOCK_D)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    gram -= total[:, None] * (total / count)[None, :]
    spread = tl.sum(tl.where(row == column, gram, 0.0), 0)
    axis = tl.sum(tl.where(column == tl.argmax(spread, 0), gram, 0.0), 1)
    gram /= tl.maximum(tl.sum(spread, 0), 1e-20)
    for _ in tl.static_range(2):  # two squarings: each step below is worth four
        trace = tl.sum(tl.sum(gram * gram, 1), 0)
        small = gram.to(DTYPE)
        gram = tl.dot(small, small, input_precision="tf32") / tl.maximum(trace, 1e-20)
    for _ in tl.static_range(2):
        axis /= tl.maximum(tl.max(tl.abs(axis), 0), 1e-20)
        axis = tl.sum(gram * axis[None, :], 1)
    return axis / tl.maximum(tl.max(tl.abs(axis), 0), 1e-20)


@triton.jit
def _lower(along, there, half, SIZE: tl.constexpr):
    """Whether points [SIZE] are among the first `half` by (along, place), of those that are `there`."""
    bits = along.to(tl.int32, bitcast=True)
    key = tl.where(there, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)  # sorts as the numbers
    if SIZE <= 128:
        place = tl.arange(0, SIZE)
        tie = (key[None, :] == key[:, None]) & (place[None, :] < place[:, None])
        lower = there & (tl.sum(((key[None, :] < key[:, None]) | tie).to(tl.int32), 1) < half)
    else:
        low = tl.full([], -(1 << 31), tl.int64)
        high = tl.full([], (1 << 31) - 1, tl.int64)
        for _ in range(32):  # the least key that at least `half` points do not exceed
            middle = (low + high) >> 1
            enough = tl.sum((key <= middle.to(tl.int32)).to(tl.int32), 0) >= half
            high = tl.where(enough, middle, high)
            low = tl.where(enough, low, middle + 1)
        last = high.to(tl.int32)
        tied = (key == last).to(tl.int32)
        left = half - tl.sum((key < last).to(tl.int32), 0)
        lower = (key < last) | ((tied > 0) & (tl.cumsum(tied, 0) - tied < left))
    return lower


@triton.jit
def _store_halves(order, out, first, along, there, half, SIZE: tl.constexpr):
    """Write places [first, first + SIZE) of a row: the lower `half` of the points, then the others."""
    place = tl.arange(0, SIZE)
    token = tl.load(order + first + place, mask=there, other=0)
    lower = _lower(along, there, half, SIZE).to(tl.int32)
    upper = there.to(tl.int32) - lower
    to = tl.where(lower > 0, tl.cumsum(lower, 0) - 1, half + tl.cumsum(upper, 0) - 1)
    tl.store(out + first + to, token, mask=there)


@triton.jit(do_not_specialize=["count"])
def gram_kernel(
    points, order, grams, count, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr
):
    """Program (chunk, row) sums the products of CHUNK points.

    Args:
        points: [R, count, D], contiguous; order: int32 [R, count].
        grams: float32 [R, chunks, D + 1, D]: the Gram matrix, and in the last row the sum. Written.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    first = chunk * CHUNK
    stop = tl.minimum(first + CHUNK, count)
    gram, total = _gram(points + row * count * D, order + row * count, first, stop, D, BLOCK_D, TILE)
    mine = grams + (row * tl.num_programs(0) + chunk) * (D + 1) * D
    i = tl.arange(0, BLOCK_D)
    tl.store(mine + i[:, None] * D + i[None, :], gram, mask=(i < D)[:, None] & (i < D)[None, :])
    tl.store(mine + D * D + i, total, mask=i < D)


@triton.jit(do_not_specialize=["count", "size"])
def axis_kernel(
    grams, axes, count, size, CHUNK: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Program (node, row) writes `axes`, float32 [R, nodes, D], from the `grams` of `gram_kernel`."""
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    chunks = tl.cdiv(count, CHUNK)
    first = part * (size // CHUNK)
    i = tl.arange(0, BLOCK_D)
    inside = (i < D)[:, None] & (i < D)[None, :]
    gram = tl.zeros([BLOCK_D, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for chunk in range(first, tl.minimum(first + size // CHUNK, chunks)):
        theirs = grams + (row * chunks + chunk) * (D + 1) * D
        gram += tl.load(theirs + i[:, None] * D + i[None, :], mask=inside, other=0.0)
        total += tl.load(theirs + D * D + i, mask=i < D, other=0.0)
    points = tl.minimum(size, count - part * size)
    axis = _main_axis(gram, total, points.to(tl.float32), BLOCK_D, DTYPE)
    tl.store(axes + (row * tl.num_programs(0) + part) * D + i, axis, mask=i < D)


@triton.jit(do_not_specialize=["count", "size"])
def along_kernel(points, order, axes, along, count, size, TILE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Program (tile, row) writes `along`, float32 [R, count]: the projection of each point onto the axis of its node."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    mine = axes + (row * tl.cdiv(count, size) + tl.program_id(0) * TILE // size) * D
    axis = tl.load(mine + column, mask=column < D, other=0.0)
    x = _points(points + row * count * D, order + row * count, place, count, column, D)
    tl.store(along + row * count + place, _project(x, axis, D, BLOCK_D), mask=place < count)


@triton.jit(do_not_specialize=["count"])
def halve_kernel(order, along, out, count, SIZE: tl.constexpr):
    """Program (node, row) writes `out`, int32 [R, count]: the lower half of the node, then the upper half."""
    first = tl.program_id(0) * SIZE
    row = tl.program_id(1).to(tl.int64) * count
    place = first + tl.arange(0, SIZE)
    there = place < count
    half = tl.minimum(SIZE // 2, count - first)
    values = tl.load(along + row + place, mask=there, other=0.0)
    _store_halves(order + row, out + row, first, values, there, half, SIZE)


@triton.jit(do_not_specialize=["count", "size"])
def halve_part_kernel(
    points, order, along, out, count, size,
    SIZE: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (node, row) splits one node of `size` points. Writes `out`, int32 [R, count].

    Args:
        along: float32 [R, count]. Scratch.
        SIZE: `size`, or more: sizes that share a variant save the compiler two seconds each.
    """
    first = tl.program_id(0) * size
    row = tl.program_id(1).to(tl.int64)
    stop = tl.minimum(first + size, count)
    column = tl.arange(0, BLOCK_D)
    points += row * count * D
    order += row * count
    along += row * count
    gram, total = _gram(points, order, first, stop, D, BLOCK_D, TILE)
    axis = _main_axis(gram, total, (stop - first).to(tl.float32), BLOCK_D, points.dtype.element_ty)
    for begin in range(first, stop, TILE):
        place = begin + tl.arange(0, TILE)
        x = _points(points, order, place, stop, column, D)
        tl.store(along + place, _project(x, axis, D, BLOCK_D), mask=place < stop)
    tl.debug_barrier()
    there = first + tl.arange(0, SIZE) < stop
    half = tl.minimum(size // 2, count - first)
    values = tl.load(along + first + tl.arange(0, SIZE), mask=there, other=0.0)
    _store_halves(order, out + row * count, first, values, there, half, SIZE)


@triton.jit(do_not_specialize=["count"])
def halve_all_kernel(
    points, order, count,
    FIRST: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (group, row) splits GROUP places from nodes of FIRST points down to pages. Mutates `order`, int32 [R, count]."""
    first = tl.program_id(0) * GROUP
    row = tl.program_id(1).to(tl.int64)
    dtype: tl.constexpr = points.dtype.element_ty
    points += row * count * D
    order += row * count + first
    stop = tl.minimum(GROUP, count - first)
    column = tl.arange(0, BLOCK_D)
    i = tl.arange(0, GROUP)
    j = i[None, :]
    there = i < stop
    size = tl.full([], FIRST, tl.int32)
    while size > PAGE:
        part = (i // size)[:, None] == j // size
        known = part & there[None, :]
        x = _points(points, order, i, stop, column, D)
        gram = tl.where(known & there[:, None], tl.dot(x, tl.trans(x), input_precision="tf32"), 0.0)
        many = tl.maximum(tl.sum(known.to(tl.float32), 1), 1.0)
        mean = tl.sum(gram, 1) / many  # mean product of each point; below, of each node
        middle = tl.sum(tl.where(known, mean[None, :], 0.0), 1) / many
        gram = tl.where(known & there[:, None], gram - mean[:, None] - mean[None, :] + middle[:, None], 0.0)
        spread = tl.sum(tl.where(i[:, None] == j, gram, 0.0), 1)
        total = tl.sum(tl.where(known, spread[None, :], 0.0), 1)
        gram = gram / tl.maximum(total, 1e-20)[:, None]
        most = tl.max(tl.where(known, spread[None, :], -1.0), 1)
        largest = tl.min(tl.where(known & (spread[None, :] == most[:, None]), j, GROUP), 1)
        along = tl.sum(tl.where(j == largest[:, None], gram, 0.0), 1)
        for _ in tl.static_range(2):
            spread = tl.sum(gram * gram, 1)
            total = tl.sum(tl.where(known, spread[None, :], 0.0), 1)
            small = gram.to(dtype)
            gram = tl.dot(small, small, input_precision="tf32") / tl.maximum(total, 1e-20)[:, None]
        for _ in tl.static_range(2):
            along = tl.sum(gram * along[None, :], 1)
        along = tl.where(there, along, float("inf"))
        before = (along[None, :] < along[:, None]) | ((along[None, :] == along[:, None]) & (j < i[:, None]))
        lower = tl.sum((part & before).to(tl.int32), 1) < size // 2
        earlier = part & (j < i[:, None])
        low = tl.sum((earlier & lower[None, :]).to(tl.int32), 1)
        high = tl.sum((earlier & (lower[None, :] == 0)).to(tl.int32), 1)
        to = i // size * size + tl.where(lower, low, size // 2 + high)
        token = tl.load(order + i, mask=there, other=0)
        tl.debug_barrier()
        tl.store(order + to, token, mask=there)
        tl.debug_barrier()
        size = size // 2
