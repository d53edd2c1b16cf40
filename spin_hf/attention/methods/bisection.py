"""Bisection, this project's own method: pages of similar tokens, reranked by four-bit keys; all other pages are estimated.

    cluster    halve the tokens along their principal axis, then the halves, down to full pages. A token is a point: its key,
               and the logarithms of the weights that the observation queries give it
    score      every page         tokens * exp(scale * q . mean key)
    rerank     8 x budget pages   sum over tokens of exp(scale * q . four-bit key); pages in the score bin of the last one too
    select     the budget         both weights as fractions of candidates and sinks, mean over the query heads of a KV head
    estimate   all other pages    mean value, with weight tokens * exp(scale * q . mean key); for a reranked page the reranked
                                  weight if it is larger, at most exp(4) times as large

    row of a page   mean [D]  value [Dv]           int8 or the cache's summary_dtype; the mean is rounded to eight bits always
                    codes [P, D / 2]  scale [P]    keys minus the mean, rotated, four bits per number (`four_bit_keys.py`);
                                                   scale -1 marks an empty place

Attention spent on sinks is fixed, whatever is selected. Weights are therefore normalised over sinks and candidates, so heads
with more attention outside the sinks count more.

The exponential of a mean is at most the mean of the exponentials, so the mean key underestimates a page. The reranked weight
corrects that. It can only raise the estimate: a lower reranked weight is rounding error of the four bits. The error is large
if keys have a few huge channels, so the correction is bounded by exp(4).

A cut leaves 2^k pages before it, the largest power of two below the number of pages. So all nodes of a level have one size and
are halved at the median, except the last one. A level is one batched operation. The axis is the first principal component of
the points, from nine power iterations: the direction of largest variance.

Cost of clustering on a GPU (`kernels/indexing/bisect.py`): 18 launches for 8K tokens, whatever the number of heads and spans.
Levels of 128 tokens and more read the keys twice, 67 MB each time for 8 heads of 32K tokens. Levels below read them once,
mostly from the L2 cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ... import kernels
from ...config import require_tokens
from ...kernels.descriptor_fields import Rating
from ...kernels.recipe import MAX_CORRECTION_NATS, KernelRecipe
from . import four_bit_keys
from .base import Estimate, Method, Pages, Query, Summaries
from .clustering import ClusteringMethod, TokenClusters

POINT_DIM = 128
"""Largest dimension of a point. The kernels keep a matrix of this size squared in registers."""


@dataclass(frozen=True)
class Bisection(ClusteringMethod, Method):
    """Selects pages of similar tokens, by their mean key and then by their keys in four bits. All others are estimated.

    Args:
        rerank_factor: pages to rerank, as a multiple of the budget.
    Raises:
        OptionTypeError, OptionError: not an int of 1 or more.
    """

    name: ClassVar[str] = "bisection"
    page_size: ClassVar[int] = 4
    multi_page_clusters: ClassVar[bool] = False
    num_observation_queries: ClassVar[int] = 32
    rerank_factor: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "rerank_factor", require_tokens("rerank_factor", self.rerank_factor, 1))

    @property
    def recipe(self) -> KernelRecipe:
        """Kernels serve the decode step, except clustering and summaries."""
        return KernelRecipe(
            Rating.MEAN, weighs_tokens=True, rerank_factor=self.rerank_factor, estimated_fraction=1.0, overhead_us=85.0
        )

    def summary_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        """`mean` [D], `value` [Dv], `codes` [P, D / 2] and `scale` [P]."""
        page = self.page_size
        return {"mean": (head_dim,), "value": (value_dim,), "codes": (page, -(-head_dim // 2)), "scale": (page,)}

    def summary_dtypes(self) -> dict[str, torch.dtype]:
        """Codes are bytes. Scales are bfloat16, so they are not rounded to int8."""
        return {"codes": torch.uint8, "scale": torch.bfloat16}

    def index(self, keys: Tensor, valid: Tensor) -> Summaries:
        """Means, and codes of the keys minus the rounded means. The codes so make up for the rounding."""
        values, unit = kernels.quantize(kernels.page_means(keys, valid))
        mean = values * unit.unsqueeze(-1)
        codes, scale = four_bit_keys.encode_pages(keys, mean, valid)
        return {"mean": mean, "codes": codes, "scale": scale}

    def index_pages(self, pages: Pages) -> Summaries:
        """As `index`, with means of the values."""
        return {**self.index(pages.keys, pages.valid), "value": kernels.page_means(pages.values, pages.valid)}

    def form_clusters(self, keys: Tensor, observation_queries: Tensor | None) -> TokenClusters:
        """Order tokens so that each page is one leaf of the bisection."""
        return bisect_tokens(keys, observation_queries, self.page_size)

    def select(self, query: Query, summary: Callable[..., Tensor]) -> Tensor:
        """The best pages by their four-bit keys, among the best by their means."""
        coarse, pages, fine = self._rerank(query, summary)
        rows, none = pages.clamp(min=0), pages < 0
        spare = coarse.shape[3]  # a column that takes the writes of -1
        index = pages.masked_fill(none, spare).unsqueeze(2).expand_as(fine)
        rated = torch.nn.functional.pad(coarse, (0, 1)).scatter(3, index, fine)[..., :spare]
        scores = mean_shares(query, rated).gather(2, rows).masked_fill(none, float("-inf"))
        best = kernels.select_top_pages(scores, query.budget_pages)
        return torch.where(best >= 0, pages.gather(2, best.clamp(min=0)), -1)

    def estimate(self, query: Query, summary: Callable[..., Tensor], pages: Tensor) -> Estimate | None:
        """All candidates except `pages`."""
        assert query.page_tokens is not None
        rest = query.candidates.unsqueeze(1).repeat(1, pages.shape[1], 1)
        b, h, i = (pages >= 0).nonzero(as_tuple=True)
        rest[b, h, pages[b, h, i]] = False
        if not bool(rest.any()):
            return None
        log_tokens = query.page_tokens.float().log().unsqueeze(1).masked_fill(~rest, float("-inf"))
        coarse, reranked, fine = self._rerank(query, summary)
        index = reranked.clamp(min=0).unsqueeze(2).expand_as(fine)
        correction = (fine - coarse.gather(3, index)).clamp(0.0, MAX_CORRECTION_NATS)
        correction = correction.masked_fill((reranked < 0).unsqueeze(2), 0.0)
        logit_correction = torch.zeros_like(coarse).scatter_add_(3, index, correction)  # -1 adds 0 to page 0
        return Estimate(summary("mean"), summary("value"), log_tokens, logit_correction)

    def _rerank(self, query: Query, summary: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Score all pages, and rerank the best.

        Returns:
            Log weights by means [B, H, G, N], the reranked pages [B, H, k], and their log weights [B, H, G, k].
        """
        coarse = self._coarse(query, summary)
        best_by_means = kernels.pages_down_to(mean_shares(query, coarse), query.budget_pages * self.rerank_factor)
        reranked = best_by_means | sink_pages(query).unsqueeze(1)
        pages = kernels.list_pages(reranked.flatten(0, 1)).unflatten(0, reranked.shape[:2])
        return coarse, pages, self._fine(query, summary, pages.clamp(min=0))

    def _coarse(self, query: Query, summary: Callable[..., Tensor]) -> Tensor:
        """Log weights of candidates and sinks by their means, [B, H, G, N]; -inf for other pages."""
        assert query.page_tokens is not None
        tokens = query.page_tokens.float().log()[:, None, None]
        logits = query.states @ summary("mean").transpose(-1, -2) * query.scale + tokens
        return logits.masked_fill(~(query.candidates | sink_pages(query))[:, None, None], float("-inf"))

    def _fine(self, query: Query, summary: Callable[..., Tensor], pages: Tensor) -> Tensor:
        """Log weights of pages [B, H, k] by their four-bit keys, [B, H, G, k]."""
        levels = four_bit_keys.decode(summary("codes", pages), query.states.shape[-1])  # [B, H, k, P, D]
        scale = summary("scale", pages)
        rotated = four_bit_keys.rotate(query.states)
        inside = (rotated @ levels.flatten(2, 3).transpose(-1, -2)).unflatten(3, levels.shape[2:4])
        middle = query.states @ summary("mean", pages).transpose(-1, -2)
        logits = (middle.unsqueeze(-1) + inside * scale.unsqueeze(2)) * query.scale
        return logits.masked_fill((scale < 0).unsqueeze(2), float("-inf")).logsumexp(-1)


