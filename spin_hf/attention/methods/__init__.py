"""Which pages a query attends to: one method, one file. This is what the author of a method imports.

Method, PageMethod                what a method implements: `PageMethod` selects single pages by a score
Query, Pages, Summaries           what it is given, and what it returns for pages
Estimate                          pseudo-tokens for pages that are not selected
ClusteringMethod, TokenClusters   for a method that decides which tokens form a page
KernelRecipe, Rating              how the Triton kernels serve a method
"""

from ...kernels.descriptor_fields import Rating
from ...kernels.recipe import KernelRecipe
from .base import Estimate, Method, PageMethod, Pages, Query, Summaries
from .bisection import Bisection
from .clustering import ClusteringMethod, TokenClusters
from .fitted import Fitted
from .quest import Quest
from .retroinfer import RetroInfer
from .seer import SeerAttention
from .shadowkv import ShadowKV

__all__ = [
    "Bisection",
    "ClusteringMethod",
    "Estimate",
    "Fitted",
    "KernelRecipe",
    "Method",
    "PageMethod",
    "Pages",
    "Query",
    "Quest",
    "Rating",
    "RetroInfer",
    "SeerAttention",
    "ShadowKV",
    "Summaries",
    "TokenClusters",
]
