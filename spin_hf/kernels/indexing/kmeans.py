"""Spherical k-means: assignment to the nearest centroid and centroid update. See `reference_clustering.fill_clusters`.

    unit_vectors   keys [S, H, n, D], any strides, minus their mean  ->  points [R, n, D] of length 1
    seed           evenly spaced points                              ->  centroids [R, most, D]
    nearest        every `STEP`-th point against all centroids       ->  own [R, m]
    average        sums of these points by cluster                   ->  centroids; an empty cluster keeps its centroid

Row r has `length - done[r]` valid points: its first ones, or those with the numbers in `tokens` [R, m]. It has
`max(1, valid points / CLUSTER_TOKENS)` centroids. Other points and centroids are never read.

The similarity matrix is never stored: a program holds a tile of points, goes through all centroids, and tracks the best one of
each point, by column of the tile. Sums are products of points with zeros and ones. On tensor cores that is cheaper than
atomics, its time does not depend on cluster sizes, and it is deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "heads"])
def unit_vectors_kernel(
    keys, mean, points, count, heads, span_stride, head_stride, token_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (r, i) makes TILE points of row r = s * H + h.

    Args:
        keys: [S, H, count, D], strided but for the last dimension; mean: float32 [S * H, D].
        points: [S * H, count, D]. Written; zeros where a key is the mean.
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, BLOCK_D)
    inside = (place < count)[:, None] & (column < D)[None, :]
    first = keys + row // heads * span_stride + row % heads * head_stride
    x = tl.load(first + place[:, None] * token_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    x = tl.where(inside, x - tl.load(mean + row * D + column, mask=column < D, other=0.0)[None, :], 0.0)
    x = x / tl.maximum(tl.sqrt_rn(tl.sum(x * x, 1)), 1e-12)[:, None]
    tl.store(points + (row * count + place)[:, None] * D + column[None, :], x.to(points.dtype.element_ty), mask=inside)


@triton.jit
def load_points(
    points, tokens, row, place, there, length, count, D: tl.constexpr, BLOCK_D: tl.constexpr, LISTED: tl.constexpr
):
    """Points [places, BLOCK_D] of a row; zeros where `there` is False."""
    token = place
    if LISTED:
        token = tl.load(tokens + row * count + place, mask=there, other=0)
    column = tl.arange(0, BLOCK_D)
    address = points + (row * length + token)[:, None] * D + column[None, :]
    return tl.load(address, mask=there[:, None] & (column < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["length", "count", "most"])
def seed_kernel(
    points, tokens, done, centroids, sizes, length, count, most,
    CLUSTER_TOKENS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CLUSTERS: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Program (r, i) sets CLUSTERS centroids of row r to evenly spaced points, and the sizes of these clusters to 0.

    Args:
        centroids: [R, most, D], in the dtype of the points; sizes: int32 [R, most]. Written.
    """
    row = tl.program_id(0).to(tl.int64)
    cluster = tl.program_id(1) * CLUSTERS + tl.arange(0, CLUSTERS)
    tl.store(sizes + row * most + cluster, tl.zeros([CLUSTERS], tl.int32), mask=cluster < most)
    alive = length - tl.load(done + row)
    wanted = tl.maximum(alive // CLUSTER_TOKENS, 1)
    there = (cluster < wanted) & (alive > 0)
    place = (2 * cluster.to(tl.int64) + 1) * alive // (2 * wanted)
    x = load_points(points, tokens, row, place, there, length, count, D, BLOCK_D, LISTED)
    column = tl.arange(0, BLOCK_D)
    at = (row * most + cluster)[:, None] * D + column[None, :]
    tl.store(centroids + at, x, mask=there[:, None] & (column < D)[None, :])


@triton.jit(do_not_specialize=["length", "count", "most", "start"])
def nearest_kernel(
    points, tokens, done, centroids, own, sizes, length, count, most, start,
    CLUSTER_TOKENS: tl.constexpr, LIKENESS_STEPS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, CLUSTERS: tl.constexpr, STEP: tl.constexpr, LISTED: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Program (r, i) finds the nearest centroids of TILE points of row r; of equal centroids the first.

    Args:
        start: points start, start + STEP, ... of each row are assigned.
        own: int [R, count]: the cluster of each point, `most` for a point that is not valid. If FINAL, a sort key instead:
            (r * (most + 1) + cluster) * LIKENESS_STEPS + step, where step 0 is the highest similarity. Written.
        sizes: int32 [R, most]: points per cluster. Added to if FINAL.
    """
    row = tl.program_id(0).to(tl.int64)
    first = start + STEP * TILE * tl.program_id(1)
    place = first + STEP * tl.arange(0, TILE)
    alive = length - tl.load(done + row)
    there = place < alive
    wanted = tl.maximum(alive // CLUSTER_TOKENS, 1)
    x = load_points(points, tokens, row, place, there, length, count, D, BLOCK_D, LISTED)
    column = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, CLUSTERS)
    best = tl.full([TILE, CLUSTERS], float("-inf"), tl.float32)
    found = tl.zeros([TILE, CLUSTERS], tl.int32)
    for begin in range(0, tl.where(first < alive, wanted, 0), CLUSTERS):
        # Past the last cluster, the last one is read again, which changes nothing.
        cluster = tl.minimum(begin + lane, wanted - 1)
        address = centroids + (row * most + cluster)[None, :] * D + column[:, None]
        product = tl.dot(x, tl.load(address, mask=(column < D)[:, None], other=0.0), input_precision="ieee")
        better = product > best
        best = tl.where(better, product, best)
        found = tl.where(better, begin, found)
    likeness = tl.max(best, 1)
    nearest = tl.min(tl.where(best == likeness[:, None], found + lane[None, :], most), 1)
    nearest = tl.minimum(nearest, wanted - 1)
    cluster = tl.where(there, nearest, most)
    at = row * count + place
    if FINAL:
        likeness = tl.where(there & (likeness > float("-inf")), likeness, 0.0)  # 0 for NaN
        step = tl.minimum(tl.maximum((1.0 - likeness) * (LIKENESS_STEPS // 2), 0.0), LIKENESS_STEPS - 1.0)
        number = (row * (most + 1) + cluster) * LIKENESS_STEPS + step.to(tl.int32)
        tl.store(own + at, number.to(own.dtype.element_ty), mask=place < count)
        tl.atomic_add(sizes + row * most + nearest, 1, mask=there, sem="relaxed")
    else:
        tl.store(own + at, cluster.to(own.dtype.element_ty), mask=place < count)


@triton.jit(do_not_specialize=["length", "count", "most", "start"])
def average_kernel(
    points, tokens, done, own, sums, others, centroids, length, count, most, start,
    CLUSTER_TOKENS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TILE: tl.constexpr, CLUSTERS: tl.constexpr, STEP: tl.constexpr, LISTED: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Program (r, i) sums points start, start + STEP, ... of row r by cluster and updates centroids, for CLUSTERS clusters.

    Args:
        own: int [R, count]: the cluster of each point.
        sums: float32 [R, most, D]. Written.
        others: float32 [R, most, D]: the sums of the other points, added before normalization; not read if ALONE.
        centroids: [R, most, D], unit vectors; a centroid stays if its sum is zero. Mutated.
    """
    row = tl.program_id(0).to(tl.int64)
    cluster = tl.program_id(1) * CLUSTERS + tl.arange(0, CLUSTERS)
    column = tl.arange(0, BLOCK_D)
    alive = length - tl.load(done + row)
    wanted = tl.maximum(alive // CLUSTER_TOKENS, 1)
    acc = tl.zeros([CLUSTERS, BLOCK_D], tl.float32)
    for first in range(start, tl.where(tl.program_id(1) * CLUSTERS < wanted, alive, 0), STEP * TILE):
        place = first + STEP * tl.arange(0, TILE)
        there = place < alive
        mine = tl.load(own + row * count + place, mask=there, other=-1)
        x = load_points(points, tokens, row, place, there, length, count, D, BLOCK_D, LISTED)
        acc = tl.dot((mine[None, :] == cluster[:, None]).to(x.dtype), x, acc, input_precision="ieee")
    at = (row * most + cluster)[:, None] * D + column[None, :]
    inside = (cluster < wanted)[:, None] & (column < D)[None, :]
    tl.store(sums + at, acc, mask=inside)
    if not ALONE:
        acc += tl.load(others + at, mask=inside, other=0.0)
    mean = acc / tl.maximum(tl.sqrt_rn(tl.sum(acc * acc, 1)), 1e-12)[:, None]
    mean = mean.to(centroids.dtype.element_ty)
    moves = tl.max((mean != 0.0).to(tl.int32), 1) > 0
    tl.store(centroids + at, mean, mask=inside & moves[:, None])
