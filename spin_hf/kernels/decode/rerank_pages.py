"""Reranking: the best pages by their means are scored again by their 4-bit keys, before selection.

    edge       the last bin that is reranked: the bin in which RERANK_FACTOR times the budget ends
    rerank     log weight of each page down to the edge, and of the sink pages: log sum over its tokens of
               exp(scale * q . (mean + 4-bit key))
               LOGITS of these pages, for `estimate_kernel`: log weight - log(tokens), limited to
               [logit, logit + MAX_CORRECTION], where logit is the one by the mean
    rate       score = log of the mean probability over the query heads, among all candidates and sinks; histogram
               pages that are not reranked count with their weight by the mean

Both kernels use the bin lists of `rate_kernel`, and `choose_kernel` reads them. The specification is `Bisection.select`, and
`attention/methods/four_bit_keys.py` for the codes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    BIN_LIST_LENGTH, BIN_LIST_PAGE, BIN_LIST_SCORE, FIRST, LOGITS, NUM_SELECTED, PAGE_CAPACITY, PLAN_FIELDS, POSITION,
    RERANK, SCORES, STOP, SUMMARY_2, SUMMARY_3, candidates, log_tokens, own_layer, own_step, page_rows, row_addresses,
    score_bins, wait_for_launch,
)  # fmt: skip
from ..descriptor_fields import BIN_TILE_PAGES, BINS_PER_NAT, NUM_BINS
from ..launch import Launch, LaunchShape, LayerBuffers, StepBuffers, power_of_two, rerank_sizes, dependent
from ..recipe import MAX_CORRECTION_NATS, KernelRecipe

_COUNTED = 2
"""Pages counted by `rate_kernel` per reranked page. The floor is set from the last step's histogram to give about this many."""
_TILE_TOKENS = 128


