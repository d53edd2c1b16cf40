"""Methods for tests that cluster tokens, and sizes so small that short conversations do it often.

Backwards   the tokens of a span in the opposite order
Shuffled    a random order for each KV head, the same for the same keys; clusters of one page
Clumped     the same, with clusters of one to three pages
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from spin_hf import ShadowKV
from spin_hf.attention.methods.clustering import ClusteringMethod, TokenClusters
from tests.support.tuning import tuned


@dataclass(frozen=True)
class Backwards(ClusteringMethod, ShadowKV):
    span_tokens: ClassVar[int] = 64
    cluster_interval: ClassVar[int] = 24

    def form_clusters(self, keys: Tensor, observation_queries: Tensor | None) -> TokenClusters:
        return TokenClusters(torch.arange(keys.shape[2] - 1, -1, -1).expand(keys.shape[:3]))


@dataclass(frozen=True)
class Shuffled(Backwards):
    def form_clusters(self, keys: Tensor, observation_queries: Tensor | None) -> TokenClusters:
        generator = torch.Generator().manual_seed(keys.shape[2])
        return TokenClusters(torch.rand(keys.shape[:3], generator=generator).argsort(2))


@dataclass(frozen=True)
class Clumped(Shuffled):
    def form_clusters(self, keys: Tensor, observation_queries: Tensor | None) -> TokenClusters:
        pages = torch.zeros((*keys.shape[:2], keys.shape[2] // self.page_size), dtype=torch.int64)
        for head in range(pages.shape[1]):
            begin, size = 0, 1 + head
            while begin < pages.shape[2]:
                size = min(size % 3 + 1, pages.shape[2] - begin)
                pages[:, head, begin] = size
                begin += size
        return TokenClusters(super().form_clusters(keys, observation_queries).order, pages)


class SelectingAll:
    """Mixed into a method: selects all candidates, whatever the budget."""

    def select(self, query: Any, summary: Any) -> Tensor:
        super().select(query, summary)  # type: ignore[misc]
        pages = torch.arange(query.candidates.shape[1]).expand(query.states.shape[0], query.states.shape[1], -1)
        return torch.where(query.candidates.unsqueeze(1), pages, -1)


@dataclass(frozen=True)
class ShuffledWhole(SelectingAll, Clumped):
    """All candidates, in clustered pages."""


def clustering_often(method: type[Any], span_tokens: int, cluster_interval: int) -> type[Any]:
    """`method` with spans so short that a short context has several."""
    return type(
        f"Small{method.__name__}", (method,), {"span_tokens": span_tokens, "cluster_interval": cluster_interval}
    )


@contextmanager
def little_slack() -> Iterator[None]:
    """Cluster tokens as soon as they have left the recent window by 8 tokens."""
    with tuned(slack_tokens=8):
        yield
