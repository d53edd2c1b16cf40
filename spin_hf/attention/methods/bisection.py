"""Bisection, this project's own method: pages of tokens that lie together, rated by low-bit keys, and means for all others.

    arrange    part the tokens along their main axis, and the parts again, down to full pages; what a token is there: its key,
               and beside it the logarithms of the weights that the queries of the prompt's end give it
    select     8 x budget pages   by  tokens * exp(scale * q . mean key), and those in one bin of scores with the last of them
               of them the budget by  sum over tokens of exp(scale * q . key in four bits)
               both as shares of all candidates and sinks, mean over the query heads of a KV head
    estimate   all other pages enter the softmax by their mean value and tokens * exp(scale * q . mean key); those that were
               looked at closer by what came of that, if it is more, and up to exp(4) times as much

    row of a page   mean [D]  value [Dv]           as int8, or as the cache is told; the mean has eight bits in any case
                    codes [P, D / 2]  scale [P]    keys less that mean, rotated, four bits a number (`four_bit_keys.py`);
                                                   the scale is -1 where there is no token

What of a head's attention its sinks take does not depend on what is chosen: of two heads of a group, the one with more left is
to decide.

The exponential of a mean is never more than the mean of exponentials, so by its mean a page counts for too little, and a close
look says by how much. For less it never counts: a look that finds less is off by its four bits. Where keys have a few huge
channels these are off by far more than where pages come in an order, which is why there is a bound above.

A cut leaves before it the most pages that are a power of two, and one behind it at least: so all parts are halved at the median
and are of one size, but for the last, and a level is one batched operation. The axis is the first principal one of the keys,
by nine power iterations, which is what splits their spread best.

Cost of an arrangement on a GPU (`kernels/indexing/bisect.py`): 18 launches for 8K tokens, whatever the number of heads and
spans. A level of 128 tokens and more reads the keys twice, 67 MB each time for 8 heads of 32K tokens; those below read
them once each, mostly from the second-level cache.
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
"""Most numbers of a point, as the kernels keep the products of all of them with each other in registers."""


@dataclass(frozen=True)
class Bisection(ClusteringMethod, Method):
    """Bisected pages, chosen in two stages.

    Args:
        rerank_factor: how many times the budget is looked at in the second stage, at least; all of the context at most.
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
        """All of it by kernels, but what clusters and summarises."""
        return KernelRecipe(Rating.SHARE, weighs_tokens=True, rerank_factor=self.rerank_factor, estimated_share=1.0)

    def summary_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        """`mean` [D], `value` [Dv], `codes` [P, D / 2] and `scale` [P]."""
        page = self.page_size
        return {"mean": (head_dim,), "value": (value_dim,), "codes": (page, -(-head_dim // 2)), "scale": (page,)}

    def summary_dtypes(self) -> dict[str, torch.dtype]:
        """Codes are bytes; scales do without another rounding."""
        return {"codes": torch.uint8, "scale": torch.bfloat16}

    def index(self, keys: Tensor, valid: Tensor) -> Summaries:
        """Means, and codes of what the keys differ from them: so both together are as exact as if means had more bits."""
        values, unit = kernels.quantize(kernels.page_means(keys, valid))
        mean = values * unit.unsqueeze(-1)
        codes, scale = four_bit_keys.encode_pages(keys, mean, valid)
        return {"mean": mean, "codes": codes, "scale": scale}

    def index_pages(self, pages: Pages) -> Summaries:
        """As `index`, and means of the values."""
        return {**self.index(pages.keys, pages.valid), "value": kernels.page_means(pages.values, pages.valid)}

    def form_clusters(self, keys: Tensor, observation_queries: Tensor | None) -> TokenClusters:
        """Page by page, each of tokens that no halving has parted."""
        fast = keys.is_cuda and keys.element_size() == 2
        points = as_points(keys.to(torch.bfloat16 if fast else torch.float32), observation_queries).flatten(0, 1)
        return TokenClusters(kernels.bisect(points, self.page_size).unflatten(0, keys.shape[:2]))

    def select(self, query: Query, summary: Callable[..., Tensor]) -> Tensor:
        """The best pages by their low-bit keys, among the best by their means."""
        coarse, pages, fine = self._rerank(query, summary)
        rows, none = pages.clamp(min=0), pages < 0
        spare = coarse.shape[3]  # a column for the places of no page
        index = pages.masked_fill(none, spare).unsqueeze(2).expand_as(fine)
        rated = torch.nn.functional.pad(coarse, (0, 1)).scatter(3, index, fine)[..., :spare]
        shares = self._shares(query, rated).gather(2, rows).masked_fill(none, float("-inf"))
        best = kernels.select_top_pages(shares, query.budget_pages)
        return torch.where(best >= 0, pages.gather(2, best.clamp(min=0)), -1)

    def estimate(self, query: Query, summary: Callable[..., Tensor], pages: Tensor) -> Estimate | None:
        """All candidates but `pages`."""
        assert query.page_tokens is not None
        rest = query.candidates.unsqueeze(1).repeat(1, pages.shape[1], 1)
        b, h, i = (pages >= 0).nonzero(as_tuple=True)
        rest[b, h, pages[b, h, i]] = False
        if not bool(rest.any()):
            return None
        log_tokens = query.page_tokens.float().log().unsqueeze(1).masked_fill(~rest, float("-inf"))
        coarse, reranked, fine = self._rerank(query, summary)
        index = reranked.clamp(min=0).unsqueeze(2).expand_as(fine)
        more = (
            (fine - coarse.gather(3, index))
            .clamp(0.0, MAX_CORRECTION_NATS)
            .masked_fill((reranked < 0).unsqueeze(2), 0.0)
        )
        logit_correction = torch.zeros_like(coarse).scatter_add_(3, index, more)  # places of no page add nothing
        return Estimate(summary("mean"), summary("value"), log_tokens, logit_correction)

    def _rerank(self, query: Query, summary: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights [B, H, G, N] by means, the pages that are looked at closer [B, H, k], and theirs [B, H, G, k] by that."""
        coarse = self._coarse(query, summary)
        best_by_means = kernels.pages_down_to(self._shares(query, coarse), query.budget_pages * self.rerank_factor)
        reranked = best_by_means | _sinks(query).unsqueeze(1)
        pages = kernels.list_pages(reranked.flatten(0, 1)).unflatten(0, reranked.shape[:2])
        return coarse, pages, self._fine(query, summary, pages.clamp(min=0))

    def _coarse(self, query: Query, summary: Callable[..., Tensor]) -> Tensor:
        """Logarithm of the weight of candidates and sinks, by their means: [B, H, G, N]; -inf for all others."""
        assert query.page_tokens is not None
        tokens = query.page_tokens.float().log()[:, None, None]
        logits = query.states @ summary("mean").transpose(-1, -2) * query.scale + tokens
        return logits.masked_fill(~(query.candidates | _sinks(query))[:, None, None], float("-inf"))

    def _fine(self, query: Query, summary: Callable[..., Tensor], pages: Tensor) -> Tensor:
        """The same by low-bit keys, of pages [B, H, k]: [B, H, G, k]."""
        levels = four_bit_keys.decode(summary("codes", pages), query.states.shape[-1])  # [B, H, k, P, D]
        scale = summary("scale", pages)
        rotated = four_bit_keys.rotate(query.states)
        inside = (rotated @ levels.flatten(2, 3).transpose(-1, -2)).unflatten(3, levels.shape[2:4])
        middle = query.states @ summary("mean", pages).transpose(-1, -2)
        logits = (middle.unsqueeze(-1) + inside * scale.unsqueeze(2)) * query.scale
        return logits.masked_fill((scale < 0).unsqueeze(2), float("-inf")).logsumexp(-1)

    def _shares(self, query: Query, log_weights: Tensor) -> Tensor:
        """Logarithm of the share of each candidate in all weights, mean over the group: [B, H, N]; -inf for others."""
        total = log_weights.logsumexp(-1, keepdim=True)
        shares = (log_weights - total).logsumexp(2) - math.log(log_weights.shape[2])
        return shares.masked_fill(~query.candidates.unsqueeze(1), float("-inf"))


def _sinks(query: Query) -> Tensor:
    """Pages with tokens that come before all candidates: [B, N]."""
    assert query.page_tokens is not None
    candidates = query.candidates
    return (candidates.cumsum(1) == 0) & candidates.any(1, keepdim=True) & (query.page_tokens > 0)


def as_points(keys: Tensor, observation_queries: Tensor | None) -> Tensor:
    """What tokens are when they are parted: their keys, and how much the queries of the prompt's end want each of them.

    The latter is log(1 + n * weight) for each query, the weight being a softmax over the n tokens, mean over the group; it is
    scaled to spread as much as the keys. Where both are more than `POINT_DIM` numbers, fewer stand for the keys: some of those
    in the basis of `four_bit_keys.rotate`, which keep distances but for chance.

    Args:
        keys: [S, H, n, D], in the dtype of all products; observation_queries: see `ClusteringMethod.form_clusters`.
    Returns:
        [S, H, n, D + num_observation_queries, or `POINT_DIM` if that is less].
    """
    if observation_queries is None:
        return _shortened(keys, POINT_DIM)
    wanted = keys.new_zeros((), dtype=torch.float32)
    for queries in observation_queries.to(keys.dtype).unbind(2):  # one after the other, which bounds temporary memory
        wanted = wanted + (queries @ keys.mT).softmax(-1, dtype=torch.float32)
    wanted = (wanted * (keys.shape[2] / observation_queries.shape[2])).log1p().mT
    keys = _shortened(keys, POINT_DIM - observation_queries.shape[3])
    scale = (_spread(keys) / _spread(wanted).clamp(min=1e-20)).sqrt()
    return torch.cat([keys, (wanted * scale).to(keys.dtype)], -1)


def _shortened(keys: Tensor, most: int) -> Tensor:
    """Keys [..., D], of `most` numbers each at most."""
    dim = keys.shape[-1]
    return keys if dim <= most else keys @ _projection(dim, most, keys.device).to(keys.dtype)


@lru_cache(maxsize=64)
def _projection(dim: int, most: int, device: torch.device) -> Tensor:
    """[dim, most], float32: numbers of what `four_bit_keys.rotate` gives, chosen at random once and for all."""
    chosen = torch.randperm(dim, generator=torch.Generator().manual_seed(dim))[:most]
    return four_bit_keys.rotate(torch.eye(dim, device=device))[:, chosen.to(device)]


def _spread(points: Tensor) -> Tensor:
    """Variance of points [S, H, n, D], the sum over their numbers: [S, H, 1, 1]."""
    return points.var(2, keepdim=True, correction=0).sum(-1, keepdim=True, dtype=torch.float32)
