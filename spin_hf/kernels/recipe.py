"""How the Triton kernels serve a method: which of them, with which numbers. A method without a recipe decodes by its formulas.

score      product of the query with the first vector that the method keeps of a page, or with a box: the first two
rate       what the products of a group make of the page
           with `projects_queries`, a KV head has one query, which the method makes of its group's (`Method.project_queries`)
closer     with `rerank_factor`: so many times the budget is rated again, by keys in four bits (third and fourth summary)
choose     the best pages up to the budget
estimate   with `estimated_share`: what is not chosen enters the softmax by its means (first and second summary)
"""

from __future__ import annotations

from dataclasses import dataclass

from .descriptor_fields import Rating

MAX_SUMMARIES = 4
"""Of a page, that a layer descriptor has fields for."""


MAX_CORRECTION_NATS = 4.0
"""Nats by which a page that was looked at closer may count for more than by its mean, where its means stand for its tokens."""


@dataclass(frozen=True)
class KernelRecipe:
    """See the module's head.

    Attributes:
        rating: what the logits of a group make of a page.
        summarised_by_append: whether the kernel that appends summarises complete pages too, whatever `index` says: only for
            what keeps exactly ShadowKV's two summaries, by its formulas.
        outliers_per_1024: pages of 1,024 budget tokens that go to outliers; above 0 only with these two.
        weighs_tokens: whether a page counts in the softmax as often as it has tokens.
        rerank_factor: how many times the budget is looked at closer; 0 for not at all. What is not chosen of it is estimated by
            the weight that came of that.
        estimated_share: share of the candidates that is estimated, next to what is chosen; 1 for all, 0 for none.
        projects_queries: whether the method makes the queries that pages are scored by.
        threshold: share that a page must exceed to be chosen, unless the budget covers all candidates; 0 for any.
        dense_layers: how many of the first paged layers attend to everything.
    """

    rating: Rating
    summarised_by_append: bool = False
    outliers_per_1024: int = 0
    weighs_tokens: bool = False
    rerank_factor: int = 0
    estimated_share: float = 0.0
    projects_queries: bool = False
    threshold: float = 0.0
    dense_layers: int = 0

    @property
    def estimated_billionths(self) -> int:
        """The share that is estimated, as kernels are told: 0 only where nothing is."""
        return max(round(self.estimated_share * 1e9), int(self.estimated_share > 0))

    @property
    def estimates_zone(self) -> bool:
        """Whether only some of what is not selected is estimated."""
        return 0 < self.estimated_share < 1
