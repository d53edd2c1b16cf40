"""What a method adds to choose which tokens make a page: tokens that queries want together should lie together.

    arrange            keys of a stretch, of one sequence ----> their order, and which pages then make a partition
    index_pages        pages in that order               ----> summaries

A partition is a run of pages. Its summary stands in the row of its first page; rows of the others are not read. Tokens that
were not arranged yet (fewer than `growth_tokens`, besides sinks and recent window) lie in pages of consecutive tokens, each a
partition by itself, and may be selected like any other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arrangement:
    """A new order of tokens, by KV head.

    Attributes:
        order: [B, H, n], int64: which token stands at each place, a permutation in each row.
        partition_pages: [B, H, n / P], int64: how many pages the partition has that begins at a page, 0 where none does;
            None where every page is a partition by itself.
    """

    order: Tensor
    partition_pages: Tensor | None = None


class Regrouping(ABC):
    """Mixed into a method: `class Mine(Regrouping, Method)`."""

    stretch_tokens: ClassVar[int] = 8192
    """Most tokens that trade places with one another; an int, or what a prefill brings is split into equal parts."""
    growth_tokens: ClassVar[int] = 1024
    """How many tokens there must be to be arranged, which is how often it happens as a context grows."""

    @abstractmethod
    def arrange(self, keys: Tensor) -> Arrangement:
        """Order tokens.

        Args:
            keys: [1, H, n, D] of consecutive tokens, as cached; n is a multiple of the page size, none is padding.
        """


def merge_pages(means: Tensor, partition_pages: Tensor) -> Tensor:
    """Means of partitions from means of their (equally full) pages.

    Args:
        means: [B, H, n, D]; partition_pages: [B, H, n], which tile the n pages.
    Returns:
        [B, H, n, D], in the rows where partitions begin; zeros in the others.
    """
    begins = partition_pages > 0
    places = torch.arange(means.shape[2], device=means.device)
    first = torch.where(begins, places, 0).cummax(2).values
    sums = torch.zeros_like(means).scatter_add_(2, first.unsqueeze(-1).expand_as(means), means)
    return sums / partition_pages.clamp(min=1).unsqueeze(-1)
