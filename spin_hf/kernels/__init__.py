"""The operations of a cache, one typed function each. They dispatch to a Triton kernel if there is one, else to PyTorch.

A decode step does not use these functions: `backends/triton_step.py` launches its kernels directly, without host
synchronization. Each kernel and its launch are in one file. PyTorch code specifies every kernel:

    kernel                 specified by                                                        compared in
    plan_zones             `backends/zones.py`, `reference.page_zones`                         test_launches
    find_outliers          `ShadowKV.score`                                                    test_triton_step
    append_tokens          `PageStore.append`, `ShadowKV.index`, `storage/page_layout.py`      test_triton_step, _int8_pages
    gate_queries           `LayerGate.of_queries`                                              test_gate_queries
    score_pages            `score` of the methods: products with a summary                     test_triton_step, _methods
    bin_scores             `reference.group_scores`, `reference.score_bins`                    test_launches
    rerank_queries         `four_bit_keys.rotate`, `four_bit_keys.decode`                      test_launches
    rerank_pages           `Bisection.select`, `reference.pages_down_to`                       test_triton_step, _methods
    select_pages           `reference.select_top_pages`                                        test_triton_step
    assign_slots           `reference.admit_pages`                                             test_assign_slots
    rank_pages             `bin_scores` and `select_pages`, one after the other               test_rank_pages
    estimate_rest          `estimate` of RetroInfer and Bisection, `reference.attend`          test_triton_step
    project_queries        `reference_scan.page_log_weights`                                   test_scan
    scan_pages             `reference_scan.page_log_weights`, `coded_sum`                      test_scan
    unread_pages           `reference_scan.subtract`                                           test_scan
    attend_pages           `reference.attend`, `merge_attention`, `apply_attention_sinks`      test_triton_float64
    attend_segments        the same                                                            test_attend_segments
    quantize               `reference.quantize`, `four_bit_keys.encode_by_formulas`            test_quantize
    encode_units           `fitted_codes.encode_by_formulas`                                   test_encode_units
    bisect                 `reference_clustering.bisect`                                       test_bisect
    kmeans, fill_clusters  `reference_clustering.unit_vectors`, `fill_clusters`                test_fill_clusters
    permute_tokens         `reference.move_tokens`, `reference.page_means`                     test_permute_tokens
    copy_rows              `reference.take_rows`, `reference.put_rows`                         test_copy_rows
    copy_page              the same, of one page in several layers                             test_launches
    gather_tokens          `reference.take_rows`, `PageLayout.take`                            test_gather_tokens
    merge_partials         `reference.merge_attention`, `reference.merge_into`                 test_merge_partials
    choose_blocks          `reference_blocks.choose_blocks`                                    test_sparse_blocks
    attend_blocks          `reference_blocks.attend_blocks`                                    test_sparse_blocks
    attend_resident_blocks the same, `reference.merge_into`                                    test_resident_blocks
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import device_limits, reference, reference_blocks, reference_clustering
from .fused_attention import MOST_PARTIALS, fused_attention, reads_in_place
from .reference import (
    admit_pages,
    apply_attention_sinks,
    attend,
    dense_attention,
    list_pages,
    page_zones,
    pages_down_to,
    put_tokens,
    rows_to_put,
    score_bins,
    select_top_pages,
    split_pages,
    take_rows,
)
from .reference_blocks import BLOCK_TOKENS, BlockLists, block_means, num_means
from .resident_pages import ResidentPages

if TYPE_CHECKING:
    from .triton_launchers import Launchers


@lru_cache(None)
def launchers(device: torch.device) -> Launchers | None:
    """The launches of the Triton kernels, or None if the device uses the reference operations."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from .triton_launchers import launchers as found

    return found


