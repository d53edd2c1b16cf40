"""What a method adds to choose which tokens make a page: tokens that queries want together should lie together.

    arrange            keys of spans, all of one length  ----> their order, and which pages then make a partition
                       what a prompt's end asked
    index_pages        pages in that order                   ----> summaries

A partition is a run of pages, and the row of each of them holds what is known of it as a whole: selecting page by page, best
rows first, takes partitions whole, but for the last. Tokens that were not clustered_pages yet (fewer than `cluster_interval`,
besides sinks and recent window) lie in pages of consecutive tokens, each a partition by itself, and may be selected like any
other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenClusters:
    """A new order of tokens, by span and KV head.

    Attributes:
        order: [S, H, n], int64: which token stands at each place, a permutation in each row.
        pages_per_cluster: [S, H, n / P], int64: how many pages the partition has that begins at a page, 0 where none does;
            None where every page is a partition by itself, as it has to be for methods without `multi_page_clusters`.
    """

    order: Tensor
    pages_per_cluster: Tensor | None = None


class ClusteringMethod(ABC):
    """Mixed into a method: `class Mine(ClusteringMethod, Method)`."""

    span_tokens: ClassVar[int] = 8192
    """Most tokens that trade places with one another, 32768 or fewer; what a prefill brings is split into equal parts."""
    cluster_interval: ClassVar[int] = 1024
    """How many tokens there must be to be clustered_pages, which is how often it happens as a context grows."""
    multi_page_clusters: ClassVar[bool] = True
    """Whether a partition may have several pages; else nothing is kept of partitions."""
    num_observation_queries: ClassVar[int] = 0
    """How many queries of a prompt's end `form_clusters` is shown; 0 for none, which are then not kept either."""

    @abstractmethod
    def form_clusters(self, keys: Tensor, observation_queries: Tensor | None) -> TokenClusters:
        """Order the tokens of each of S spans, of one sequence or several.

        Args:
            keys: [S, H, n, D] of consecutive tokens, as cached; n is a multiple of the page size, none is padding.
            observation_queries: [S, H, G, num_observation_queries, D], what the last tokens of the prompt asked, times the
                factor of attention scores; None where no prompt was just read: for tokens that were generated, or taken over
                from another cache.
        """


def last_queries(query: Tensor, number: int) -> Tensor:
    """A copy of `number` queries, evenly from the last twice as many; some of them repeated where there are fewer.

    Args:
        query: [B, H, G, Q, D].
    Returns:
        [B, H, G, number, D].
    """
    count = query.shape[3]
    back = torch.arange(number, device=query.device) * min(count, 2 * number) // number
    return query.index_select(3, count - 1 - back)


def merge_pages(means: Tensor, pages_per_cluster: Tensor) -> Tensor:
    """Means of partitions from means of their (equally full) pages.

    Args:
        means: [B, H, n, D]; pages_per_cluster: [B, H, n], which tile the n pages.
    Returns:
        [B, H, n, D]: the same, to the last bit, in all rows of a partition.
    """
    places = torch.arange(means.shape[2], device=means.device)
    first = torch.where(pages_per_cluster > 0, places, 0).cummax(2).values
    rows = first.unsqueeze(-1).expand_as(means)
    sums = torch.zeros_like(means).scatter_add_(2, rows, means) / pages_per_cluster.clamp(min=1).unsqueeze(-1)
    return sums.gather(2, rows)
