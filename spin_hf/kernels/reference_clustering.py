"""PyTorch operations that cluster tokens: the specification of the kernels in `indexing/`, and the CPU backend.

    bisect          Bisection: points are halved at the median along their main axis, down to pages
    fill_clusters   RetroInfer: spherical k-means of unit vectors; clusters of full pages

R independent rows, one per (span, KV head); n points of D numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = (4, 2)
"""Iterations of k-means per round: over all tokens, then over the left-over tokens. The rest fills pages in cluster order."""
LIKENESS_STEPS = 4096
"""Steps of cosine similarity from 1 down to -1. A cluster's points are sorted by step; ties stay in order."""
_TILE_ELEMENTS = 1 << 24
"""Upper limit of elements of a similarity tile: 32 MiB in float16, which fits the L2 cache of a large GPU."""


def bisect(points: Tensor, page_size: int) -> Tensor:
    """Order points so that each page holds points that are close to each other.

    Args:
        points: [R, n, D], in the dtype of all products; n is a multiple of `page_size`.
    Returns:
        order: [R, n], int64: place i gets point order[i].
    """
    rows, count, dim = points.shape
    order = torch.arange(count, device=points.device).expand(rows, -1)
    size = page_size
    while size < count:
        size *= 2
    while size > page_size:
        nodes = -(-count // size)
        filled = count - (nodes - 1) * size  # points of the last node; all other nodes are full
        token = torch.nn.functional.pad(order, (0, size - filled)).unflatten(1, (nodes, size))
        x = points.gather(1, token.flatten(1).unsqueeze(-1).expand(-1, -1, dim)).unflatten(1, (nodes, size))
        order = halve(x, filled, token).flatten(1)[:, :count]
        size //= 2
    return order


def halve(x: Tensor, filled: int, token: Tensor) -> Tensor:
    """Split every node of one level: the half lower along the node's main axis first. Order within a half stays.

    Args:
        x: [R, nodes, size, D]; the last node has only `filled` points. Mutated.
        token: [R, nodes, size], the numbers of these points.
    Returns:
        `token` in the new order.
    """
    nodes, size = token.shape[1:]
    x[:, -1, filled:] = 0
    count = torch.full((nodes, 1, 1), size, device=x.device)
    count[-1] = filled
    x -= x.sum(2, keepdim=True) / count
    x[:, -1, filled:] = 0
    along = _along_main_axis(x)
    along[:, -1, filled:] = float("inf")
    sides = along.argsort(dim=2, stable=True).split(size // 2, dim=2)
    return token.gather(2, torch.cat([side.sort(dim=2).values for side in sides], 2))


def _along_main_axis(centred: Tensor) -> Tensor:
    """Projection of rows [..., m, D] onto their approximate first principal axis, up to a factor: [..., m]."""
    wide = centred.shape[-1] >= centred.shape[-2]
    gram = centred @ centred.mT if wide else centred.mT @ centred
    size = gram.diagonal(dim1=-2, dim2=-1)
    gram = gram / size.sum(-1).clamp(min=1e-20)[..., None, None]
    largest = size.argmax(-1)[..., None, None].expand(*gram.shape[:-1], 1)
    fourth = gram @ gram
    fourth = fourth @ fourth
    along = fourth @ (fourth @ gram.gather(-1, largest))
    return (along if wide else centred @ along).squeeze(-1)


def unit_vectors(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys [S, H, n, D] minus their mean per span and head, normalized: [S, H, n, D] in `dtype`, contiguous.

    float16 is more precise than bfloat16 here, as no number exceeds 1.
    """
    return torch.nn.functional.normalize(keys - keys.mean(2, keepdim=True, dtype=torch.float32), dim=-1).to(dtype)


def fill_clusters(points: Tensor, cluster_tokens: int, page_size: int) -> tuple[Tensor, Tensor]:
    """Order points by cluster, nearest to the centroid first. A cluster is a run of full pages.

    Args:
        points: [R, n, D], unit vectors, contiguous, in the dtype of the products (sums are float32 at least); n is a multiple
            of `page_size`.
    Returns:
        order [R, n] and pages_per_cluster [R, n / P], int64, as in `TokenClusters`.
    """
    rows, count, _ = points.shape
    token = torch.arange(count, device=points.device).expand(rows, -1)
    # One element more than needed: points that are not placed are written there.
    order, pages = token.new_zeros((rows, count + 1)), token.new_zeros((rows, count // page_size + 1))
    done = token.new_zeros((rows, 1))
    for iterations in ROUNDS:
        own, likeness, num_clusters = _cluster(points, count - done, cluster_tokens, iterations)
        steps = ((1 - likeness) * (LIKENESS_STEPS // 2)).clamp(0, LIKENESS_STEPS - 1).long()
        index = (own * LIKENESS_STEPS + steps).argsort(dim=1, stable=True)
        own = own.gather(1, index)
        sizes = own.new_zeros((rows, num_clusters + 1)).scatter_add_(1, own, torch.ones_like(own))
        place = torch.arange(own.shape[1], device=own.device) - (sizes.cumsum(1) - sizes).gather(1, own)
        full_pages = torch.div(sizes, page_size, rounding_mode="floor").gather(1, own)
        alive = own < num_clusters
        placed = alive & (place < full_pages * page_size)
        to = torch.where(placed, done + placed.cumsum(1) - 1, count)
        order.scatter_(1, to, token.gather(1, index))
        begins = placed & (place == 0)
        pages.scatter_(1, torch.where(begins, to, count).div(page_size, rounding_mode="floor"), full_pages)
        done = done + placed.sum(1, keepdim=True)
        left, width = alive & ~placed, min(own.shape[1], num_clusters * (page_size - 1))
        to = torch.where(left, left.cumsum(1) - 1, width)
        index = index.new_zeros((rows, width + 1)).scatter_(1, to, index)[:, :width]
        token, points = token.gather(1, index), gather_rows(points, index)
    places = torch.arange(token.shape[1], device=token.device)
    order.scatter_(1, torch.where(places < count - done, done + places, count), token)
    single = torch.arange(0, count, page_size, device=pages.device) >= done
    return order[:, :count], pages[:, :-1].masked_fill(single, 1)


def _cluster(points: Tensor, alive: Tensor, cluster_tokens: int, iterations: int) -> tuple[Tensor, Tensor, int]:
    """Spherical k-means, seeded with evenly spaced points. Iterations assign the even and the odd points in turn.

    Args:
        points: [R, m, D]; alive: [R, 1], valid points of each row, the first ones.
    Returns:
        cluster: [R, m], int64; `num_clusters` for a point that is not valid.
        likeness: [R, m], cosine similarity to the centroid; 0 for NaN.
        num_clusters: upper limit over the rows. A row has one cluster per `cluster_tokens` valid points.
    """
    rows, count, dim = points.shape
    most = max(1, count // cluster_tokens)
    wanted = torch.div(alive, cluster_tokens, rounding_mode="floor").clamp(min=1)
    spread = torch.div((torch.arange(most, device=points.device) * 2 + 1) * alive, 2 * wanted, rounding_mode="floor")
    centroids = gather_rows(points, spread.minimum(alive - 1).clamp(min=0))
    dead = torch.arange(count, device=points.device) >= alive
    first = torch.arange(rows, device=points.device).unsqueeze(1) * (most + 1)
    wide = torch.promote_types(points.dtype, torch.float32)
    sums = [points.new_zeros((rows * (most + 1), dim), dtype=wide)] * 2
    for step in range(iterations):
        half = slice(step % 2, None, 2)
        own = _nearest(points[:, half], centroids, wanted)[1].masked_fill(dead[:, half], most) + first
        sums[step % 2] = torch.zeros_like(sums[0]).index_add_(0, own.flatten(), points[:, half].flatten(0, 1).to(wide))
        both = (sums[0] + sums[1]).view(rows, most + 1, dim)[:, :most]
        means = torch.nn.functional.normalize(both, dim=-1).to(points.dtype)
        centroids = torch.where(means.any(-1, keepdim=True), means, centroids)
    likeness, own = _nearest(points, centroids, wanted)
    return own.masked_fill(dead, most), likeness.to(wide).nan_to_num(0.0), most


def _nearest(points: Tensor, centroids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The similarity of points [R, m, D] to the nearest of the first `wanted` [R, 1] centroids [R, k, D], and its index.

    Returns:
        likeness, own: [R, m] both; of equal centroids the first.
    """
    behind = (torch.arange(centroids.shape[1], device=points.device) >= wanted).unsqueeze(1)
    at_once = max(1, _TILE_ELEMENTS // (points.shape[1] * centroids.shape[1]))
    tiles = zip(*(whole.split(at_once) for whole in (points, centroids, behind)), strict=True)
    likeness, own = zip(*((x @ c.mT).masked_fill_(none, -torch.inf).max(2) for x, c, none in tiles), strict=True)
    return torch.cat(likeness), torch.cat(own)


def gather_rows(states: Tensor, rows: Tensor) -> Tensor:
    """Rows [..., m] of states [..., n, D]: [..., m, D]."""
    return states.gather(-2, rows.unsqueeze(-1).expand(*rows.shape, states.shape[-1]))
