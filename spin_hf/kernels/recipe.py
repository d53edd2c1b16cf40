"""How the Triton kernels implement a method: which of them run, with which parameters.

A method without a recipe decodes in PyTorch.

scan       `scans_codes`: log weights of all pages and the estimate of all candidates from coded pages, in one pass, in place
           of score, rerank and estimate (`reference_scan.py`)
score      logits: the query times the first summary of each page, or the bound by a box (first and second summary)
           `projects_queries`: one query per KV head, made by `Method.project_queries`
bin        one score per page and KV head, from the logits of the group
rerank     `rerank_factor` > 0: that many times the budget is scored again, by 4-bit keys (third and fourth summary)
select     the best pages up to the budget
estimate   `estimated_fraction` > 0: pages that are not selected enter the softmax by their means (first and second summary)
"""

from __future__ import annotations

from dataclasses import dataclass

from .descriptor_fields import Rating

MAX_SUMMARIES = 5
"""Summaries of a page that a layer descriptor has fields for."""


MAX_CORRECTION_NATS = 4.0
"""Upper limit, in nats, of the correction that reranking adds to the logit of an estimated page."""


@dataclass(frozen=True)
class KernelRecipe:
    """Parameters of the Triton kernels for one method; see the module's head.

    Attributes:
        rating: how the logits of a group become a page's score.
        summarised_by_append: whether the append kernel also summarises complete pages, instead of the method's `index`. Only
            for methods with exactly ShadowKV's two summaries.
        outliers_per_1024: outlier pages per 1,024 tokens of budget; above 0 only with ShadowKV's two summaries.
        weighs_tokens: whether a page's weight in the softmax is multiplied by its number of valid tokens.
        rerank_factor: pages to rerank, as a multiple of the budget; 0 for no reranking. A reranked page that is not selected
            is estimated with its corrected logit.
        estimated_fraction: fraction of the candidates that is estimated beside the selected pages; 1 for all, 0 for none.
        projects_queries: whether the method makes the queries that pages are scored by.
        threshold: probability that a page must exceed to be selected, unless the budget covers all candidates; 0 for none.
        scans_codes: whether pages have the five summaries of `reference_scan.CodedPages`, in units of `UNIT_PAGES`, and each
            sequence has the basis of `Method.scan_basis`.
        overhead_us: microseconds that a layer's keys and values take to read where sparse and dense steps are equally fast, on
            an H200. For `dense_below="auto"`: shorter contexts are read whole. The default is that of `shadowkv`.
        dense_layers: how many of the first paged layers attend to all tokens.
    """

    rating: Rating
    summarised_by_append: bool = False
    outliers_per_1024: int = 0
    weighs_tokens: bool = False
    rerank_factor: int = 0
    estimated_fraction: float = 0.0
    projects_queries: bool = False
    threshold: float = 0.0
    scans_codes: bool = False
    overhead_us: float = 13.0
    dense_layers: int = 0

    def serves(self, key_dim: int, value_dim: int) -> bool:
        """Whether the kernels take keys and values of these sizes."""
        return not self.scans_codes or (key_dim % 16 == 0 and value_dim % 16 == 0)

    @property
    def estimated_billionths(self) -> int:
        """`estimated_fraction` in billionths, for the kernels; 0 only if the fraction is 0."""
        return max(round(self.estimated_fraction * 1e9), int(self.estimated_fraction > 0))

    @property
    def estimates_zone(self) -> bool:
        """Whether only some of the pages that are not selected are estimated."""
        return 0 < self.estimated_fraction < 1
