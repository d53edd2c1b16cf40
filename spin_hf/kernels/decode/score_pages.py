"""Logits of every candidate page: products of the query with one summary vector per page, and their softmax statistics.

The vector is the method's first summary: ShadowKV's landmark, or the mean for other methods. A box of keys has two vectors:

    largest product with a key between low and high  =  min(query, 0) . low  +  max(query, 0) . high

With a long context, most of the bytes that a step reads are these vectors. They are read once, at memory bandwidth. One more
program per (sequence, KV head) appends the step's token in the same launch, as the token's page is never a candidate.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    DIRECTORY, DIRECTORY_STRIDE, FIRST, LOGITS, NUM_SELECTED, PAGE_CAPACITY, PLAN_FIELDS, POSITION, SCALE_0, SCALE_1,
    STOP, SUMMARY_0, SUMMARY_1, candidates, digits, log_tokens, own_layer, own_step, segment_vectors, triton_dtype,
    wait_for_launch,
)  # fmt: skip
from ..descriptor_fields import NUM_BINS, Rating
from ..launch import Launch, LaunchShape, LayerBuffers, StepBuffers, product_columns, dependent
from ..recipe import KernelRecipe
from .append_tokens import append_page


def score_pages(
    launch: Launch, buffers: StepBuffers, layer: LayerBuffers, plan: Tensor, query: Tensor,
    new: tuple[Tensor, Tensor] | None, *, scale: float, recipe: KernelRecipe, shape: LaunchShape,
) -> None:  # fmt: skip
    """Score all candidates of one query of a step, and append the step's token.

    Args:
        query: [B, H * G, 1, D], or float32 [B, H, D] if the method projects its own queries. The last dimension is contiguous.
        new: key and value [B, H, 1, D] of the token to append; None for none.
    """
    width, group, digits = query.shape[-1], query.shape[1] // shape.num_heads, shape.scores_digits
    key, value = (query, query) if new is None else new
    vectors = (2 if recipe.rating == Rating.BOUND else 1) * max(32, triton.next_power_of_2(width))
    item_bytes = 1 if shape.quantized[0] else shape.dtype.itemsize
    if recipe.projects_queries and not digits:
        item_bytes = 4  # vectors are converted to float32
    launch(
        score_kernel, (buffers.num_streams, buffers.splits.score + (new is not None)), buffers.step, layer.descriptor, query,
        buffers.stats, plan, buffers.histogram, buffers.splits.score, *query.stride()[:2], scale, key, value,
        *key.stride()[:2], *value.stride()[:2], APPEND=new is not None, DIGITS=digits, SUMMARY=triton_dtype(shape.dtype),
        QUANTIZED=shape.quantized[0], H=shape.num_heads, G=group, BLOCK_G=product_columns(group, digits), DK=shape.key_dim,
        DV=shape.value_dim, BLOCK_K=shape.block_k, BLOCK_V=shape.block_v, PAGE=shape.page_size, SEGMENT=shape.segment_pages,
        ROWS=shape.rows_per_chunk, PADDED=shape.padded, BACKING_BYTES=shape.backing_bytes, BINS=NUM_BINS,
        RUNS=shape.segments_at_a_time(vectors, item_bytes), SUMMARISE=recipe.summarised_by_append,
        WEIGHTED=recipe.weighs_tokens, BOXES=recipe.rating == Rating.BOUND, SINKS=recipe.rerank_factor > 0,
        PROJECTED=recipe.projects_queries, D=width, BLOCK_D=max(32, triton.next_power_of_2(width)), APART=shape.apart,
        num_warps=4, num_stages=1, **dependent(shape),
    )  # fmt: skip


@triton.jit
def score_kernel(
    step, layer, query, stats, plan, histogram, num_splits, query_b, query_h, scale,
    key, value, key_b, key_h, value_b, value_h,
    APPEND: tl.constexpr, DIGITS: tl.constexpr, SUMMARY: tl.constexpr, QUANTIZED: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, BLOCK_G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PAGE: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
    BACKING_BYTES: tl.constexpr, BINS: tl.constexpr, RUNS: tl.constexpr, SUMMARISE: tl.constexpr, WEIGHTED: tl.constexpr,
    BOXES: tl.constexpr, SINKS: tl.constexpr,
    PROJECTED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, APART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, split) scores one split of the segments. If APPEND, program (b * H + h, num_splits) appends.

    Args:
        query: [B, H * G, 1, D]; the last dimension is contiguous.
        stats: float32 [B * H, num_splits, 2, BLOCK_G]: maximum and sum of exponentials of each split; with BOXES the largest
            and the smallest logit. Written.
        histogram: int32 [B * H, BINS]: zeroed for `rate_kernel`.
        key, value: [B, H, 1, D], the new token, as for `append_page`; read if APPEND.
        DIGITS: whether int8 vectors are multiplied as int8, which needs Ampere or later.
        RUNS: segments per tile.
        WEIGHTED: whether a page's weight in the statistics is multiplied by its number of valid tokens.
        BOXES: whether pages have boxes.
        SINKS: whether the sink pages, before all candidates, are scored too.
        PROJECTED: whether the method projects its own queries, in float32; vectors are then converted to float32.
        D: size of the vectors; DK, DV: sizes of the token's key and value.
    """
    wait_for_launch(PDL)
    bh = tl.program_id(0)
    split = tl.program_id(1)
    step = own_step(step, bh // H, APART)
    layer = own_layer(layer, bh // H, APART)
    if APART and tl.load(step + POSITION) < 0:  # no sequence
        return
    if APPEND and split == num_splits:
        append_page(
            step, layer, key, value, 1, key_b, key_h, 0, value_b, value_h, 0, tl.load(step + POSITION) // PAGE, bh,
            SUMMARY, QUANTIZED, H, DK, DV, BLOCK_K, BLOCK_V, PAGE, SEGMENT, ROWS, PADDED, BACKING_BYTES,
            SUMMARISE,
        )  # fmt: skip
    else:
        if split == 0:
            tl.store(histogram + bh * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
        b = (bh // H).to(tl.int64)
        h = (bh % H).to(tl.int64)
        row = plan + b * PLAN_FIELDS
        capacity = tl.load(step + PAGE_CAPACITY)
        logits = tl.load(step + LOGITS).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * G * capacity
        first = tl.load(row + FIRST)
        stop = tl.load(row + STOP)
        group = tl.arange(0, BLOCK_G)
        column = tl.arange(0, BLOCK_D)
        lane = tl.arange(0, RUNS * SEGMENT)
        most = tl.full(
            [RUNS * SEGMENT, BLOCK_G], float("-inf"), tl.float32
        )  # one maximum per place in the tile; reduced over threads once, at the end
        total = tl.full([RUNS * SEGMENT, BLOCK_G], float("inf") if BOXES else 0.0, tl.float32)
        share = tl.cdiv(tl.cdiv(stop, SEGMENT * RUNS), num_splits) * RUNS
        begin = split * share
        end = tl.minimum(begin + share, tl.cdiv(stop, SEGMENT))
        scored = tl.load(row + NUM_SELECTED) < stop - first
        if SINKS:
            first = first * 0
        if scored & (begin < end):
            copies: tl.constexpr = 2 if DIGITS else 1
            converted: tl.constexpr = QUANTIZED or PROJECTED
            copy = tl.arange(0, copies * BLOCK_G)
            queries = tl.load(
                query + b * query_b + (h * G + copy // copies)[:, None] * query_h + column[None, :],
                mask=(copy < copies * G)[:, None] & (column < D)[None, :], other=0.0,
            )  # fmt: skip
            if BOXES:
                positive, high_factor = _operand(tl.maximum(queries, 0.0), scale, DIGITS, converted, SUMMARY, BLOCK_G)
                high_table = tl.load(layer + SUMMARY_1)
                high_units = tl.load(layer + SCALE_1)
                queries = tl.minimum(queries, 0.0)
            queries, factor = _operand(queries, scale, DIGITS, converted, SUMMARY, BLOCK_G)
            table = tl.load(layer + SUMMARY_0)
            units = tl.load(layer + SCALE_0)
            directory = tl.load(step + DIRECTORY).to(tl.pointer_type(tl.int32)) + b * tl.load(step + DIRECTORY_STRIDE)
            for segment in range(begin, end, RUNS):
                pages = segment * SEGMENT + lane
                vectors, unit = segment_vectors(
                    directory, table, units, h, segment, end, stop, tl.int8 if QUANTIZED else SUMMARY, H, D, BLOCK_D,
                    SEGMENT, ROWS, RUNS,
                )  # fmt: skip
                if BOXES:
                    highs, high_unit = segment_vectors(
                        directory, high_table, high_units, h, segment, end, stop, tl.int8 if QUANTIZED else SUMMARY, H,
                        D, BLOCK_D, SEGMENT, ROWS, RUNS,
                    )  # fmt: skip
                scores = _products(vectors, queries, DIGITS, converted, BLOCK_G)
                inside = candidates(step, b, pages, first, stop, PAGE, PADDED)
                scores = scores * (unit[:, None] * factor[None, :])
                if BOXES:
                    at_high = _products(highs, positive, DIGITS, converted, BLOCK_G)
                    scores += at_high * (high_unit[:, None] * high_factor[None, :])
                scores = tl.where(inside[:, None], scores, float("-inf"))
                tl.store(
                    logits + group[None, :] * capacity + pages[:, None], scores,
                    mask=(group < G)[None, :] & (pages < stop)[:, None],
                )  # fmt: skip
                if WEIGHTED and PADDED:  # without padding all pages have equally many tokens
                    scores += log_tokens(step, b, pages, inside, PAGE, PADDED)[:, None]
                higher = tl.maximum(most, scores)
                if BOXES:
                    total = tl.minimum(total, tl.where(inside[:, None], scores, float("inf")))
                else:
                    shift = tl.where(higher == float("-inf"), 0.0, higher)
                    total = total * tl.exp(most - shift) + tl.exp(scores - shift)
                most = higher
        highest = tl.max(most, 0)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        place = stats + ((bh * num_splits + split) * 2) * BLOCK_G + group
        tl.store(place, highest)
        if BOXES:
            tl.store(place + BLOCK_G, tl.min(total, 0))
        else:
            tl.store(place + BLOCK_G, tl.sum(total * tl.exp(most - shift[None, :]), 0))


@triton.jit
def _operand(
    queries, scale, DIGITS: tl.constexpr, CONVERTED: tl.constexpr, SUMMARY: tl.constexpr, BLOCK_G: tl.constexpr
):
    """The operand of `_products` for queries [rows, K] (two rows per head if DIGITS), and the factor of each product."""
    factor = tl.full([BLOCK_G], 1.0, tl.float32) * scale
    if DIGITS:
        queries, query_unit = digits(queries.to(tl.float32), 2 * BLOCK_G)
        factor *= tl.max(tl.reshape(query_unit, (BLOCK_G, 2)), 1)
    elif not CONVERTED:
        queries = queries.to(SUMMARY)
    return tl.trans(queries), factor


@triton.jit
def _products(vectors, queries, DIGITS: tl.constexpr, CONVERTED: tl.constexpr, BLOCK_G: tl.constexpr):
    """Products [pages, BLOCK_G] of vectors [pages, K] with queries from `_operand`. CONVERTED: to the queries' dtype first."""
    if DIGITS:
        products = tl.dot(vectors, queries, out_dtype=tl.int32)
        products = tl.reshape(products, (vectors.shape[0], BLOCK_G, 2))
        products = tl.sum(products * tl.where(tl.arange(0, 2) == 0, 256, 1), 2).to(tl.float32)
    elif CONVERTED:
        products = tl.dot(vectors.to(queries.dtype), queries, input_precision="ieee")
    else:
        products = tl.dot(vectors, queries, input_precision="ieee")
    return products
