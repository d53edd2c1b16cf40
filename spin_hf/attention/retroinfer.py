"""RetroInfer (arXiv 2505.02922): clusters of similar keys, the best of them read exactly and the next ones estimated.

    arrange    segmented spherical k-means per KV head, about 16 tokens a cluster; tokens trade places so that a cluster is a
               run of full pages
    score      sum over the query heads of a KV head of  softmax over clusters (scale * q . centroid)
    select     the best clusters up to the budget
    estimate   the next 23.2 % of the clusters: each enters the softmax as its number of tokens times exp(scale * q . centroid),
               with the mean of its values

    row of a page   centroid [D], value [Dv]    means over the cluster that begins there; not read where one continues

Differences to the original. A cluster keeps a multiple of 8 of its tokens, those nearest to its centroid; those left over are
clustered again among themselves, until all pages are full. Tokens not clustered yet (up to 1,024 and a little, and pages left
in place) are clusters of one page of consecutive tokens: they compete for the budget, where the original reads all of them.
The cluster that exceeds the budget is cut, nearest tokens first, and what is left of it is the first to be estimated.
Instead of the sum of the values their mean is kept, which int8 summaries suit better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import require_count
from ..errors import OptionError, OptionTypeError
from .partition import Estimate, Method, Pages, Query, Summaries
from .regrouping import Arrangement, Regrouping, merge_pages

_ITERATIONS = 10
_MOST_ROUNDS = 8
"""Of clustering what was left over; then pages are filled as tokens come."""


@dataclass(frozen=True)
class RetroInfer(Regrouping, Method):
    """Clusters, read or estimated.

    Args:
        estimated_share: share of a context's clusters that are estimated, beside those that are read; 0 turns that off.
        cluster_tokens: mean number of tokens of a cluster.
    Raises:
        OptionTypeError, OptionError: not a number in [0, 1]; not an int of 8 or more.
    """

    name: ClassVar[str] = "retroinfer"
    estimated_share: float = 0.232
    cluster_tokens: int = 16

    def __post_init__(self) -> None:
        share = self.estimated_share
        if isinstance(share, bool) or not isinstance(share, (int, float)):
            raise OptionTypeError(f"estimated_share: expected a float, got {type(share).__name__}; pass 0.232")
        if not 0 <= share <= 1:
            raise OptionError(f"estimated_share: expected a share of the clusters in [0, 1], got {share}; pass 0.232")
        require_count("cluster_tokens", self.cluster_tokens, self.page_size)

    # ---------------------------------------------------------------------------------------------------------- index

    def summary_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        """`centroid` [D] and `value` [Dv]."""
        return {"centroid": (head_dim,), "value": (value_dim,)}

    def index_pages(self, pages: Pages) -> Summaries:
        """Means of the keys and values of clusters."""
        assert pages.partition_pages is not None
        means = {"centroid": _mean(pages.keys, pages.valid), "value": _mean(pages.values, pages.valid)}
        return {name: merge_pages(mean, pages.partition_pages) for name, mean in means.items()}

    def arrange(self, keys: Tensor) -> Arrangement:
        """Cluster by cluster, in each the tokens nearest to the centroid first."""
        centred = keys[0].float()
        centred = centred - centred.mean(1, keepdim=True)
        cluster, rank = fill_clusters(
            torch.nn.functional.normalize(centred, dim=-1), self.cluster_tokens, self.page_size
        )
        order = (cluster * keys.shape[2] + rank).argsort(1)
        of_page = cluster.gather(1, order)[:, :: self.page_size]
        begins = torch.ones_like(of_page, dtype=torch.bool)
        begins[:, 1:] = of_page[:, 1:] != of_page[:, :-1]
        number = begins.cumsum(1) - 1
        pages = torch.zeros_like(of_page).scatter_add_(1, number, torch.ones_like(of_page))
        return Arrangement(order.unsqueeze(0), torch.where(begins, pages.gather(1, number), 0).unsqueeze(0))

    # --------------------------------------------------------------------------------------------- select and estimate

    def select(self, query: Query, summary: Callable[..., Tensor]) -> Tensor:
        """The pages of the best clusters up to the budget."""
        _, clusters, pages = self._ranked(query, summary)
        place = torch.arange(min(int(query.budget_pages.max()), clusters.shape[2]), device=clusters.device)
        upto = pages.cumsum(2)
        rank = torch.searchsorted(upto, place.expand(*upto.shape[:2], -1).contiguous(), right=True)
        inside = (rank < upto.shape[2]) & (place < query.budget_pages[:, None, None])
        rank = rank.clamp(max=upto.shape[2] - 1)
        return torch.where(inside, clusters.gather(2, rank) + place - (upto - pages).gather(2, rank), -1)

    def estimate(self, query: Query, summary: Callable[..., Tensor], pages: Tensor) -> Estimate | None:
        """Clusters behind those that were selected, and what the budget cut off the last of these."""
        if not self.estimated_share:
            return None
        centroids, clusters, sizes = self._ranked(query, summary)
        taken = query.budget_pages[:, None, None]
        left = (sizes.cumsum(2) - taken).clamp(min=0).minimum(sizes)
        some = left > 0
        wanted = ((sizes > 0).sum(2, keepdim=True).double() * self.estimated_share - 1e-9).ceil()
        chosen = some & (some.cumsum(2) <= wanted)
        width = int(chosen.sum(2).max())
        if not width:
            return None
        places = chosen.to(torch.int8).argsort(dim=2, descending=True, stable=True)[:, :, :width]
        rows = clusters.gather(2, places)
        assert query.page_tokens is not None
        single = (
            query.page_tokens[:, None].expand(-1, rows.shape[1], -1).gather(2, rows)
        )  # padding may leave fewer than 8
        tokens = torch.where(sizes.gather(2, places) > 1, left.gather(2, places) * query.page_size, single)
        log_tokens = tokens.float().log().masked_fill(~chosen.gather(2, places), float("-inf"))
        return Estimate(_rows(centroids, rows), _rows(summary("value"), rows), log_tokens)

    def _ranked(self, query: Query, summary: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Centroids [B, H, N, D]; first page and number of pages [B, H, N] of the clusters, best first, 0 pages for none."""
        assert query.partition_pages is not None
        pages = query.partition_pages * query.candidates.unsqueeze(1)
        centroids = summary("centroid")
        logits = query.states @ centroids.transpose(-1, -2) * query.scale
        scores = logits.masked_fill((pages == 0).unsqueeze(2), float("-inf")).softmax(-1).nan_to_num(0.0).sum(2)
        clusters = scores.masked_fill(pages == 0, -1.0).argsort(dim=2, descending=True, stable=True)
        return centroids, clusters, pages.gather(2, clusters)


