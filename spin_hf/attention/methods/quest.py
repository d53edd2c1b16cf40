"""Quest (arXiv 2406.10774): pages of 16 tokens, each bounded by a box around its keys.

    low, high(page)  = smallest and largest value of its keys (after RoPE), channel by channel
    score(page)      = max over the query heads of a KV head of  sum over channels of max(q * low, q * high)

The score is an upper bound of q . k over the keys of a page. The first layers attend to all pages, because their attention is
spread widely. The original selects per query head; here, as in SPIN, the query heads of a KV head share their pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...config import require_tokens
from ...kernels.descriptor_fields import Rating
from ...kernels.recipe import KernelRecipe
from .base import PageMethod, Query, Summaries


@dataclass(frozen=True)
class Quest(PageMethod):
    """Selects pages by an upper bound of query times key, from the minima and maxima of their keys.

    Args:
        dense_layers: number of first paged layers that attend to all pages.
    Raises:
        OptionTypeError, OptionError: not an int of 0 or more.
    """

    name: ClassVar[str] = "quest"
    page_size: ClassVar[int] = 16
    dense_layers: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_layers", require_tokens("dense_layers", self.dense_layers, 0))

    @property
    def recipe(self) -> KernelRecipe:
        """Scores by upper bounds; the first layers are dense."""
        return KernelRecipe(Rating.BOUND, dense_layers=self.dense_layers, overhead_us=27.0)

    def summary_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        """`low` [D] and `high` [D]."""
        return {"low": (head_dim,), "high": (head_dim,)}

    def index(self, keys: Tensor, valid: Tensor) -> Summaries:
        """Minima and maxima of the valid keys; zeros for pages without one."""
        hidden, some = ~valid.unsqueeze(-1), valid.any(-1, keepdim=True)
        keys = keys.float()
        low = keys.masked_fill(hidden, float("inf")).amin(-2)
        high = keys.masked_fill(hidden, float("-inf")).amax(-2)
        return {"low": low.where(some, 0.0), "high": high.where(some, 0.0)}

    def score(self, query: Query, summary: Callable[[str], Tensor]) -> Tensor:
        """Maximum over the group of the upper bounds."""
        low, high = (summary(name).transpose(-1, -2) for name in ("low", "high"))
        positive = query.states.clamp(min=0)  # max(q * low, q * high) is q * high where q is positive, else q * low
        return (positive @ high + (query.states - positive) @ low).amax(2)

    def select(self, query: Query, summary: Callable[[str], Tensor]) -> Tensor:
        """The best candidates up to the budget; all of them in the first layers."""
        if query.layer < self.dense_layers:
            all_tokens = torch.full_like(query.budget_tokens, query.candidates.shape[1] * query.page_size)
            query = replace(query, budget_tokens=all_tokens)
        return super().select(query, summary)
