"""RetroInfer (arXiv 2505.02922): clusters of similar keys. The best clusters are read exactly, the next ones are estimated.

    cluster    segmented spherical k-means per KV head, about 16 tokens per cluster; tokens are permuted so that a cluster is a
               run of full pages
    score      of a page: log of the sum over the query heads of a KV head of  softmax over pages (scale * q . centroid)
    select     the best pages up to the budget; equal scores, as within a cluster, in page order
    estimate   the next 23.2 % of the pages: mean value of the cluster, with weight tokens * exp(scale * q . centroid)

    row of a page   centroid [D], value [Dv]    means over the cluster of the page

Differences from the original:

- A cluster has a multiple of 8 tokens, those nearest to its centroid. The leftover tokens are clustered again. What is left
  after that, one token in twenty, fills pages in the order of its clusters.
- An iteration of k-means assigns every other token, in turn. It converges as well in half the time.
- Tokens that are not clustered yet (up to about 1,024, and pages left in place) form clusters of one page of consecutive
  tokens. They compete for the budget; the original reads all of them.
- A cluster counts in the softmax of the scores once per page.
- The cluster that exceeds the budget is cut, nearest tokens first. Its other pages are the first to be estimated.
- The estimated zone ends at a score bin, 1/64 nat wide, which avoids a sort. The bin that contains the last of the 23.2 %
  belongs to the zone. Rounding may move a score to a neighbouring bin.
- The mean of the values is stored instead of their sum, because it suits int8 better.

On a GPU, clustering takes 21 kernel launches, two sorts and a few fills, whatever the number of rows, without a synchronisation
(`kernels/indexing/fill_clusters.py`). There 16-bit keys are compared as float16, and sums are rounded in another order, so a
point midway between two clusters may go to the other one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ... import kernels
from ...config import require_real, require_tokens
from ...errors import OptionError
from ...kernels.descriptor_fields import NUM_BINS, Rating
from ...kernels.recipe import KernelRecipe
from ...kernels.reference_clustering import gather_rows
from .base import Estimate, Method, Pages, Query, Summaries
from .clustering import ClusteringMethod, TokenClusters, merge_pages


@dataclass(frozen=True)
class RetroInfer(ClusteringMethod, Method):
    """Selects clusters of similar tokens by their mean key. The next best clusters are estimated, the rest is left out.

    Args:
        estimated_fraction: fraction of the candidate pages to estimate, next to those that are read; 0 turns estimation off.
        cluster_tokens: mean number of tokens per cluster, at most `span_tokens`.
    Raises:
        OptionTypeError, OptionError: not a number in [0, 1]; not an int of 8 or more.
    """

    name: ClassVar[str] = "retroinfer"
    estimated_fraction: float = 0.232
    cluster_tokens: int = 16

    def __post_init__(self) -> None:
        fraction = require_real("estimated_fraction", self.estimated_fraction, 0.232)
        if not 0 <= fraction <= 1:
            raise OptionError(
                f"estimated_fraction: expected a fraction of the pages in [0, 1], got {fraction}; pass estimated_fraction=0.232"
            )
        tokens = require_tokens("cluster_tokens", self.cluster_tokens, self.page_size)
        object.__setattr__(self, "estimated_fraction", fraction)
        object.__setattr__(self, "cluster_tokens", min(tokens, self.span_tokens))

    @property
    def recipe(self) -> KernelRecipe:
        """Kernels serve the decode step, except clustering and summaries."""
        return KernelRecipe(Rating.MEAN, estimated_fraction=float(self.estimated_fraction), overhead_us=40.0)

    # ---------------------------------------------------------------------------------------------------------- index

    def summary_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        """`centroid` [D] and `value` [Dv]."""
        return {"centroid": (head_dim,), "value": (value_dim,)}

    def index_pages(self, pages: Pages) -> Summaries:
        """Means of the keys and values of clusters."""
        assert pages.pages_per_cluster is not None
        means = {
            "centroid": kernels.page_means(pages.keys, pages.valid),
            "value": kernels.page_means(pages.values, pages.valid),
        }
        return {name: merge_pages(mean, pages.pages_per_cluster) for name, mean in means.items()}

    def form_clusters(self, keys: Tensor, observation_queries: Tensor | None) -> TokenClusters:
        """Order tokens by cluster, nearest to the centroid first. Observation queries are ignored."""
        sixteen = keys.is_cuda and keys.element_size() == 2
        points = kernels.unit_vectors(keys, torch.float16 if sixteen else torch.float32)
        order, pages = kernels.fill_clusters(points.flatten(0, 1), self.cluster_tokens, self.page_size)
        return TokenClusters(order.unflatten(0, keys.shape[:2]), pages.unflatten(0, keys.shape[:2]))

    # --------------------------------------------------------------------------------------------- select and estimate

    def select(self, query: Query, summary: Callable[..., Tensor]) -> Tensor:
        """The best pages up to the budget. Pages of a cluster have equal scores, so these are the best clusters."""
        scores = self._scores(query, summary("centroid"))
        width = min(int(query.budget_pages.max()), scores.shape[2])
        pages = scores.argsort(dim=2, descending=True, stable=True)[:, :, :width]
        wanted = torch.arange(width, device=pages.device) < query.budget_pages[:, None, None]
        return torch.where(wanted & (scores.gather(2, pages) > float("-inf")), pages, -1)

    def estimate(self, query: Query, summary: Callable[..., Tensor], pages: Tensor) -> Estimate | None:
        """Pages that are not selected and whose score bin is among the best `budget + estimated_fraction` pages."""
        if not self.estimated_fraction:
            return None
        assert query.page_tokens is not None
        centroids, candidates = summary("centroid"), query.candidates.unsqueeze(1)
        scores = self._scores(query, centroids)
        bins = kernels.score_bins(scores - math.log(query.states.shape[2])).masked_fill(~candidates, NUM_BINS)
        count = query.candidates.sum(1)
        wanted = query.budget_pages + (count.double() * self.estimated_fraction - 1e-9).ceil().long()
        last = (wanted.minimum(count) - 1).clamp(min=0)[:, None, None].expand(-1, bins.shape[1], -1)
        chosen = (bins <= bins.sort(dim=2).values.gather(2, last)) & candidates
        selected = torch.zeros_like(bins).scatter_add_(2, pages.clamp(min=0), (pages >= 0).long())
        chosen &= selected == 0
        width = int(chosen.sum(2).max())
        if not width:
            return None
        rows = chosen.to(torch.int8).argsort(dim=2, descending=True, stable=True)[:, :, :width]
        log_tokens = query.page_tokens.float().log().unsqueeze(1).masked_fill(~chosen, float("-inf"))
        return Estimate(gather_rows(centroids, rows), gather_rows(summary("value"), rows), log_tokens.gather(2, rows))

    def _scores(self, query: Query, centroids: Tensor) -> Tensor:
        """Log scores of pages [B, H, N]; -inf for pages that are not candidates."""
        logits = query.states @ centroids.transpose(-1, -2) * query.scale
        logits = logits.masked_fill(~query.candidates[:, None, None], float("-inf"))
        total = logits.logsumexp(3, keepdim=True)
        return (logits - total.masked_fill(total == float("-inf"), 0.0)).logsumexp(2)