def bisect_tokens(keys: Tensor, observation_queries: Tensor | None, page_size: int) -> TokenClusters:
    """Clusters of one page each, the leaves of the bisection. Arguments as for `ClusteringMethod.form_clusters`."""
    fast = keys.is_cuda and keys.element_size() == 2
    points = as_points(keys.to(torch.bfloat16 if fast else torch.float32), observation_queries).flatten(0, 1)
    return TokenClusters(kernels.bisect(points, page_size).unflatten(0, keys.shape[:2]))


def mean_shares(query: Query, log_weights: Tensor) -> Tensor:
    """Logarithm of the share of each candidate in the weights [B, H, G, N] of candidates and sinks, mean over the group.

    Returns:
        [B, H, N], float32; -inf for pages that are not candidates.
    """
    total = log_weights.logsumexp(-1, keepdim=True)
    scores = (log_weights - total).logsumexp(2) - math.log(log_weights.shape[2])
    return scores.masked_fill(~query.candidates.unsqueeze(1), float("-inf"))


def sink_pages(query: Query) -> Tensor:
    """Pages of the sinks: those with tokens before the first candidate, [B, N], bool."""
    assert query.page_tokens is not None
    candidates = query.candidates
    return (candidates.cumsum(1) == 0) & candidates.any(1, keepdim=True) & (query.page_tokens > 0)


