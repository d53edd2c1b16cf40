"""Bisection, this project's own method: pages of tokens that lie together, rated by low-bit keys, and means for all others.

    arrange    halve the tokens at the median along their main axis, and the halves again, down to full pages
    select     4 x budget pages   by  tokens * exp(scale * q . mean key), and those in one bin of scores with the last of them
               of them the budget by  sum over tokens of exp(scale * q . key in four bits)
               both as shares of all candidates, mean over the query heads of a KV head
    estimate   all other pages enter the softmax by their mean key, mean value and number of tokens

    row of a page   mean [D]  value [Dv]           as int8, or as the cache is told
                    codes [P, D / 2]  scale [P]    keys less their mean, rotated, four bits a number (`lowbit.py`);
                                                   the scale is -1 where there is no token

Halving at the median keeps all pages full and all parts of one size, so a level is one batched operation. The axis is the first
principal one of the keys, by six power iterations, which is what splits their spread best.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import kernels
from ..config import require_count
from ..kernels.fields import Rating
from ..kernels.recipe import Recipe
from . import lowbit
from .partition import Estimate, Method, Pages, Query, Summaries
from .regrouping import Arrangement, Regrouping

_ITERATIONS = 6


@dataclass(frozen=True)
class Bisection(Regrouping, Method):
    """Bisected pages, chosen in two stages.

    Args:
        looked_at: how many times the budget is looked at in the second stage, at least.
    Raises:
        OptionTypeError, OptionError: not an int of 1 or more.
    """

    name: ClassVar[str] = "bisection"
    looked_at: int = 4

    def __post_init__(self) -> None:
        require_count("looked_at", self.looked_at, 1)

    @property
    def recipe(self) -> Recipe:
        """All of it by kernels, but what regroups and summarises."""
        return Recipe(Rating.SHARE, weighs_tokens=True, looked_at=self.looked_at, estimated_share=1.0)

    def summary_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        """`mean` [D], `value` [Dv], `codes` [P, D / 2] and `scale` [P]."""
        page = self.page_size
        return {"mean": (head_dim,), "value": (value_dim,), "codes": (page, -(-head_dim // 2)), "scale": (page,)}

    def summary_dtypes(self) -> dict[str, torch.dtype]:
        """Codes are bytes; scales do without another rounding."""
        return {"codes": torch.uint8, "scale": torch.bfloat16}

    def index(self, keys: Tensor, valid: Tensor) -> Summaries:
        """Means, and codes of what the keys differ from them."""
        keys = keys.float().masked_fill(~valid.unsqueeze(-1), 0.0)
        mean = keys.sum(-2) / valid.sum(-1, keepdim=True).clamp(min=1)
        codes, scale = lowbit.encode(lowbit.rotate(keys - mean.unsqueeze(-2)))
        return {"mean": mean, "codes": codes, "scale": scale.masked_fill(~valid, -1.0)}

    def index_pages(self, pages: Pages) -> Summaries:
        """As `index`, and means of the values."""
        values = pages.values.float().masked_fill(~pages.valid.unsqueeze(-1), 0.0)
        count = pages.valid.sum(-1, keepdim=True).clamp(min=1)
        return {**self.index(pages.keys, pages.valid), "value": values.sum(-2) / count}

    def arrange(self, keys: Tensor) -> Arrangement:
        """Page by page, each of tokens that no halving has parted."""
        return Arrangement(bisect(keys[0].float(), self.page_size).unsqueeze(0))

    def select(self, query: Query, summary: Callable[..., Tensor]) -> Tensor:
        """The best pages by their low-bit keys, among the best by their means."""
        coarse = self._coarse(query, summary)
        budget = query.budget_pages
        looked_at = kernels.pages_down_to(self._shares(query, coarse), budget * self.looked_at)
        pages = kernels.list_pages(looked_at.flatten(0, 1)).unflatten(0, looked_at.shape[:2])
        rows, none = pages.clamp(min=0), pages < 0
        fine = self._fine(query, summary, rows)
        spare = coarse.shape[3]  # a column for the places of no page
        index = pages.masked_fill(none, spare).unsqueeze(2).expand_as(fine)
        rated = torch.nn.functional.pad(coarse, (0, 1)).scatter(3, index, fine)[..., :spare]
        shares = self._shares(query, rated).gather(2, rows).masked_fill(none, float("-inf"))
        best = kernels.select_top_pages(shares, budget)
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
        return Estimate(summary("mean"), summary("value"), log_tokens)

    def _coarse(self, query: Query, summary: Callable[..., Tensor]) -> Tensor:
        """Logarithm of the weight of pages, by their means: [B, H, G, N]; -inf for what may not be selected."""
        assert query.page_tokens is not None
        tokens = query.page_tokens.float().log()[:, None, None]
        logits = query.states @ summary("mean").transpose(-1, -2) * query.scale + tokens
        return logits.masked_fill(~query.candidates[:, None, None], float("-inf"))

    def _fine(self, query: Query, summary: Callable[..., Tensor], pages: Tensor) -> Tensor:
        """The same by low-bit keys, of pages [B, H, k]: [B, H, G, k]."""
        levels = lowbit.decode(summary("codes", pages), query.states.shape[-1])  # [B, H, k, P, D]
        scale = summary("scale", pages)
        rotated = lowbit.rotate(query.states)
        inside = (rotated @ levels.flatten(2, 3).transpose(-1, -2)).unflatten(3, levels.shape[2:4])
        middle = query.states @ summary("mean", pages).transpose(-1, -2)
        logits = (middle.unsqueeze(-1) + inside * scale.unsqueeze(2)) * query.scale
        return logits.masked_fill((scale < 0).unsqueeze(2), float("-inf")).logsumexp(-1)

    def _shares(self, query: Query, log_weights: Tensor) -> Tensor:
        """Logarithm of the share of each candidate, mean over the group: [B, H, N]; -inf for others."""
        total = log_weights.logsumexp(-1, keepdim=True)
        shares = (log_weights - total).logsumexp(2) - math.log(log_weights.shape[2])
        return shares.masked_fill(~query.candidates.unsqueeze(1), float("-inf"))


def bisect(points: Tensor, page_size: int) -> Tensor:
    """Order points so that pages of them lie together.

    Args:
        points: [H, n, D], float32; n is a multiple of `page_size`.
    Returns:
        order: [H, n], int64.
    """
    heads, count, dim = points.shape
    device = points.device
    order = torch.arange(count, device=device).expand(heads, -1).clone()
    parts = [(0, count // page_size)]
    while parts := [(first, stop) for first, stop in parts if stop - first > 1]:
        begin, end = torch.tensor(parts, device=device).mul(page_size).unbind(1)
        most = max(stop - first for first, stop in parts) * page_size
        places = begin.unsqueeze(1) + torch.arange(most, device=device)
        inside = places < end.unsqueeze(1)
        token = order[:, places.clamp(max=count - 1)]  # [H, parts, most]
        x = points.gather(1, token.flatten(1).unsqueeze(-1).expand(-1, -1, dim)).view(*token.shape, dim)
        x = x * inside.unsqueeze(-1)
        x = (x - x.sum(2, keepdim=True) / (end - begin).view(1, -1, 1, 1)) * inside.unsqueeze(-1)
        along = (x @ _main_axis(x)).squeeze(-1).masked_fill(~inside, float("inf"))
        token = token.gather(2, along.argsort(dim=2, stable=True))
        order[:, places[inside]] = token[:, inside]
        middles = [(first + stop) // 2 for first, stop in parts]
        parts = [half for (a, c), b in zip(parts, middles, strict=True) for half in ((a, b), (b, c))]
    return order


def _main_axis(centred: Tensor) -> Tensor:
    """About the first principal axis [..., D, 1] of centred rows [..., n, D], from the longest row on."""
    longest = centred.square().sum(-1).argmax(-1)
    axis = centred.gather(-2, longest[..., None, None].expand(*longest.shape, 1, centred.shape[-1])).transpose(-1, -2)
    for _ in range(_ITERATIONS):
        axis = centred.transpose(-1, -2) @ (centred @ axis)
        axis = axis / axis.norm(dim=-2, keepdim=True).clamp(min=1e-20)
    return axis