def rerank_pages(
    launch: Launch, buffers: StepBuffers, layer: LayerBuffers, plan: Tensor, *, group: int, recipe: KernelRecipe,
    shape: LaunchShape,
) -> None:  # fmt: skip
    """Score the best pages again by their 4-bit keys, for one query of `group` heads per KV head."""
    digits, columns, half = rerank_sizes(group, shape.key_dim, shape.dtype, shape.multiplies_int8)
    programs, code_bytes = buffers.splits.programs, -(-shape.key_dim // 2)
    common = {
        "RERANK_FACTOR": recipe.rerank_factor, "H": shape.num_heads, "G": group, "RERANK_G": columns, "PAGE": shape.page_size,
        "PADDED": shape.padded, "BIN_TILE": BIN_TILE_PAGES, "BINS": NUM_BINS, "PER_NAT": BINS_PER_NAT, "APART": shape.apart,
        "num_warps": 4, **dependent(shape),
    }  # fmt: skip
    launch(
        rerank_kernel, (buffers.num_streams, programs), buffers.step, layer.descriptor, buffers.operands, buffers.factors,
        plan, buffers.histogram, layer.rerank_floors, buffers.rerank_stats, DIGITS=digits, DK=shape.key_dim,
        HALF=half, SEGMENT=shape.segment_pages, ROWS=shape.rows_per_chunk, RUN=min(BIN_TILE_PAGES, 32),
        TILE=max(1, _TILE_TOKENS // shape.page_size), ALIGNED=min(16, code_bytes & -code_bytes),
        MAX_CORRECTION=MAX_CORRECTION_NATS, num_stages=1, **common,
    )  # fmt: skip
    launch(
        rate_rerank_kernel, (buffers.num_streams, programs), buffers.step, plan, buffers.histogram, layer.rerank_floors,
        buffers.rerank_histogram, buffers.factors, buffers.rerank_stats, programs, COUNTED=_COUNTED,
        SPLITS=power_of_two(programs), TILE=256, **common,
    )  # fmt: skip


@triton.jit
def rerank_kernel(
    step, layer, operands, factors, plan, histogram, floors, rerank_stats,
    DIGITS: tl.constexpr, RERANK_FACTOR: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    RERANK_G: tl.constexpr, DK: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, BIN_TILE: tl.constexpr, RUN: tl.constexpr,
    BINS: tl.constexpr, PER_NAT: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr,
    MAX_CORRECTION: tl.constexpr, APART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, i) reranks some pages of one bin list, or the pages of several lists if these outnumber programs.

    Args:
        operands, factors: written by `prepare_queries`.
        histogram, floors: written and used by `rate_kernel`: the histogram counts candidates down to the floor.
        rerank_stats: float32 [B * H, num_programs(1), 3, RERANK_G]: maximum and sum of exponentials of the new log weights of
            this program's pages, and the probability that they had by their means. Written.
        DIGITS: whether codes are multiplied as int8; else in the dtype of `operands`.
        RERANK_G: query heads, padded for the product; HALF: DK / 2, padded likewise.
        TILE: pages per tile.
        ALIGNED: alignment in bytes of every token's codes.
    """
    wait_for_launch(PDL)
    bh = tl.program_id(0)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    step = own_step(step, b, APART)
    layer = own_layer(layer, b, APART)
    if APART and tl.load(step + POSITION) < 0:  # no sequence
        return
    row = plan + b * PLAN_FIELDS
    capacity = tl.load(step + PAGE_CAPACITY)
    logits = tl.load(step + LOGITS).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * G * capacity
    reranked = tl.load(step + RERANK).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * G * capacity
    scores = tl.load(step + SCORES).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * capacity
    bin_list_page = tl.load(step + BIN_LIST_PAGE).to(tl.pointer_type(tl.int32)) + bh.to(tl.int64) * capacity
    bin_list_length = tl.load(step + BIN_LIST_LENGTH).to(tl.pointer_type(tl.int32)) + bh * tl.cdiv(capacity, BIN_TILE)
    first = tl.load(row + FIRST)
    stop = tl.load(row + STOP)
    wanted = tl.load(row + NUM_SELECTED)
    scored = wanted < stop - first
    upto = tl.cumsum(tl.load(histogram + bh * BINS + tl.arange(0, BINS)), 0)
    goal = _goal(RERANK_FACTOR, wanted, stop - first)
    edge = tl.sum((upto < goal).to(tl.int32), 0)  # BINS if fewer than `goal` were counted
    if scored & (edge == BINS):
        edge = _edge(scores, tl.load(floors + bh), first, stop, goal, BINS, PER_NAT, BIN_TILE)
    num_lists = tl.cdiv(stop, BIN_TILE)
    lane = tl.arange(0, BIN_TILE)
    group = tl.arange(0, RERANK_G)
    copies: tl.constexpr = 2 if DIGITS else 1
    copy = tl.arange(0, copies * RERANK_G)
    half = tl.arange(0, HALF)
    size: tl.constexpr = copies * RERANK_G * HALF
    operand = operands + bh * 2 * size + copy[None, :] * HALF + half[:, None]
    of_low, of_byte = tl.load(operand), tl.load(operand + size)
    factor = factors + bh * 4 * RERANK_G + group
    low_factor, byte_factor = tl.load(factor), tl.load(factor + RERANK_G)
    constant, lse = tl.load(factor + 2 * RERANK_G), tl.load(factor + 3 * RERANK_G)
    codes_table = tl.load(layer + SUMMARY_2)
    scale_table = tl.load(layer + SUMMARY_3)
    place = tl.arange(0, TILE * PAGE)
    most = tl.full([TILE, RERANK_G], float("-inf"), tl.float32)
    total = tl.zeros([TILE, RERANK_G], tl.float32)
    before = tl.zeros([TILE, RERANK_G], tl.float32)
    # Programs per bin list; each writes the same list.
    shares = tl.maximum(tl.num_programs(1) // tl.maximum(num_lists, 1), 1)
    for turn in range(tl.program_id(1), num_lists * shares, tl.num_programs(1)):
        bin_list = turn % num_lists
        pages = (lane // RUN * num_lists + bin_list) * RUN + lane % RUN
        score = tl.load(scores + pages, mask=(pages >= first) & (pages < stop), other=float("-inf"))
        entering = score > float("-inf")
        if scored:
            entering = entering & (score_bins(score, BINS, PER_NAT) <= edge)
        rank = tl.cumsum(entering.to(tl.int32), 0)
        tl.store(bin_list_page + (rank - 1) * num_lists + bin_list, pages, mask=entering)
        tl.store(bin_list_length + bin_list + 0 * lane, rank, mask=lane == BIN_TILE - 1)
        count = tl.max(rank, 0)
        if scored:
            if first > bin_list * RUN:  # sink pages of this list go behind its candidates, past the stored length
                sink = candidates(step, b, pages, 0, first, PAGE, PADDED)
                rank = tl.cumsum(sink.to(tl.int32), 0)
                tl.store(bin_list_page + (count + rank - 1) * num_lists + bin_list, pages, mask=sink)
                count += tl.max(rank, 0)
            tl.debug_barrier()
            for start in range(turn // num_lists * TILE, count, shares * TILE):
                ranks = start + tl.arange(0, TILE)
                there = ranks < count
                page = tl.load(bin_list_page + ranks * num_lists + bin_list, mask=there, other=0)
                token_there = start + place // PAGE < count
                token_page = tl.load(
                    bin_list_page + (start + place // PAGE) * num_lists + bin_list, mask=token_there, other=0
                )
                rows = page_rows(step, b, h, token_page, token_there, H, SEGMENT)
                code_row = row_addresses(codes_table, rows, token_there, ROWS, PAGE * ((DK + 1) // 2))
                scale_row = row_addresses(scale_table, rows, token_there, ROWS, PAGE * 2)
                pointer = (code_row + place % PAGE * ((DK + 1) // 2)).to(tl.pointer_type(tl.uint8))
                pointer = tl.multiple_of(pointer, ALIGNED)
                codes = tl.load(
                    pointer[:, None] + half[None, :],
                    mask=token_there[:, None] & (half < (DK + 1) // 2)[None, :],
                    other=0,
                )
                unit = tl.load(
                    scale_row.to(tl.pointer_type(tl.bfloat16)) + place % PAGE, mask=token_there, other=-1.0
                ).to(tl.float32)
                low = (codes & 15).to(tl.int8)
                byte = (codes ^ 128).to(tl.int8, bitcast=True)
                if DIGITS:
                    radix = tl.where(tl.arange(0, 2) == 0, 256, 1)
                    shape: tl.constexpr = (TILE * PAGE, RERANK_G, 2)
                    one = tl.sum(tl.reshape(tl.dot(low, of_low, out_dtype=tl.int32), shape) * radix, 2).to(tl.float32)
                    two = tl.sum(tl.reshape(tl.dot(byte, of_byte, out_dtype=tl.int32), shape) * radix, 2).to(tl.float32)
                else:
                    one = tl.dot(low.to(of_low.dtype), of_low, input_precision="ieee")
                    two = tl.dot(byte.to(of_byte.dtype), of_byte, input_precision="ieee")
                products = one * low_factor[None, :] + two * byte_factor[None, :] + constant[None, :]
                products *= unit[:, None]
                products = tl.where((unit >= 0)[:, None], products, float("-inf"))
                inside = there[:, None] & (group < G)[None, :]
                coarse = tl.load(logits + group[None, :] * capacity + page[:, None], mask=inside, other=float("-inf"))
                of_tokens = tl.reshape(products, (TILE, PAGE, RERANK_G))
                largest = tl.max(of_tokens, 1)
                base = tl.where(largest == float("-inf"), 0.0, largest)
                fine = coarse + base + tl.log(tl.sum(tl.exp(of_tokens - base[:, None, :]), 1))
                fine = tl.where(inside, fine, float("-inf"))
                spot = ranks * num_lists + bin_list
                tl.store(reranked + group[None, :] * capacity + spot[:, None], fine, mask=inside)
                tokens = log_tokens(step, b, page, there, PAGE, PADDED)[:, None]
                counted = coarse + tl.minimum(tl.maximum(fine - tokens - coarse, 0.0), MAX_CORRECTION)
                tl.store(logits + group[None, :] * capacity + page[:, None], counted, mask=inside)
                weighed = coarse
                if PADDED:  # without padding all pages have equally many tokens
                    weighed += tokens
                before += tl.where(inside, tl.exp(weighed - lse[None, :]), 0.0)
                higher = tl.maximum(most, fine)
                shift = tl.where(higher == float("-inf"), 0.0, higher)
                total = total * tl.exp(most - shift) + tl.exp(fine - shift)
                most = higher
    highest = tl.max(most, 0)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    mine = rerank_stats + (bh * tl.num_programs(1) + tl.program_id(1)) * 3 * RERANK_G + group
    tl.store(mine, highest)
    tl.store(mine + RERANK_G, tl.sum(total * tl.exp(most - shift[None, :]), 0))
    tl.store(mine + 2 * RERANK_G, tl.sum(before, 0))


@triton.jit
def _goal(RERANK_FACTOR: tl.constexpr, wanted, pages):
    """Pages to rerank for `wanted` selected ones, int32: RERANK_FACTOR * wanted, at most pages + 1, which reranks all."""
    return tl.minimum(wanted.to(tl.int64) * RERANK_FACTOR, pages + 1).to(tl.int32)


@triton.jit
def _edge(scores, floor, first, stop, goal, BINS: tl.constexpr, PER_NAT: tl.constexpr, TILE: tl.constexpr):
    """The first bin down to which there are `goal` pages; BINS if there are fewer. Bins up to `floor` have too few.

    A binary search over all scores. It is rarely needed, as the floor follows the scores of the last step.
    """
    low = tl.minimum(floor + 1, BINS)
    high = tl.full([], BINS, tl.int32)
    while low < high:
        middle = (low + high) // 2
        count = tl.zeros([], tl.int32)
        for start in range(0, stop, TILE):
            pages = start + tl.arange(0, TILE)
            score = tl.load(scores + pages, mask=(pages >= first) & (pages < stop), other=float("-inf"))
            found = (score > float("-inf")) & (score_bins(score, BINS, PER_NAT) <= middle)
            count += tl.sum(found.to(tl.int32), 0)
        low = tl.where(count < goal, middle + 1, low)
        high = tl.where(count < goal, high, middle)
    return low


@triton.jit
def rate_rerank_kernel(
    step, plan, first_histogram, floors, histogram, factors, rerank_stats, num_splits,
    RERANK_FACTOR: tl.constexpr, COUNTED: tl.constexpr, H: tl.constexpr, G: tl.constexpr, RERANK_G: tl.constexpr,
    SPLITS: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, BIN_TILE: tl.constexpr, TILE: tl.constexpr,
    BINS: tl.constexpr, PER_NAT: tl.constexpr, APART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, i) scores the pages of bin lists i, i + num_programs(1), ...

    Args:
        first_histogram: by the scores of `rate_kernel`.
        floors: int32 [B * H]: the last bin that `rate_kernel` counts at the next step, chosen from this step's histogram to
            give COUNTED times the pages to rerank. It grows by at most one bin per step, or to BINS if too few pages were
            counted. Written.
        histogram: int32 [B * H, BINS]: zeroed by `rate_kernel`. Added to, unless the budget covers all candidates.
        factors: written by `prepare_queries`.
        rerank_stats: written by `num_splits` programs of `rerank_kernel`; SPLITS is num_splits rounded up to a power of two.
        TILE: pages of a bin list per tile.
    """
    wait_for_launch(PDL)
    bh = tl.program_id(0)
    b = (bh // H).to(tl.int64)
    step = own_step(step, b, APART)
    if APART and tl.load(step + POSITION) < 0:  # no sequence
        return
    row = plan + b * PLAN_FIELDS
    capacity = tl.load(step + PAGE_CAPACITY)
    reranked = tl.load(step + RERANK).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * G * capacity
    bin_list_score = tl.load(step + BIN_LIST_SCORE).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * capacity
    bin_list_length = tl.load(step + BIN_LIST_LENGTH).to(tl.pointer_type(tl.int32)) + bh * tl.cdiv(capacity, BIN_TILE)
    first = tl.load(row + FIRST)
    stop = tl.load(row + STOP)
    scored = tl.load(row + NUM_SELECTED) < stop - first
    num_lists = tl.cdiv(stop, BIN_TILE)
    group = tl.arange(0, RERANK_G)
    lane = tl.arange(0, TILE)
    lse = tl.zeros([RERANK_G], tl.float32)
    if scored & (tl.program_id(1) == tl.num_programs(1) - 1):
        goal = _goal(RERANK_FACTOR, tl.load(row + NUM_SELECTED), stop - first)
        upto = tl.cumsum(tl.load(first_histogram + bh * BINS + tl.arange(0, BINS)), 0)
        enough = tl.sum((upto < COUNTED * goal).to(tl.int32), 0)
        floor = tl.minimum(enough, tl.load(floors + bh) + 1)
        tl.store(floors + bh, tl.where(tl.max(upto, 0) < goal, BINS, floor))
    if scored:
        split = tl.arange(0, SPLITS)
        place = rerank_stats + (bh * num_splits + split)[None, :] * 3 * RERANK_G + group[:, None]
        known = (split < num_splits)[None, :]
        most = tl.load(place, mask=known, other=float("-inf"))
        sums = tl.load(place + RERANK_G, mask=known, other=0.0)
        share = tl.sum(tl.load(place + 2 * RERANK_G, mask=known, other=0.0), 1)
        old = tl.load(factors + bh * 4 * RERANK_G + 3 * RERANK_G + group)
        if not PADDED:  # the stats count pages, not tokens
            old += tl.log(tl.full([], PAGE, tl.float32))
        # Pages that were not reranked keep their weight by the mean: the fraction 1 - share of exp(old).
        highest = tl.maximum(tl.max(most, 1), old)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        rest = tl.maximum(1.0 - share, 0.0) * tl.exp(old - shift)
        lse = shift + tl.log(rest + tl.sum(sums * tl.exp(most - shift[:, None]), 1))
    for bin_list in range(tl.program_id(1), num_lists, tl.num_programs(1)):
        count = tl.load(bin_list_length + bin_list)
        for start in range(0, count, TILE):
            ranks = start + lane
            there = ranks < count
            spot = ranks * num_lists + bin_list
            score = tl.zeros([TILE], tl.float32)
            if scored:
                inside = there[:, None] & (group < G)[None, :]
                fine = tl.load(reranked + group[None, :] * capacity + spot[:, None], mask=inside, other=float("-inf"))
                shares = tl.where(inside, tl.exp(fine - lse[None, :]), 0.0)
                score = tl.maximum(tl.log(tl.sum(shares, 1) * (1.0 / G)), -3.0e38)
                bins = score_bins(score, BINS, PER_NAT)
                tl.atomic_add(histogram + bh * BINS + bins, tl.full([TILE], 1, tl.int32), mask=there, sem="relaxed")
            tl.store(bin_list_score + spot, score, mask=there)
