"""What a method is: how it summarises pages, and which pages a query needs.

    index    keys of pages ----> summaries (kept on the GPU, one row per page and KV head)
    select   query + summaries ----> pages to attend to, per sequence and KV head
    estimate query + summaries ----> what stands for (some of) the other pages in the softmax; most methods have nothing

A *partition* is what a method selects as a whole. `Method` leaves its shape open: `select` may return any pages.
`PageMethod` is the common case, partition = page: it asks for two formulas and does the rest. What tokens make a page is a
method's business too if it is `ClusteringMethod`; pages are else runs of positions.

Sinks, the recent window and padding are not a method's business: it is shown complete pages (of valid tokens) that are
neither, and whatever it chooses is attended to exactly once. A new method is one file with a frozen dataclass, and one
line in `methods.py`.

Methods that need more than keys override, beside `index` or instead of it:

    bind             once per cache, before anything is stored: the model's config; refuse it, or return what serves it
    index_pages      as `index`, with the layer, the values and, of a method that `uses_positions`, where each token stands
    recipe           how the Triton kernels serve it; without, it decodes by its formulas on a GPU too
    project_queries   where its recipe has `projects_queries`: what the kernels score pages by; and `projection_tensors`,
    which that reads
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import kernels
from ...config import MOST_TOKENS, require_count, require_real
from ...errors import OptionError
from ...kernels.recipe import MAX_SUMMARIES, KernelRecipe

Summaries = dict[str, Tensor]


@dataclass(frozen=True)
class Query:
    """One query token of every sequence, and what it may select from.

    Attributes:
        states: [B, H, G, D], float32: the query states of a token, by KV head.
        candidates: [B, N], bool: the pages that may be selected.
        budget_tokens: [B], int64: tokens to select per KV head.
        page_size: tokens per page.
        scale: factor of the attention scores.
        layer: number of the layer among the paged ones.
        positions: [B], int64: real tokens before the query, of a method that `uses_positions`; else None.
        page_tokens: [B, N], int64: tokens of each page that the query may attend to; None where nobody asks.
    """

    states: Tensor
    candidates: Tensor
    budget_tokens: Tensor
    page_size: int
    scale: float
    layer: int = 0
    positions: Tensor | None = None
    page_tokens: Tensor | None = None

    @property
    def budget_pages(self) -> Tensor:
        """[B], int64: the budget in pages, rounded up."""
        return torch.div(self.budget_tokens + self.page_size - 1, self.page_size, rounding_mode="floor")


@dataclass(frozen=True)
class Pages:
    """Pages of every sequence to summarise, and where they are from.

    Attributes:
        keys: [B, H, n, P, D], as cached (after RoPE).
        valid: [B, 1, n, P], bool: False for padding and for places not filled yet, which must not count.
        layers: numbers of their layers among the paged ones: pages of as many sequences from each, one layer after the other.
            One number only, unless the layers are alike or the pages are those that a captured step completed.
        values: [B, H, n, P, Dv].
        positions: [B, 1, n, P], int64: real tokens before each token when it came, which is what `generate` rotates its key
            by; meaningless for padding. None unless the method `uses_positions`.
        pages_per_cluster: [B, H, n], int64: pages of the partition that each page begins, 0 where it continues one; partitions
            are whole, and their pages follow each other. None unless the method clusters tokens.
    """

    keys: Tensor
    valid: Tensor
    layers: tuple[int, ...]
    values: Tensor
    positions: Tensor | None = None
    pages_per_cluster: Tensor | None = None


@dataclass(frozen=True)
class Estimate:
    """Pseudo-tokens that stand for tokens which are not attended to: they enter the same softmax.

    Attributes:
        keys: [B, H, M, D], float32.
        values: [B, H, M, Dv], float32.
        log_tokens: [B, H, M], float32: logarithm of how many tokens each stands for, which is added to its score; -inf
            where there is none.
        logit_correction: [B, H, G, M], float32: what is added to its score besides, by query head, and before any softcap;
            None for nothing.
    """

    keys: Tensor
    values: Tensor
    log_tokens: Tensor
    logit_correction: Tensor | None = None


@dataclass(frozen=True)
class Method(ABC):
    """A way to choose the pages that a query attends to. Subclasses are frozen and hold their own parameters only.

    Attributes:
        uses_positions: whether `Pages.positions` and `Query.positions` are wanted; a model whose position ids do not count
            real tokens is then refused.
        layers_alike: whether `index_pages` does the same for every layer, so that prompts may be summarised in several at once.
        index_rounds: whether a page's summary may differ in its last bits with the pages it is indexed among, as sums of
            matrix products do.
    """

    name: ClassVar[str]
    page_size: ClassVar[int] = 8
    uses_positions: ClassVar[bool] = False
    layers_alike: ClassVar[bool] = True
    index_rounds: ClassVar[bool] = False

    def bind(self, config: Any, layers: list[int]) -> Method:
        """The method for one model; called once per cache, before anything is stored.

        Args:
            config: the model's decoder config.
            layers: the paged layers' numbers in the model; `Query.layer` and `Pages.layers` count in this list.
        Raises:
            OptionError: the method cannot serve that model.
        """
        return self

    @property
    def recipe(self) -> KernelRecipe | None:
        """How the Triton kernels serve the method; None if they do not."""
        return None

    def project_queries(self, states: Tensor, positions: Tensor, layer: int) -> Tensor:
        """What the kernels multiply the first summary with, of a method whose recipe has `projects_queries`. Never waits for
        the device.

        Args:
            states: [B, H, G, D], the query states of a token, by KV head.
            positions: [B], integers, as `Query.positions`.
            layer: number of the layer among the paged ones.
        Returns:
            [B, H, E], float32.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: expected project_queries, as its recipe has projects_queries; write it"
        )

    def projection_tensors(self, layer: int, device: torch.device) -> tuple[Tensor, ...]:
        """Tensors on the device that `project_queries` reads; they stay where they are for as long as the method lives."""
        return ()

    @abstractmethod
    def summary_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of the float32 vectors kept of each page, given the sizes of its keys and values."""

    def summary_dtypes(self) -> dict[str, torch.dtype]:
        """Names of those that are kept in a dtype of their own, whatever the cache is told; the others are its choice."""
        return {}

    def index_pages(self, pages: Pages) -> Summaries:
        """Summarise pages, as `index`; what is common to a partition in the row of each of its pages.

        By keys alone: override `index`.
        """
        return self.index(pages.keys, pages.valid)

    def index(self, keys: Tensor, valid: Tensor) -> Summaries:
        """Summarise pages. Every method has this or `index_pages`.

        Args:
            keys: [B, H, n, P, D], as cached (after RoPE).
            valid: [B, 1, n, P], bool: False for padding and for places not filled yet, which must not count.
        Returns:
            name -> [B, H, n, *shape], float32 or the dtype of its own, finite even for pages without a valid token.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: expected index or index_pages, got neither; write one of them"
        )

    @abstractmethod
    def select(self, query: Query, summary: Callable[..., Tensor]) -> Tensor:
        """Choose pages.

        Args:
            query: the query and its budget.
            summary: gives the summaries [B, H, N, *shape] of a name; with pages [B, H, k], those of these only.
        Returns:
            Page numbers [B, H, k], int64, distinct in each row, candidates only; -1 for none.
        """

    def estimate(self, query: Query, summary: Callable[..., Tensor], pages: Tensor) -> Estimate | None:
        """What stands for candidates that were not selected; None for nothing.

        Args:
            query, summary: as for `select`.
            pages: [B, H, k], what `select` returned.
        """
        return None