def as_points(keys: Tensor, observation_queries: Tensor | None) -> Tensor:
    """Points to bisect: the key of each token, and its attention weights from the observation queries.

    A weight enters as log(1 + n * softmax over the n tokens), mean over the group. These columns are scaled to the variance of
    the keys. If a point would have more than `POINT_DIM` dimensions, keys are projected to fewer: a random subset of the
    dimensions of `four_bit_keys.rotate`, which preserves distances approximately.

    Args:
        keys: [S, H, n, D]; products are computed in their dtype.
        observation_queries: see `ClusteringMethod.form_clusters`.
    Returns:
        [S, H, n, min(D + num_observation_queries, POINT_DIM)].
    """
    if observation_queries is None:
        return _shortened(keys, POINT_DIM)
    weights = keys.new_zeros((), dtype=torch.float32)
    for queries in observation_queries.to(keys.dtype).unbind(2):  # one query head at a time bounds temporary memory
        weights = weights + (queries @ keys.mT).softmax(-1, dtype=torch.float32)
    weights = (weights * (keys.shape[2] / observation_queries.shape[2])).log1p().mT
    keys = _shortened(keys, POINT_DIM - observation_queries.shape[3])
    scale = (_variance(keys) / _variance(weights).clamp(min=1e-20)).sqrt()
    return torch.cat([keys, (weights * scale).to(keys.dtype)], -1)


def _shortened(keys: Tensor, most: int) -> Tensor:
    """Keys [..., D], projected to `most` dimensions if D is larger."""
    dim = keys.shape[-1]
    return keys if dim <= most else keys @ _projection(dim, most, keys.device).to(keys.dtype)


@lru_cache(maxsize=64)
def _projection(dim: int, most: int, device: torch.device) -> Tensor:
    """[dim, most], float32: the rotation of `four_bit_keys`, restricted to random dimensions from a fixed seed."""
    chosen = torch.randperm(dim, generator=torch.Generator().manual_seed(dim))[:most]
    return four_bit_keys.rotate(torch.eye(dim, device=device))[:, chosen.to(device)]


def _variance(points: Tensor) -> Tensor:
    """Total variance of points [S, H, n, D], summed over D: [S, H, 1, 1], float32.

    From means of squares and squares of means: `torch.var` takes 16 bytes of temporary GPU memory for each number.
    """
    squares = torch.linalg.vector_norm(points, dim=(2, 3), keepdim=True, dtype=torch.float32).square() / points.shape[2]
    means = points.mean(2, keepdim=True, dtype=torch.float32)
    return (squares - means.square().sum(-1, keepdim=True)).clamp(min=0.0)
