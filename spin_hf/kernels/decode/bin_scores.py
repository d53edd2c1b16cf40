"""Scores of candidate pages per KV head, their histogram, and lists of the pages to select from.

    logits, statistics of all splits  ->  score, see `Rating`: for LIKELIEST the max over query heads of log softmax  ->  SCORES
    bin of the score  <=  floor       ->  the page is counted and listed  ->  histogram, bin lists

The histogram tells where the budget ends, so scores are not sorted (see `select_pages.py`). The floor is the bin where the
budget ended at the last step, plus a margin. So the bin lists hold a few hundred pages, however long the context is. The
specification of the scores is `reference.group_scores`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    BIN_LIST_LENGTH, BIN_LIST_PAGE, BIN_LIST_SCORE, CANDIDATES, FIRST, LOGITS, NUM_OUTLIERS, NUM_SELECTED, OUTLIER,
    PAGE_CAPACITY, PLAN_FIELDS, POSITION, SCORES, STOP, candidates, log_tokens, log_total, own_step, score_bins,
    wait_for_launch,
)  # fmt: skip
from ..descriptor_fields import BIN_TILE_PAGES, BINS_PER_NAT, NUM_BINS, Rating
from ..launch import (
    Launch, LaunchShape, LayerBuffers, StepBuffers, power_of_two, product_columns, rerank_sizes, dependent,
)  # fmt: skip
from ..recipe import KernelRecipe
from .rerank_queries import prepare_queries

LIKELIEST = tl.constexpr(int(Rating.LIKELIEST))
MEAN = tl.constexpr(int(Rating.MEAN))
BOUND = tl.constexpr(int(Rating.BOUND))


def bin_scores(
    launch: Launch, buffers: StepBuffers, layer: LayerBuffers, plan: Tensor, query: Tensor, *, scale: float,
    recipe: KernelRecipe, shape: LaunchShape,
) -> None:  # fmt: skip
    """Turn the logits of `score_pages`, which takes the same arguments, or of `scan_pages` into scores, and count them by bin.

    With reranking, one more program per stream makes the query operands of `rerank_pages`.
    """
    group, reranks = query.shape[1] // shape.num_heads, recipe.rerank_factor > 0
    digits, columns, half = rerank_sizes(group, shape.key_dim, shape.dtype, shape.multiplies_int8)
    launch(
        rate_kernel, (buffers.num_streams, buffers.splits.programs + reranks), buffers.step, buffers.stats, plan,
        buffers.histogram, layer.rerank_floors if reranks else layer.floors, layer.number, buffers.splits.score, query,
        *query.stride()[:2], buffers.basis, buffers.rotated, buffers.operands, buffers.factors,
        scale / math.sqrt(shape.key_dim & -shape.key_dim), buffers.rerank_histogram,
        RATING=int(recipe.rating), OUTLIERS=recipe.outliers_per_1024 > 0, COUNT_ALL=recipe.estimates_zone,
        LISTED=not reranks, WEIGHTED=recipe.weighs_tokens, PREPARED=reranks, LEAST=math.log(recipe.threshold or 1.0),
        H=shape.num_heads, G=group,
        BLOCK_G=product_columns(group, shape.scores_digits), SPLITS=power_of_two(buffers.splits.score), DIGITS=digits,
        RERANK_G=columns, DK=shape.key_dim, BLOCK_K=shape.block_k, HALF=half, PAGE=shape.page_size,
        PADDED=shape.padded, BIN_TILE=BIN_TILE_PAGES, HEADS=min(4, power_of_two(group)),
        BINS=NUM_BINS, PER_NAT=BINS_PER_NAT, RUN=min(BIN_TILE_PAGES, 32), APART=shape.apart, num_warps=8, **dependent(shape),
    )  # fmt: skip


@triton.jit(do_not_specialize=["number"])
def rate_kernel(
    step, stats, plan, histogram, floors, number, num_splits, query, query_b, query_h, basis, rotated, operands, factors,
    rerank_scale, second_histogram,
    RATING: tl.constexpr, OUTLIERS: tl.constexpr, COUNT_ALL: tl.constexpr, LISTED: tl.constexpr, WEIGHTED: tl.constexpr,
    PREPARED: tl.constexpr, LEAST: tl.constexpr, H: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr,
    SPLITS: tl.constexpr, DIGITS: tl.constexpr, RERANK_G: tl.constexpr, DK: tl.constexpr, BLOCK_K: tl.constexpr,
    HALF: tl.constexpr, PAGE: tl.constexpr, PADDED: tl.constexpr, BIN_TILE: tl.constexpr, HEADS: tl.constexpr,
    BINS: tl.constexpr, PER_NAT: tl.constexpr, RUN: tl.constexpr, APART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, i) scores the pages of bin lists i, i + (programs of the stream), ...

    If PREPARED there is one more program per stream: it prepares the query operands of reranking.

    Args:
        stats: written by `score_kernel`; SPLITS is num_splits rounded up to a power of two.
        histogram: int32 [B * H, BINS]: zeroed by `score_kernel`. Added to, unless the budget covers all candidates.
        floors: int32 [B * H]: the last bin that enters the bin lists.
        number: index of the layer among the paged layers.
        query to rerank_scale, DIGITS and RERANK_G to HALF: as for `prepare_queries`; used if PREPARED.
        second_histogram: int32 [B * H, BINS]: zeroed if PREPARED.
        RATING: see `Rating`.
        COUNT_ALL: whether all candidates are counted; else only those in bins down to the floor.
        LISTED: whether bin lists are written; else pages are only scored and counted.
        WEIGHTED: whether a page's weight in the softmax is multiplied by its number of valid tokens.
        LEAST: log probability that a page must exceed to be a candidate, unless the budget covers all; 0 for no threshold.
        HEADS: query heads per reduction.
        RUN: consecutive pages per run. Runs are dealt to the lists in turn, because neighbours are often selected together:
            so all lists are about equally long.
    """
    bh = tl.program_id(0)
    step = own_step(step, bh // H, APART)
    if APART and tl.load(step + POSITION) < 0:  # no sequence
        wait_for_launch(PDL)
        return
    programs = tl.num_programs(1) - PREPARED
    places = rated_places(step, bh, BIN_TILE)
    floor = tl.load(floors + bh)
    wait_for_launch(PDL)
    if PREPARED and tl.program_id(1) == programs:
        tl.store(second_histogram + bh * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
        prepare_queries(
            query, query_b, query_h, basis, rotated, operands, factors, stats, num_splits, bh, rerank_scale, DIGITS, H, G,
            BLOCK_G, RERANK_G, SPLITS, DK, BLOCK_K, HALF,
        )  # fmt: skip
    else:
        rate_lists(
            step, stats, plan, histogram, number, num_splits, bh, places, floor, tl.program_id(1), programs, RATING,
            OUTLIERS, COUNT_ALL, LISTED, WEIGHTED, LEAST, H, G, BLOCK_G, SPLITS, PAGE, PADDED, BIN_TILE, HEADS, BINS,
            PER_NAT, RUN, APART,
        )  # fmt: skip


@triton.jit
def rated_places(step, bh, BIN_TILE: tl.constexpr):
    """Where the scratch of one (sequence, KV head) is: its capacity; SCORES; pages, scores and lengths of bin lists."""
    capacity = tl.load(step + PAGE_CAPACITY)
    before = bh.to(tl.int64) * capacity
    scores = tl.load(step + SCORES).to(tl.pointer_type(tl.float32)) + before
    bin_list_page = tl.load(step + BIN_LIST_PAGE).to(tl.pointer_type(tl.int32)) + before
    bin_list_score = tl.load(step + BIN_LIST_SCORE).to(tl.pointer_type(tl.float32)) + before
    bin_list_length = tl.load(step + BIN_LIST_LENGTH).to(tl.pointer_type(tl.int32)) + bh * tl.cdiv(capacity, BIN_TILE)
    return capacity, scores, bin_list_page, bin_list_score, bin_list_length


@triton.jit
def rate_lists(
    step, stats, plan, histogram, number, num_splits, bh, places, floor, first_list, programs,
    RATING: tl.constexpr, OUTLIERS: tl.constexpr, COUNT_ALL: tl.constexpr, LISTED: tl.constexpr, WEIGHTED: tl.constexpr,
    LEAST: tl.constexpr, H: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, SPLITS: tl.constexpr, PAGE: tl.constexpr,
    PADDED: tl.constexpr, BIN_TILE: tl.constexpr, HEADS: tl.constexpr, BINS: tl.constexpr, PER_NAT: tl.constexpr,
    RUN: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Score the pages of bin lists first_list, first_list + programs, ...; see `rate_kernel`.

    Args:
        places: from `rated_places`.
        floor: the last bin that enters the bin lists.
    """
    b = (bh // H).to(tl.int64)
    row = plan + b * PLAN_FIELDS
    capacity, scores, bin_list_page, bin_list_score, bin_list_length = places
    logits = tl.load(step + LOGITS).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * G * capacity
    stream = number.to(tl.int64) * (H if APART else tl.num_programs(0)) + bh
    outlier = tl.load(step + OUTLIER).to(tl.pointer_type(tl.int8)) + stream * capacity
    first = tl.load(row + FIRST)
    stop = tl.load(row + STOP)
    scored = tl.load(row + NUM_SELECTED) < stop - first
    num_outliers = tl.load(row + NUM_OUTLIERS)
    split = tl.arange(0, SPLITS)
    known = (split < num_splits)[None, :]
    num_lists = tl.cdiv(stop, BIN_TILE)
    lane = tl.arange(0, BIN_TILE)
    for bin_list in range(first_list, num_lists, programs):
        pages = (lane // RUN * num_lists + bin_list) * RUN + lane % RUN
        inside = candidates(step, b, pages, first, stop, PAGE, PADDED)
        best = tl.zeros([BIN_TILE], tl.float32)
        entering = inside
        if scored:
            best = tl.full([BIN_TILE], -3.0e38, tl.float32)
            total = tl.zeros([BIN_TILE], tl.float32)
            largest = tl.full([], float("-inf"), tl.float32)
            smallest = tl.full([], float("-inf"), tl.float32)
            for g in tl.static_range(0, G, HEADS):  # HEADS at once, which share the latency of a reduction
                heads = g + tl.arange(0, HEADS)
                there = inside[None, :] & (heads < G)[:, None]
                # Ahead of the barriers below, so all of these are under way at once.
                each = tl.load(logits + heads[:, None] * capacity + pages[None, :], mask=there, other=float("-inf"))
                place = stats + (bh * num_splits + split)[None, :] * 2 * BLOCK_G + heads[:, None]
                most = tl.load(place, mask=known, other=float("-inf"))
                if RATING == BOUND:
                    real = known & (heads < G)[:, None]
                    largest = tl.maximum(largest, tl.max(tl.where(real, most, float("-inf"))))
                    lowest = tl.min(tl.load(place + BLOCK_G, mask=real, other=float("inf")), 1)
                    smallest = tl.maximum(smallest, tl.max(tl.where(heads < G, lowest, float("-inf"))))
                else:
                    sums = tl.load(place + BLOCK_G, mask=known, other=0.0)
                    lse = log_total(most, sums)
                    # As scalars: they have no layout that the compiler would move `each` to.
                    for i in tl.static_range(HEADS):
                        own = tl.sum(tl.where(tl.arange(0, HEADS) == i, lse, 0.0))
                        each = tl.where((heads == g + i)[:, None], each - own, each)
                    each = tl.where(there, each, float("-inf"))
                if RATING != MEAN:
                    best = tl.maximum(best, tl.max(each, 0))
                else:  # `each` is at most about 0, so exp does not overflow
                    total += tl.sum(tl.exp(each), 0)
            if RATING == BOUND:
                width = tl.where(largest == float("-inf"), 1.0, tl.maximum(largest - smallest, 1e-20))
                best = (best - tl.where(largest == float("-inf"), 0.0, largest)) * (30.0 / width)
            elif RATING == MEAN:
                best = tl.maximum(tl.log(total * (1.0 / G)), -3.0e38)
                if WEIGHTED and PADDED:
                    best += log_tokens(step, b, pages, inside, PAGE, PADDED)
            if LEAST < 0.0:
                whole = tl.load(row + NUM_SELECTED) >= tl.load(row + CANDIDATES)
                inside = inside & ((best > LEAST) | whole)
            if OUTLIERS:
                marks = tl.load(outlier + pages, mask=inside & (num_outliers > 0), other=0)
                best = tl.where(marks != 0, float("inf"), best)
            bins = score_bins(best, BINS, PER_NAT)
            entering = inside & (bins <= floor)
            counted = inside if COUNT_ALL else entering
            tl.atomic_add(histogram + bh * BINS + bins, tl.full([BIN_TILE], 1, tl.int32), mask=counted, sem="relaxed")
        tl.store(scores + pages, tl.where(inside, best, float("-inf")), mask=pages < stop)
        if LISTED:
            rank = tl.cumsum(entering.to(tl.int32), 0)
            # By rank, then by list. The lists are about equally long, so few places stay empty.
            place = (rank - 1) * num_lists + bin_list
            tl.store(bin_list_page + place, pages, mask=entering)
            tl.store(bin_list_score + place, best, mask=entering)
            tl.store(bin_list_length + bin_list + 0 * lane, rank, mask=lane == BIN_TILE - 1)
