"""The interface of a method: how it summarises pages, and which pages it selects for a query.

    index     keys of pages      --> summaries, stored on the GPU: one row per page and KV head
    select    query + summaries  --> pages to attend to, per sequence and KV head
    estimate  query + summaries  --> pseudo-tokens for pages that are not selected; optional

`PageMethod` is the common case. It needs two formulas, `index` and `score`, and selects the pages with the best scores.
`Method` leaves the selection open. Pages are runs of consecutive tokens, unless the method is a `ClusteringMethod` too.

A method sees complete pages outside the sinks and the recent window. Every page that it selects is attended to exactly once.
The docstring of `Method` explains the letters in shapes.
A new method is one file with a frozen dataclass, and one line in `registry.py`.

A method that needs more than keys overrides:

    bind                 called once per cache, before anything is stored: check the model's config, load what the model needs
    index_pages          `index` with layers, values and, if `uses_positions`, the position of each token
    recipe               how the Triton kernels serve the method; without one it decodes by its PyTorch formulas
    scan_basis           the coordinates of codes, if the recipe has `scans_codes`
    project_queries      what the kernels score pages by, if the recipe has `projects_queries`
    projection_tensors   the tensors that `project_queries` reads
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ... import kernels
from ...config import MOST_TOKENS, require_count, require_real
from ...errors import OptionError
from ...kernels.recipe import MAX_SUMMARIES, KernelRecipe
from ...kernels.reference_scan import UNIT_PAGES, CodedBasis

Summaries = dict[str, Tensor]
FittedTensors = dict[str, Tensor]
"""Name -> tensor of `Method.fitted_shapes`."""


@dataclass(frozen=True)
class Query:
    """One query token of every sequence, and the pages that it may select.

    Attributes:
        states: [B, H, G, D], float32: query states, by KV head.
        candidates: [B, N], bool: the pages that may be selected.
        budget_tokens: [B], int64: tokens to select per KV head.
        page_size: tokens per page.
        scale: factor of the attention scores.
        layer: index of the layer among the paged layers.
        positions: [B], int64: real tokens before the query. None unless the method `uses_positions`.
        page_tokens: [B, N], int64: tokens of each page that the query may attend to. The cache always fills it.
        fitted: name -> [B, H, *shape], of `Method.fitted_shapes`. None if the method fits nothing.
        softcap: attention scores become softcap * tanh(score / softcap); None for no cap.
    """

    states: Tensor
    candidates: Tensor
    budget_tokens: Tensor
    page_size: int
    scale: float
    layer: int = 0
    positions: Tensor | None = None
    page_tokens: Tensor | None = None
    fitted: FittedTensors | None = None
    softcap: float | None = None

    @property
    def budget_pages(self) -> Tensor:
        """[B], int64: the budget in pages, rounded up."""
        return torch.div(self.budget_tokens + self.page_size - 1, self.page_size, rounding_mode="floor")


@dataclass(frozen=True)
class Pages:
    """Pages to summarise.

    Attributes:
        keys: [B, H, n, P, D], as cached (after RoPE).
        valid: [B, 1, n, P], bool: False for padding and empty places, which must not count.
        layers: indices of the pages' layers among the paged layers. With several, dimension B holds the same sequences once
            per layer, one layer after the other. Several occur if `layers_alike`, and for pages that a captured step completed.
        values: [B, H, n, P, Dv].
        positions: [B, 1, n, P], int64: real tokens before each token when it was appended, so the position by which `generate`
            rotates its key. Undefined for padding. None unless the method `uses_positions`.
        pages_per_cluster: [B, H, n], int64: number of pages at the first page of each cluster, 0 at its other pages. Clusters
            are complete, their pages consecutive. None unless the method clusters tokens.
        fitted: as in `Query`, with the B of these pages.
    """

    keys: Tensor
    valid: Tensor
    layers: tuple[int, ...]
    values: Tensor
    positions: Tensor | None = None
    pages_per_cluster: Tensor | None = None
    fitted: FittedTensors | None = None


@dataclass(frozen=True)
class Estimate:
    """Pseudo-tokens in the softmax, each in place of several tokens that are not attended to.

    Attributes:
        keys: [B, H, M, D], float32.
        values: [B, H, M, Dv], float32.
        log_tokens: [B, H, M] or [B, H, G, M], float32: logarithm of the number of tokens, added to the score behind any
            softcap; -inf where there is none.
        logit_correction: [B, H, G, M], float32: added to the score of each query head, before any softcap; None for 0.
    """

    keys: Tensor
    values: Tensor
    log_tokens: Tensor
    logit_correction: Tensor | None = None


@dataclass(frozen=True)
class Method(ABC):
    """Selects the pages that a query attends to. Subclasses are frozen dataclasses; their fields are the parameters.

    Shapes of arguments and results:

        B   sequences                          N      pages of a sequence, selectable or not
        H   KV heads                           n      pages to summarise
        G   query heads of each KV head        k, M   pages selected, pseudo-tokens
        P   tokens of a page (page_size)       D, Dv  numbers of a key (and query), of a value

    Attributes:
        name: in messages, and in `SpinCache(method=...)` for the package's own methods.
        page_size: tokens of a page; a power of two if the method has a recipe.
        uses_positions: whether `Pages.positions` and `Query.positions` are filled. Position ids that do not count real tokens
            then raise an error.
        layers_alike: whether `index_pages` ignores the layer, so that one call may summarise the prompt in several layers.
        unit_pages: pages that are summarised together, because their summaries depend on one another: pages u * unit_pages to
            (u + 1) * unit_pages - 1, fewer at the end. `index_pages` gets whole units. A power of two up to 32.
        index_rounds: whether the last bits of a page's summary may depend on the other pages of the call, as they do with
            matrix products.
        has_tensors_by_head: whether it has tensors for each KV head of the whole model, such as gates. A rank of a
            tensor-parallel model, which has some of the heads, refuses it.
    """

    name: ClassVar[str]
    page_size: ClassVar[int] = 8
    uses_positions: ClassVar[bool] = False
    layers_alike: ClassVar[bool] = True
    unit_pages: ClassVar[int] = 1
    index_rounds: ClassVar[bool] = False
    has_tensors_by_head: ClassVar[bool] = False

    def bind(self, config: Any, layers: list[int]) -> Method:
        """The method for one model. Called once per cache, before anything is stored.

        Args:
            config: the model's decoder config.
            layers: indices of the paged layers in the model. `Query.layer` and `Pages.layers` index this list.
        Raises:
            OptionError: the method cannot serve that model.
        """
        return self

    @property
    def recipe(self) -> KernelRecipe | None:
        """How the Triton kernels serve the method; None if they cannot."""
        return None

    def project_queries(self, states: Tensor, positions: Tensor, layer: int) -> Tensor:
        """The queries that the kernels multiply with the first summary, if the recipe has `projects_queries`.

        Runs inside a captured step, so it must not wait for the device.

        Args:
            states: [B, H, G, D], query states, by KV head.
            positions: [B], integers, as `Query.positions`.
            layer: index of the layer among the paged layers.
        Returns:
            [B, H, E], float32.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: expected project_queries, as its recipe has projects_queries; write it"
        )

    def projection_tensors(self, layer: int, device: torch.device) -> tuple[Tensor, ...]:
        """Tensors on the device that `project_queries` reads. Their addresses do not change while the method lives."""
        return ()

    def scan_basis(self, fitted: FittedTensors | None, dtype: torch.dtype) -> CodedBasis:
        """The coordinates of the codes, if the recipe has `scans_codes`; matrices in `dtype`.

        Args:
            fitted: name -> [B, H, *shape], of `fitted_shapes`.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: expected scan_basis, as its recipe has scans_codes; write it"
        )

    def saved_parameters(self) -> dict[str, Any]:
        """What a saved cache records of the method; a cache that loads it must have a method with the same.

        By default the fields. A tensor is recorded by its hash, other objects by their `repr`. Tensors of
        `projection_tensors` are recorded too.
        """
        return {field.name: getattr(self, field.name) for field in fields(self) if field.init}

    def fitted_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of tensors, per KV head, that a `ClusteringMethod` fits to each sequence. {} for none."""
        return {}

    def fitted_dtypes(self) -> dict[str, torch.dtype]:
        """Dtypes of tensors of `fitted_shapes`, by name; float32 for those that are missing."""
        return {}

    @abstractmethod
    def summary_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what is kept of one page, given the sizes of a key and a value; () is a number."""

    @property
    def pages_per_row(self) -> dict[str, int]:
        """Name -> `unit_pages`, for summaries that all pages of a unit have in common. They are stored once per unit."""
        return {}

    def summary_dtypes(self) -> dict[str, torch.dtype]:
        """Summaries with a fixed dtype, by name. The others are stored in the cache's `summary_dtype`."""
        return {}

    def index_pages(self, pages: Pages) -> Summaries:
        """Summarise pages, as `index` does. Pages of one cluster may get the same row.

        Override `index` instead if keys are enough.
        """
        return self.index(pages.keys, pages.valid)

    def index(self, keys: Tensor, valid: Tensor) -> Summaries:
        """Summarise pages. Every method overrides this or `index_pages`.

        Args:
            keys: [B, H, n, P, D], as cached (after RoPE).
            valid: [B, 1, n, P], bool: False for padding and empty places, which must not count.
        Returns:
            name -> [B, H, n, *shape], float32 or the dtype from `summary_dtypes`. Finite, also for pages without a valid token.
            For names in `pages_per_row`, n is the number of units.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: expected index or index_pages, got neither; write one of them"
        )

    @abstractmethod
    def select(self, query: Query, summary: Callable[..., Tensor]) -> Tensor:
        """Select pages.

        Args:
            query: the query and its budget.
            summary: `summary(name)` gives [B, H, N, *shape] of all pages; `summary(name, pages)` with pages [B, H, k] gives
                [B, H, k, *shape].
        Returns:
            Page numbers [B, H, k], int64, candidates only, distinct in each row; -1 fills the row.
        """

    def estimate(self, query: Query, summary: Callable[..., Tensor], pages: Tensor) -> Estimate | None:
        """Pseudo-tokens for candidates that were not selected; None for none.

        Args:
            query, summary: as for `select`.
            pages: [B, H, k], what `select` returned.
        """
        return None


_FORMULAS = (
    "index", "index_pages", "select", "score", "estimate", "summary_shapes", "summary_dtypes", "project_queries",
)  # fmt: skip


def recipe_of(method: Method) -> KernelRecipe | None:
    """The recipe of a method. None if a subclass of the class that states it overrides a formula."""
    for kind in type(method).__mro__:
        if "recipe" in vars(kind):
            return method.recipe
        if any(name in vars(kind) for name in _FORMULAS):
            return None
    return None


def check_recipe(method: Method) -> None:
    """Raise OptionError if the kernels cannot run a method's recipe."""
    recipe = recipe_of(method)
    if recipe is None:
        return
    for name in ("outliers_per_1024", "rerank_factor", "dense_layers"):
        require_count(f"{method.name}: recipe: {name}", getattr(recipe, name), 0, MOST_TOKENS)
    for name in ("estimated_fraction", "threshold"):
        fraction = require_real(f"{method.name}: recipe: {name}", getattr(recipe, name), 0.0)
        if not 0.0 <= fraction <= 1.0:
            raise OptionError(
                f"{method.name}: recipe: {name}: expected a fraction in [0, 1], got {fraction}; pass 0.0 for none"
            )
    shapes = list(method.summary_shapes(16, 32).values())
    unit_pages = UNIT_PAGES if recipe.scans_codes else 1
    if method.unit_pages != unit_pages:
        raise OptionError(
            f"{method.name}: expected unit_pages of {unit_pages}, as its recipe has scans_codes={recipe.scans_codes}, got "
            f"{method.unit_pages}; change it, or leave recipe out"
        )
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
    if recipe.scans_codes and shapes != [(16,), (method.page_size, 4), (method.page_size,), (8,), ()]:
        raise OptionError(
            f"{method.name}: expected the summaries of CodedPages, as its recipe has scans_codes, got shapes {shapes} for head "
            "sizes 16 and 32; change them, or leave recipe out"
        )
    if (recipe.summarised_by_append or recipe.outliers_per_1024) and shapes != [(16,), ()]:
        raise OptionError(
            f"{method.name}: expected a vector [D] and a number as summaries, as its recipe has summarised_by_append or "
            f"outliers_per_1024, got shapes {shapes} for head sizes 16 and 32; leave these out of the recipe"
        )


@dataclass(frozen=True)
class PageMethod(Method):
    """A method that selects single pages: those with the best scores, up to the budget."""

    @abstractmethod
    def score(self, query: Query, summary: Callable[..., Tensor]) -> Tensor:
        """Scores of all pages, [B, H, N], float32: higher ones are selected first. Only candidates count.

        Args:
            query, summary: as for `select`.
        """

    def select(self, query: Query, summary: Callable[..., Tensor]) -> Tensor:
        """The `query.budget_pages` best candidates of every KV head."""
        scores = self.score(query, summary).masked_fill(~query.candidates.unsqueeze(1), float("-inf"))
        return kernels.select_top_pages(scores, query.budget_pages)
