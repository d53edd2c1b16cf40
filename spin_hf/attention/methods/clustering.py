"""The interface of a method that decides which tokens form a page, so that tokens selected together share pages.

    form_clusters   keys of spans, observation queries   --> order of the tokens, and the number of pages of each cluster
    fit             pages in that order, once            --> tensors of the sequence; optional
    index_pages     pages in that order                  --> summaries

A cluster is a run of one or more pages. The summaries of a cluster stand in the row of each of its pages, so its pages have
equal scores. Selection by page therefore takes complete clusters, except the last one. Tokens that are not clustered yet, fewer
than `cluster_interval` beside sinks and recent window, lie in pages of consecutive tokens. Each such page is a cluster of its
own and competes like any other.

A method with `fitted_shapes` gets tensors for each sequence, in `Pages.fitted` and `Query.fitted`. They are those of `unfitted`
until tokens of the sequence are clustered first, and then those of `fit`. They stay as they are until a crop or a change of
padding leaves no clustered page. Pages that were summarised with other tensors are summarised again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ...inference_mode import outside_inference_mode
from .base import FittedTensors


@dataclass(frozen=True)
class TokenClusters:
    """A new order of tokens, by span and KV head.

    Attributes:
        order: [S, H, n], int64: the token at each place; each row is a permutation.
        pages_per_cluster: [S, H, n / P], int64: number of pages at the first page of each cluster, 0 at its other pages. None
            if every page is a cluster of its own, which `multi_page_clusters = False` requires.
    """

    order: Tensor
    pages_per_cluster: Tensor | None = None


class ClusteringMethod(ABC):
    """A mixin of a method: `class Mine(ClusteringMethod, Method)`."""

    span_tokens: ClassVar[int] = 8192
    """Largest number of tokens that are clustered together, at most 32768. A longer prefill is split into equal spans."""
    cluster_interval: ClassVar[int] = 1024
    """Tokens are clustered once this many are not clustered yet, so at this interval as a context grows."""
    multi_page_clusters: ClassVar[bool] = True
    """Whether a cluster may have several pages. If False, cluster sizes are not stored."""
    num_observation_queries: ClassVar[int] = 0
    """How many queries from the end of the prompt `form_clusters` gets. If 0, none are stored."""

    @abstractmethod
    def form_clusters(self, keys: Tensor, observation_queries: Tensor | None) -> TokenClusters:
        """Order the tokens of each of S spans, of one sequence or several.

        Args:
            keys: [S, H, n, D] of consecutive tokens, as cached, without padding; n is a multiple of the page size.
            observation_queries: [S, H, G, num_observation_queries, D], queries from the end of the prompt, times the scale of
                attention scores. None for generated tokens and for tokens from `SpinCache.from_cache`.
        """

    def unfitted(self, head_dim: int, value_dim: int, device: torch.device) -> FittedTensors:
        """The tensors of `fitted_shapes` before the fit, the same for all KV heads. They are not written to."""
        raise NotImplementedError(f"{type(self).__name__}: expected unfitted, as it has fitted_shapes; write it")

    def measure(self, keys: Tensor, values: Tensor, observation_queries: Tensor | None) -> dict[str, Tensor]:
        """What `fit` needs of the first clustered pages of S sequences.

        Args:
            keys, values: [S, H, n, P, D] and [S, H, n, P, Dv], without padding, in their new order; n is a multiple of
                `unit_pages`.
            observation_queries: as for `form_clusters`.
        Returns:
            name -> [S, H, ...], of any shapes.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected measure, as it has fitted_shapes; write it")

    def fit(self, measured: dict[str, Tensor]) -> FittedTensors:
        """Fit the tensors of `fitted_shapes`.

        Args:
            measured: what `measure` returned, for several layers together: name -> [S, H, ...].
        Returns:
            name -> [S, H, *shape].
        """
        raise NotImplementedError(f"{type(self).__name__}: expected fit, as it has fitted_shapes; write it")


def last_queries(query: Tensor, number: int) -> Tensor:
    """A copy of `number` queries, evenly spaced over the last `2 * number`. Repeats queries if there are fewer than `number`.

    Args:
        query: [B, H, G, Q, D].
    Returns:
        [B, H, G, number, D].
    """
    count = query.shape[3]
    return query.index_select(3, _evenly_back(count, number, min(count, 2 * number), query.device))


@lru_cache(maxsize=8)
@outside_inference_mode
def _evenly_back(count: int, number: int, within: int, device: torch.device) -> Tensor:
    """`number` indices, evenly spaced over the last `within` of `count`, the last one first."""
    return count - 1 - torch.arange(number, device=device) * within // number


def merge_pages(means: Tensor, pages_per_cluster: Tensor) -> Tensor:
    """Means of clusters from means of their pages, which are all full.

    Args:
        means: [B, H, n, D]
        pages_per_cluster: [B, H, n], as in `TokenClusters`; the clusters cover the n pages.
    Returns:
        [B, H, n, D]; all rows of a cluster are bitwise equal.
    """
    places = torch.arange(means.shape[2], device=means.device)
    first = torch.where(pages_per_cluster > 0, places, 0).cummax(2).values
    rows = first.unsqueeze(-1).expand_as(means)
    sums = torch.zeros_like(means).scatter_add_(2, rows, means) / pages_per_cluster.clamp(min=1).unsqueeze(-1)
    return sums.gather(2, rows)