def fill_clusters(points: Tensor, cluster_tokens: int, page_size: int) -> tuple[Tensor, Tensor]:
    """Clusters of whole pages.

    Args:
        points: [H, n, D], float32, unit vectors; n is a multiple of `page_size`.
    Returns:
        cluster, rank: [H, n], int64: the cluster of each point, and its place in it, nearest to the centroid first. The
        number of points in every cluster is a multiple of `page_size`.
    """
    heads, count, _ = points.shape
    cluster = torch.zeros((heads, count), dtype=torch.int64, device=points.device)
    rank, first = torch.zeros_like(cluster), 0
    left = torch.arange(count, device=points.device).expand(heads, -1)
    alive = torch.ones_like(left, dtype=torch.bool)
    for turn in range(_MOST_ROUNDS + 1):
        own, place, size, num_clusters = _cluster_once(_rows(points, left), alive, cluster_tokens)
        kept = alive & (place < size - size % page_size)
        if turn == _MOST_ROUNDS:  # tokens of one page are then only as alike as their clusters
            place = (own * count + place).masked_fill(~alive, heads * count * count).argsort(1).argsort(1)
            own, place = place // page_size, place % page_size
            kept, num_clusters = alive, count
        at = (*kept.nonzero(as_tuple=True),)
        cluster[at[0], left[at]], rank[at[0], left[at]] = own[at] + first, place[at]
        first += num_clusters
        remaining = alive & ~kept
        width = int(remaining.sum(1).max())
        if not width:
            break
        order = remaining.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
        left, alive = left.gather(1, order), remaining.gather(1, order)
    return cluster, rank


def _cluster_once(points: Tensor, alive: Tensor, cluster_tokens: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Spherical k-means, from points at equal distances in their order.

    Args:
        points: [H, m, D]; alive: [H, m], bool, which of them count, the first ones of each head.
    Returns:
        cluster, place in it by falling similarity, size of the cluster, all [H, m], and how many clusters there are.
    """
    heads, count, dim = points.shape
    alive_count = alive.sum(1, keepdim=True)
    num_clusters = torch.div(alive_count, cluster_tokens, rounding_mode="floor").clamp(min=1)
    most = int(num_clusters.max())
    index = torch.arange(most, device=points.device).expand(heads, -1)
    exists = index < num_clusters
    start = (index * 2 + 1) * alive_count // (2 * num_clusters)
    centroids = _rows(points, start.clamp(max=count - 1))
    weighted = points * alive.unsqueeze(-1)
    for step in range(_ITERATIONS + 1):
        likeness = (points @ centroids.transpose(1, 2)).masked_fill(~exists.unsqueeze(1), float("-inf"))
        best, own = likeness.max(2)
        if step == _ITERATIONS:
            break
        sums = torch.zeros_like(centroids).scatter_add_(1, own.unsqueeze(-1).expand(-1, -1, dim), weighted)
        empty = sums.abs().amax(2, keepdim=True) == 0
        centroids = torch.where(empty, centroids, torch.nn.functional.normalize(sums, dim=-1))
    own = own.masked_fill(~alive, most)
    by_likeness = best.argsort(dim=1, descending=True, stable=True)
    order = by_likeness.gather(1, own.gather(1, by_likeness).argsort(dim=1, stable=True))
    sizes = torch.zeros((heads, most + 1), dtype=torch.int64, device=points.device)
    sizes.scatter_add_(1, own, torch.ones_like(own))
    begin = sizes.cumsum(1) - sizes
    places = torch.arange(count, device=points.device).expand(heads, -1)
    place = torch.empty_like(own).scatter_(1, order, places - begin.gather(1, own.gather(1, order)))
    return own, place, sizes.gather(1, own), most


def _mean(states: Tensor, valid: Tensor) -> Tensor:
    """Mean [..., D] of the valid tokens of pages [..., P, D]; zeros where there are none."""
    weight = valid.unsqueeze(-1).float()
    return (states.float() * weight).sum(-2) / weight.sum(-2).clamp(min=1)


def _rows(states: Tensor, rows: Tensor) -> Tensor:
    """Rows [..., m] of states [..., n, D]: [..., m, D]."""
    return states.gather(-2, rows.unsqueeze(-1).expand(*rows.shape, states.shape[-1]))