def quantize(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """As `reference.quantize`."""
    launch = launchers(vectors.device)
    return (reference if launch is None else launch).quantize(vectors)


def page_means(states: Tensor, valid: Tensor) -> Tensor:
    """As `reference.page_means`."""
    launch = launchers(states.device)
    return (reference if launch is None else launch).page_means(states, valid)


def move_tokens(content: Tensor, order: Tensor, page_size: int, fields: tuple[tuple[int, int], ...]) -> Tensor:
    """As `reference.move_tokens`."""
    launch = launchers(content.device)
    return (reference if launch is None else launch).move_tokens(content, order, page_size, fields)


def merge_attention(partials: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """As `reference.merge_attention`."""
    launch = launchers(partials[0][0].device)
    return (reference if launch is None else launch).merge_attention(partials)


def merge_into(partials: Sequence[tuple[Tensor, Tensor]], sinks: Tensor | None, out: Tensor) -> None:
    """As `reference.merge_into`."""
    launch = launchers(out.device)
    (reference if launch is None else launch).merge_into(partials, sinks, out)


def gather_tokens(pages: ResidentPages, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys [B, H, num_tokens, Dk] and values of the first tokens of `pages`. Only kernels find pages by address."""
    launch = launchers(pages.rows.device)
    assert launch is not None
    return launch.gather_tokens(pages, num_tokens)


def choose_blocks(
    query_means: Tensor, key_means: Tensor, scale: float, top_p: float, first: int, dense_from: int
) -> BlockLists:
    """As `reference_blocks.choose_blocks`."""
    launch = launchers(query_means.device)
    chosen = reference_blocks if launch is None else launch
    return chosen.choose_blocks(query_means, key_means, scale, top_p, first, dense_from)


def attend_blocks(
    query: Tensor, keys: Tensor, values: Tensor, lists: BlockLists, scale: float, first: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """As `reference_blocks.attend_blocks`."""
    launch = launchers(query.device)
    chosen = reference_blocks if launch is None else launch
    return chosen.attend_blocks(query, keys, values, lists, scale, first, causal)


def attend_resident_blocks(
    query: Tensor, pages: ResidentPages, lists: BlockLists, num_dense: int, scale: float, sinks: Tensor | None, out: Tensor
) -> None:  # fmt: skip
    """`attend_blocks` of all tokens held, merged with `sinks` into `out`. Only kernels find pages by address.

    Args:
        num_dense: last query blocks that list everything.
    """
    launch = launchers(query.device)
    assert launch is not None
    launch.attend_resident_blocks(query, pages, lists, num_dense, scale, sinks, out)


def bisect(points: Tensor, page_size: int) -> Tensor:
    """As `reference_clustering.bisect`. The kernels need Ampere or later, and points of at most 128 numbers."""
    launch = launchers(points.device)
    if launch is None or not device_limits.multiplies(points.device):
        return reference_clustering.bisect(points, page_size)
    return launch.bisect(points, page_size)


def unit_vectors(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """As `reference_clustering.unit_vectors`."""
    launch = launchers(keys.device)
    return (reference_clustering if launch is None else launch).unit_vectors(keys, dtype)


def fill_clusters(points: Tensor, cluster_tokens: int, page_size: int) -> tuple[Tensor, Tensor]:
    """As `reference_clustering.fill_clusters`."""
    launch = launchers(points.device)
    if launch is None:
        return reference_clustering.fill_clusters(points, cluster_tokens, page_size)
    rounds, steps = reference_clustering.ROUNDS, reference_clustering.LIKENESS_STEPS
    return launch.fill_clusters(points, rounds, cluster_tokens, page_size, steps)


__all__ = [
    "BLOCK_TOKENS", "MOST_PARTIALS", "BlockLists", "ResidentPages", "admit_pages", "apply_attention_sinks", "attend",
    "attend_blocks", "attend_resident_blocks", "bisect", "block_means", "choose_blocks", "dense_attention", "fill_clusters",
    "fused_attention", "gather_tokens", "launchers", "list_pages", "merge_attention", "merge_into", "move_tokens",
    "num_means", "page_means", "page_zones", "pages_down_to", "put_tokens", "quantize", "reads_in_place", "rows_to_put",
    "score_bins", "select_top_pages", "split_pages", "take_rows", "unit_vectors",
]  # fmt: skip
