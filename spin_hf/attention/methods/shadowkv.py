"""ShadowKV (arXiv 2410.21465): mean landmarks over 8-token pages, and outlier pages that are always attended to.

    landmark(page)  = mean of its keys (after RoPE)
    score(page)     = max over the query heads of a KV head of  log softmax over candidates (scale * q . landmark)
    outliers        = the pages with the lowest minimum cosine between a key and the landmark: 24 per 1,024 tokens of budget

Outliers count towards the budget, so every method attends to the same number of tokens. The original keeps low-rank keys on the
GPU and fetches values only; here, as in SPIN, keys and values are fetched by page. Generated tokens are indexed like prompt
tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...config import require_count
from ...kernels.descriptor_fields import Rating
from ...kernels.recipe import KernelRecipe
from .base import PageMethod, Query, Summaries


@dataclass(frozen=True)
class ShadowKV(PageMethod):
    """Selects pages by the product of the query with their mean key, the landmark, and outlier pages always.

    An outlier page has a key that its mean describes badly. Outliers count towards the budget.

    Args:
        outlier_pages_per_1024: outlier pages per 1,024 tokens of budget; 0 turns outliers off.
    Raises:
        OptionTypeError, OptionError: not an int in [0, 128] (128 pages of 8 tokens are the whole budget).
    """

    name: ClassVar[str] = "shadowkv"
    outlier_pages_per_1024: int = 24

    def __post_init__(self) -> None:
        count = require_count("outlier_pages_per_1024", self.outlier_pages_per_1024, 0, 128, example=24)
        object.__setattr__(self, "outlier_pages_per_1024", count)

    @property
    def recipe(self) -> KernelRecipe:
        """Kernels serve the whole decode step, and summarise pages as they fill."""
        return KernelRecipe(Rating.LIKELIEST, summarised_by_append=True, outliers_per_1024=self.outlier_pages_per_1024)

    def summary_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        """`landmark` [D] and `min_cosine` []."""
        return {"landmark": (head_dim,), "min_cosine": ()}

    def index(self, keys: Tensor, valid: Tensor) -> Summaries:
        """Mean of the valid keys, and their lowest cosine to it."""
        weight = valid.unsqueeze(-1).float()
        keys = keys.float()
        landmark = (keys * weight).sum(-2) / weight.sum(-2).clamp(min=1)
        cosine = torch.nn.functional.cosine_similarity(keys, landmark.unsqueeze(-2), dim=-1)
        return {"landmark": landmark, "min_cosine": cosine.masked_fill(~valid, 1.0).amin(-1)}

    def score(self, query: Query, summary: Callable[[str], Tensor]) -> Tensor:
        """Maximum over the group of the log softmax over candidate landmarks; +inf for outliers."""
        candidates = query.candidates.unsqueeze(1)
        logits = query.states @ summary("landmark").transpose(-1, -2) * query.scale
        logits = logits.masked_fill(~candidates.unsqueeze(2), float("-inf"))
        scores = torch.log_softmax(logits, dim=-1).amax(2)
        if self.outlier_pages_per_1024 == 0:
            return scores
        outliers = self.num_outlier_pages(query.budget_tokens)
        unlike = (-summary("min_cosine")).masked_fill(~candidates, float("-inf"))
        width = min(int(outliers.max()), unlike.shape[-1])
        worst, pages = unlike.topk(width, dim=-1)
        taken = (torch.arange(width, device=pages.device) < outliers[:, None, None]) & (worst > float("-inf"))
        marks = torch.zeros_like(scores).scatter_(2, pages, taken.to(scores.dtype))
        return scores.masked_fill(marks > 0, float("inf"))

    def num_outlier_pages(self, budget_tokens: Tensor) -> Tensor:
        """Outlier pages [B] for a budget in tokens [B]: proportional, rounded, at least one."""
        return (budget_tokens * self.outlier_pages_per_1024 / 1024).round().long().clamp(min=1)