_FORMULAS = (
    "index", "index_pages", "select", "score", "estimate", "summary_shapes", "summary_dtypes", "project_queries",
)  # fmt: skip


def recipe_of(method: Method) -> KernelRecipe | None:
    """The recipe of a method, unless its class changes formulas that the recipe was written for."""
    for kind in type(method).__mro__:
        if "recipe" in vars(kind):
            return method.recipe
        if any(name in vars(kind) for name in _FORMULAS):
            return None
    return None


def check_recipe(method: Method) -> None:
    """Raise OptionError where a method's recipe asks for what the kernels cannot do."""
    recipe = recipe_of(method)
    if recipe is None:
        return
    for name in ("outliers_per_1024", "rerank_factor", "dense_layers"):
        require_count(f"{method.name}: recipe: {name}", getattr(recipe, name), 0, MOST_TOKENS)
    for name in ("estimated_share", "threshold"):
        share = require_real(f"{method.name}: recipe: {name}", getattr(recipe, name), 0.0)
        if not 0.0 <= share <= 1.0:
            raise OptionError(
                f"{method.name}: recipe: {name}: expected a share in [0, 1], got {share}; pass 0.0 for none"
            )
    shapes = list(method.summary_shapes(16, 32).values())
    if method.page_size & (method.page_size - 1):
        raise OptionError(
            f"{method.name}: expected a page_size that is a power of two, as it has a recipe for kernels, got "
            f"{method.page_size}; take another, or leave recipe out"
        )
    if len(shapes) > MAX_SUMMARIES:
        raise OptionError(
            f"{method.name}: expected at most {MAX_SUMMARIES} summaries, as it has a recipe for kernels, got {len(shapes)}; "
            "keep fewer, or leave recipe out"
        )
    if (recipe.summarised_by_append or recipe.outliers_per_1024) and shapes != [(16,), ()]:
        raise OptionError(
            f"{method.name}: expected a vector [D] and a number as summaries, as its recipe has summarised_by_append or "
            f"outliers_per_1024, got shapes {shapes} for head sizes 16 and 32; leave these out of the recipe"
        )


@dataclass(frozen=True)
class PageMethod(Method):
    """A method whose partition is one page: the best-scoring pages up to the budget."""

    @abstractmethod
    def score(self, query: Query, summary: Callable[..., Tensor]) -> Tensor:
        """Score pages [B, H, N], float32: higher is chosen first, +inf always; non-candidates are ignored."""

    def select(self, query: Query, summary: Callable[..., Tensor]) -> Tensor:
        """The `query.budget_pages` best candidates of every KV head."""
        scores = self.score(query, summary).masked_fill(~query.candidates.unsqueeze(1), float("-inf"))
        return kernels.select_top_pages(scores, query.budget_pages)
