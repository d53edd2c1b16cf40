"""Fitted, this project's own method: one pass over codes of two bits per number, in a basis that is fitted to the sequence.

    cluster    as `Bisection` does
    fit        once per sequence, layer and KV head, when tokens are clustered first: a basis of keys, from these keys and the
               observation queries, and one of mean values (`fitted_codes.py`). Before that, a fixed basis
    score      every page         sum over its tokens of exp(scale * q . coded key)
    select     the budget         share of candidates and sinks, mean over the query heads of a KV head
    estimate   all other pages    coded mean value, with the same weight

    row of a unit   mean [E]                       of its 16 tokens, which are 4 pages
    row of a page   codes [P, E / 4]  scale [P]    keys minus the mean; scale -1 marks an empty place
                    value [E / 4]  value_scale     mean value

Keys are cached as they are, so attention to selected pages is exact. Pages that were summarised before the fit are summarised
again with the new basis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ... import kernels
from ...inference_mode import outside_inference_mode
from ...kernels.descriptor_fields import Rating
from ...kernels.recipe import KernelRecipe
from ...kernels.reference_scan import CodedBasis
from . import fitted_codes
from .base import Estimate, FittedTensors, Method, Pages, Query, Summaries
from .bisection import bisect_tokens, mean_shares, sink_pages
from .clustering import ClusteringMethod, TokenClusters
from .fitted_codes import Basis, num_coordinates

_MEASURED = ("key_mean", "key_covariance", "query_moment", "value_mean", "value_covariance")
_MATRICES = ("key_forward", "key_inverse", "value_axes")


@dataclass(frozen=True)
class Fitted(ClusteringMethod, Method):
    """Selects pages of similar tokens by their keys in two bits per number. All others are estimated."""

    name: ClassVar[str] = "fitted"
    page_size: ClassVar[int] = 4
    unit_pages: ClassVar[int] = 4
    multi_page_clusters: ClassVar[bool] = False
    num_observation_queries: ClassVar[int] = 32

    @property
    def recipe(self) -> KernelRecipe:
        """Kernels serve the decode step, for heads of multiples of 16 numbers."""
        return KernelRecipe(Rating.MEAN, scans_codes=True, overhead_us=26.5)

    # ------------------------------------------------------------------------------------------------------- the basis

    def fitted_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        """Origin, matrices and widths of levels: `Basis` of keys, and of values without `inverse`, which is `forward`."""
        keys, values = num_coordinates(head_dim), num_coordinates(value_dim)
        return {
            "key_origin": (head_dim,), "key_forward": (head_dim, keys), "key_inverse": (head_dim, keys), "key_widths": (keys,),
            "value_origin": (value_dim,), "value_axes": (value_dim, values), "value_widths": (values,),
        }  # fmt: skip

    def fitted_dtypes(self) -> dict[str, torch.dtype]:
        """Matrices are bfloat16, whose rounding is small beside that of the codes."""
        return dict.fromkeys(_MATRICES, torch.bfloat16)

    def unfitted(self, head_dim: int, value_dim: int, device: torch.device) -> FittedTensors:
        """The fixed basis."""
        return _unfitted(head_dim, value_dim, device)

    def measure(self, keys: Tensor, values: Tensor, observation_queries: Tensor | None) -> dict[str, Tensor]:
        """Means and second moments of keys, queries and mean values."""
        queries = None if observation_queries is None else observation_queries.flatten(2, 3)
        of_keys = fitted_codes.measure_keys(keys.flatten(2, 3), queries)
        of_values = fitted_codes.measure_values(values.mean(3, dtype=torch.float32))
        return dict(zip(_MEASURED, (*of_keys, *of_values), strict=True))

    def fit(self, measured: dict[str, Tensor]) -> FittedTensors:
        """The basis of clustered tokens. The fixed one for KV heads with keys, values or queries that are not finite."""
        mean, covariance, moment, value_mean, value_covariance = (measured[name] for name in _MEASURED)
        made = _tensors(
            fitted_codes.key_basis(mean, covariance, moment), fitted_codes.value_basis(value_mean, value_covariance)
        )
        finite = torch.stack([tensor.isfinite().flatten(2).all(2) for tensor in made.values()]).all(0)
        fixed = _unfitted(mean.shape[-1], value_mean.shape[-1], mean.device)
        return {
            name: tensor.where(finite[(...,) + (None,) * (tensor.dim() - 2)], fixed[name])
            for name, tensor in made.items()
        }

    def scan_basis(self, fitted: FittedTensors | None, dtype: torch.dtype) -> CodedBasis:
        """The basis of each sequence, contiguous."""
        assert fitted is not None
        held = {name: tensor.contiguous() for name, tensor in fitted.items()}
        return CodedBasis(
            inverse=held["key_inverse"].to(dtype), origin=held["key_origin"], widths=held["key_widths"],
            value_axes=held["value_axes"].to(dtype), value_origin=held["value_origin"],
            value_widths=held["value_widths"], forward=held["key_forward"].to(dtype),
        )  # fmt: skip

    # ---------------------------------------------------------------------------------------------------------- index

    def form_clusters(self, keys: Tensor, observation_queries: Tensor | None) -> TokenClusters:
        """Order tokens so that each page is one leaf of the bisection."""
        return bisect_tokens(keys, observation_queries, self.page_size)

    def summary_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        """`mean` [E], `codes` [P, E / 4], `scale` [P], `value` [E / 4] and `value_scale` []."""
        page, keys, values = self.page_size, num_coordinates(head_dim), num_coordinates(value_dim)
        return {
            "mean": (keys,), "codes": (page, keys // 4), "scale": (page,), "value": (values // 4,), "value_scale": (),
        }  # fmt: skip

    @property
    def pages_per_row(self) -> dict[str, int]:
        """Means are those of units."""
        return {"mean": self.unit_pages}

    def summary_dtypes(self) -> dict[str, torch.dtype]:
        """Means are int8 always, codes are bytes. Scales are bfloat16, so they are not rounded to int8."""
        return {
            "mean": torch.int8, "codes": torch.uint8, "scale": torch.bfloat16, "value": torch.uint8,
            "value_scale": torch.bfloat16,
        }  # fmt: skip

    def index_pages(self, pages: Pages) -> Summaries:
        """Means of units, codes of keys and of mean values. The last unit may have fewer pages."""
        return fitted_codes.encode_pages(pages.keys, pages.values, pages.valid, *_bases(pages.fitted, torch.bfloat16))

    # --------------------------------------------------------------------------------------------- select and estimate

    def select(self, query: Query, summary: Callable[..., Tensor]) -> Tensor:
        """The best candidates up to the budget, by their coded keys."""
        return kernels.select_top_pages(mean_shares(query, self._log_weights(query, summary)), query.budget_pages)

    def estimate(self, query: Query, summary: Callable[..., Tensor], pages: Tensor) -> Estimate | None:
        """All candidates except `pages`, with the weights of their coded keys."""
        rest = query.candidates.unsqueeze(1).repeat(1, pages.shape[1], 1)
        b, h, i = (pages >= 0).nonzero(as_tuple=True)
        rest[b, h, pages[b, h, i]] = False
        if not bool(rest.any()):
            return None
        values = fitted_codes.decode_values(_bases(query.fitted)[1], summary("value"), summary("value_scale"))
        values = values.masked_fill(~rest.unsqueeze(-1), 0.0)
        weights = self._log_weights(query, summary).masked_fill(~rest.unsqueeze(2), float("-inf"))
        keys = torch.zeros((), device=values.device).expand(*rest.shape, query.states.shape[-1])  # scores of 0
        return Estimate(keys, values, weights)

    def _log_weights(self, query: Query, summary: Callable[..., Tensor]) -> Tensor:
        """Log weights of candidates and sinks by their coded keys, [B, H, G, N]; -inf for other pages."""
        coded = summary("mean"), summary("codes"), summary("scale")
        logits = fitted_codes.key_logits(query.states * query.scale, _bases(query.fitted)[0], *coded)
        if query.softcap is not None:
            logits = query.softcap * torch.tanh(logits / query.softcap)
        counted = query.candidates | sink_pages(query)
        return logits.logsumexp(-1).masked_fill(~counted[:, None, None], float("-inf"))


def _tensors(keys: Basis, values: Basis) -> FittedTensors:
    """The tensors of `Fitted.fitted_shapes`."""
    made = {
        "key_origin": keys.origin, "key_forward": keys.forward, "key_inverse": keys.inverse, "key_widths": keys.widths,
        "value_origin": values.origin, "value_axes": values.forward, "value_widths": values.widths,
    }  # fmt: skip
    return {name: tensor.bfloat16() if name in _MATRICES else tensor for name, tensor in made.items()}


def _bases(held: FittedTensors | None, dtype: torch.dtype = torch.float32) -> tuple[Basis, Basis]:
    """The bases of keys and of values in tensors of `Fitted.fitted_shapes`, with matrices in `dtype`."""
    assert held is not None
    forward, inverse, axes = (held[name].to(dtype) for name in _MATRICES)
    keys = Basis(held["key_origin"], forward, inverse, held["key_widths"])
    return keys, Basis(held["value_origin"], axes, axes, held["value_widths"])


@lru_cache(maxsize=64)
@outside_inference_mode
def _unfitted(head_dim: int, value_dim: int, device: torch.device) -> FittedTensors:
    return _tensors(fitted_codes.fixed_basis(head_dim, device), fitted_codes.fixed_basis(value_dim, device))
