"""`bin_scores` and `select_pages` in one launch: whoever rates the last pages of a (sequence, KV head) chooses among them.

    program (b * H + h, i)    as many as there are bin lists, or fewer: rates the pages of some of them, and counts its arrival
                                o o o o          o -> page list      the last one to arrive finds everything rated, and chooses
                              the next ones, with coded pages: each merges the scan's partial estimates of a query head
                              all others: nothing. A graph has programs for longer contexts too

A program publishes what it has written by an atomic addition that releases it; the last one acquires it by its own. Which
program that is does not matter: lists and histogram are the same. With reranking, pages are rated a second time before they
are chosen, so these methods use the separate kernels.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..common import COUNTERS, PLAN_FIELDS, POSITION, STOP, own_layer, own_step, triton_dtype, wait_for_launch
from ..descriptor_fields import BIN_TILE_PAGES, BINS_PER_NAT, NUM_BINS
from ..launch import (
    Launch, LaunchShape, LayerBuffers, ScanBuffers, StepBuffers, dependent, power_of_two, product_columns,
)  # fmt: skip
from ..recipe import KernelRecipe
from .bin_scores import rate_lists
from .select_pages import choice_of, choice_tiles, choose_pages
from .unread_pages import merge_partials


def rank_pages(
    launch: Launch, buffers: StepBuffers, layer: LayerBuffers, plan: Tensor, *, query_index: int, group: int,
    most_listed: int | None, recipe: KernelRecipe, shape: LaunchShape, scan: ScanBuffers | None = None,
) -> None:  # fmt: skip
    """Rate pages by the logits of `score_pages` or `scan_pages`, list those that one query of a step attends to, assign slots.

    Args:
        recipe: without reranking.
        query_index to most_listed: as for `select_pages`.
        scan: what `scan_pages` wrote, whose partial estimates are merged; None without coded pages.
    """
    coded, share = scan is not None, recipe.estimated_billionths
    partials, estimate = (scan.partials, scan.estimate) if scan is not None else (buffers.stats, buffers.stats)
    launch(
        rank_kernel, (buffers.num_streams, buffers.splits.programs + coded * group), buffers.step, layer.descriptor,
        buffers.stats, plan, buffers.histogram, buffers.arrivals, buffers.list_count, layer.counters, layer.floors,
        layer.hands, buffers.zone_edges, layer.number, buffers.splits.score, share, query_index, partials, estimate,
        RATING=int(recipe.rating), OUTLIERS=recipe.outliers_per_1024 > 0, WEIGHTED=recipe.weighs_tokens,
        LEAST=math.log(recipe.threshold or 1.0), CODED=coded, COUNTED=recipe.estimates_zone, ESTIMATES=share > 0,
        DTYPE=triton_dtype(shape.dtype), H=shape.num_heads, G=group, BLOCK_G=product_columns(group, shape.scores_digits),
        SPLITS=power_of_two(buffers.splits.score), DK=shape.key_dim, DV=shape.value_dim, BLOCK_V=shape.block_v,
        PAGE_BYTES=shape.page_bytes, PAGE=shape.page_size, PADDED=shape.padded, BIN_TILE=BIN_TILE_PAGES,
        HEADS=min(4, power_of_two(group)), BINS=NUM_BINS, PER_NAT=BINS_PER_NAT, RUN=min(BIN_TILE_PAGES, 32),
        APART=shape.apart, **choice_tiles(False, most_listed), **dependent(shape),
    )  # fmt: skip


@triton.jit(do_not_specialize=["number"])
def rank_kernel(
    step, layer, stats, plan, histogram, arrivals, list_count, counters, floors, hand, edges, number, num_splits, share,
    query_index, partials, estimate,
    RATING: tl.constexpr, OUTLIERS: tl.constexpr, WEIGHTED: tl.constexpr, LEAST: tl.constexpr, CODED: tl.constexpr,
    COUNTED: tl.constexpr, ESTIMATES: tl.constexpr, DTYPE: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    BLOCK_G: tl.constexpr, SPLITS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGE_BYTES: tl.constexpr, PAGE: tl.constexpr, PADDED: tl.constexpr, BIN_TILE: tl.constexpr, HEADS: tl.constexpr,
    BINS: tl.constexpr, PER_NAT: tl.constexpr, RUN: tl.constexpr, APART: tl.constexpr, LISTS: tl.constexpr,
    FLOOR_FACTOR: tl.constexpr, TILE: tl.constexpr, FEW: tl.constexpr, FEW_TILE: tl.constexpr, TIED_TILE: tl.constexpr,
    LIST_TILE: tl.constexpr, HAND_TILE: tl.constexpr, SLOT_TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See the module's head; for the arguments `rate_kernel` and `choose_kernel`.

    Args:
        arrivals: int32 [B * H]: zeros, and zeros again afterwards.
    """
    bh = tl.program_id(0)
    step = own_step(step, bh // H, APART)
    layer = own_layer(layer, bh // H, APART)
    if APART and tl.load(step + POSITION) < 0:  # no sequence
        wait_for_launch(PDL)
        return
    if APART:
        counters += bh // H * COUNTERS
    index = tl.program_id(1)
    num_lists = tl.cdiv(tl.load(plan + (bh // H).to(tl.int64) * PLAN_FIELDS + STOP), BIN_TILE)
    merging: tl.constexpr = G if CODED else 0
    programs = tl.maximum(1, tl.minimum(tl.num_programs(1) - merging, num_lists))  # that have a list to rate
    if index < programs:
        given = choice_of(step, layer, plan, floors, bh, H, BIN_TILE)
        wait_for_launch(PDL)
        rate_lists(
            step, stats, plan, histogram, number, num_splits, bh, given[0], given[2][5], index, programs, RATING, OUTLIERS,
            COUNTED, True, WEIGHTED, LEAST, H, G, BLOCK_G, SPLITS, PAGE, PADDED, BIN_TILE, HEADS, BINS, PER_NAT, RUN, APART,
        )  # fmt: skip
        tl.debug_barrier()  # all threads have written before the arrival is counted
        if tl.atomic_add(arrivals + bh, 1, sem="acq_rel", scope="gpu") == programs - 1:
            tl.store(arrivals + bh, 0)
            choose_pages(
                step, layer, histogram, list_count, counters, floors, hand, edges, share, query_index, bh, given,
                False, COUNTED, ESTIMATES, COUNTED, G, H, PAGE_BYTES, PAGE, PADDED, BIN_TILE, LISTS, BINS, PER_NAT,
                FLOOR_FACTOR, TILE, FEW, FEW_TILE, TIED_TILE, LIST_TILE, HAND_TILE, SLOT_TILE,
            )  # fmt: skip
    elif index < programs + merging:
        merge_partials(
            layer, partials, estimate, num_splits, bh, index - programs, DTYPE, G, SPLITS, DK, DV, BLOCK_V, PDL
        )
    else:
        wait_for_launch(PDL)
