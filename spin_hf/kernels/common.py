"""Helpers of the Triton kernels: descriptor fields as constants, page addresses, valid tokens, score bins."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .descriptor_fields import LOAD_MARK, Counter, LayerField, PlanField, StepField

# Names in the order of their enumeration.
(
    POSITION, CLOCK, DIRECTORY, DIRECTORY_STRIDE, VALID, BASE_TOKENS, UPTO, BUDGET_FRACTION, LOGITS, PAGE_CAPACITY,
    SCORES, OUTLIER, BIN_LIST_PAGE, BIN_LIST_SCORE, BIN_LIST_LENGTH, TIED, LIST_PAGE, LIST_CAPACITY, VICTIMS, RERANK,
) = (tl.constexpr(int(field)) for field in StepField)  # fmt: skip
(
    BACKING, SUMMARY_0, SCALE_0, SUMMARY_1, SCALE_1, SUMMARY_2, SCALE_2, SUMMARY_3, SCALE_3, SUMMARY_4, SCALE_4,
    KEY_BASIS, VALUE_BASIS, BASIS_VECTORS, KEY_FORWARD, FRAMES, NUM_SLOTS, PAGE_SLOT, PAGE_SLOT_STRIDE, SLOT_PAGE, SLOT_STEP,
    SLOT_COUNTS,
) = (tl.constexpr(int(field)) for field in LayerField)  # fmt: skip
(FIRST, STOP, NUM_PAGES, NUM_SELECTED, NUM_OUTLIERS, OWN_POSITION, CANDIDATES, LEADING) = (
    tl.constexpr(int(field)) for field in PlanField
)
(TOKENS, QUERIES, HITS, LOADS, EVICTIONS) = (tl.constexpr(int(field)) for field in Counter)
PLAN_FIELDS = tl.constexpr(len(PlanField))
STEP_FIELDS = tl.constexpr(len(StepField))
LAYER_FIELDS = tl.constexpr(len(LayerField))
COUNTERS = tl.constexpr(len(Counter))

LOAD = tl.constexpr(LOAD_MARK)
"""Added to a listed page that must be loaded."""

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """The Triton dtype of a PyTorch dtype."""
    return _DTYPES[dtype]


@triton.jit
def wait_for_launch(PDL: tl.constexpr):
    """With programmatic dependent launch: wait until the previous kernel has written everything, and let the next one start.

    Every kernel with PDL calls it, before it writes, and before it reads what the previous one writes. So at any time at most
    one later kernel has started, and all kernels but the previous one are done.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def own_step(step, b, APART: tl.constexpr):
    """The step descriptor of sequence `b`: the common one, or with APART the b-th.

    Addresses in the descriptors of sequence b are those of sequence 0 of tables in which b is the only one that exists. So
    kernels index tables by b either way, and a cache of one sequence can be any sequence of a batch.
    """
    if APART:
        step += b * STEP_FIELDS
    return step


@triton.jit
def own_layer(layer, b, APART: tl.constexpr):
    """The layer descriptor of sequence `b`, as `own_step`."""
    if APART:
        layer += b * LAYER_FIELDS
    return layer


@triton.jit
def page_rows(step, b, h, pages, mask, H: tl.constexpr, SEGMENT: tl.constexpr):
    """Rows of the pages of one (sequence, KV head); see `storage/page_table.py`."""
    return directory_rows(directory_of(step, b), h, pages, mask, H, SEGMENT)


@triton.jit
def directory_of(step, b):
    """The segments of one sequence."""
    return tl.load(step + DIRECTORY).to(tl.pointer_type(tl.int32)) + b * tl.load(step + DIRECTORY_STRIDE)


@triton.jit
def directory_rows(directory, h, pages, mask, H: tl.constexpr, SEGMENT: tl.constexpr):
    """As `page_rows`, from `directory_of`."""
    segments = tl.load(directory + pages // SEGMENT, mask=mask, other=0)
    return (segments.to(tl.int64) * H + h) * SEGMENT + pages % SEGMENT


@triton.jit
def slots_of(layer, b, h, H: tl.constexpr):
    """The number of slots of a (sequence, KV head), 0 without page frames, and its first frame. `b` and `h` are int64."""
    num_slots = tl.load(layer + NUM_SLOTS)
    first = (b * H + h) * num_slots
    if num_slots < 0:  # each sequence has its own slot count
        slot_count = tl.load(layer + SLOT_COUNTS).to(tl.pointer_type(tl.int64)) + b * 2
        num_slots = tl.load(slot_count)
        first = tl.load(slot_count + 1) + h * num_slots
    return num_slots, first


@triton.jit
def row_addresses(table, rows, mask, ROWS: tl.constexpr, ROW_BYTES: tl.constexpr):
    """Addresses of rows of a chunked array; `table` is the address of its chunk table."""
    bases = tl.load(table.to(tl.pointer_type(tl.int64)) + rows // ROWS, mask=mask, other=0)
    return bases + (rows % ROWS) * ROW_BYTES


@triton.jit
def rounded(numbers):
    """Round numbers of magnitude up to 2^22, halves to even."""
    return (numbers + 12582912.0) - 12582912.0  # 1.5 * 2^23


@triton.jit
def to_int8(states):
    """Encode vectors [n, D] as int8 codes [n, D] and scales [n], bit for bit as `Int8Layout.encode`.

    A vector with an infinity or NaN gets the scale NaN.
    """
    exact = states.to(tl.float32)
    scale = tl.max(tl.abs(exact), 1) * (1 / 127)
    scale = tl.where(scale == 0.0, 1.0, scale) + tl.sum(exact * 0.0, 1)
    return rounded(tl.div_rn(exact, scale[:, None])).to(tl.int8), scale


@triton.jit
def from_int8(codes, scale, dtype: tl.constexpr):
    """Decode int8 codes [n, D] and scales [n] to vectors [n, D], bit for bit as `Int8Layout.decode`."""
    return (codes.to(tl.float32) * scale[:, None]).to(dtype)


@triton.jit
def scale_addresses(row, PAGE: tl.constexpr, ROW_BYTES: tl.constexpr):
    """The address of the PAGE key scales of an int8 page, from the address of its row. The value scales follow them."""
    return (row + (ROW_BYTES - 8 * PAGE)).to(tl.pointer_type(tl.float32))


@triton.jit
def tokens_valid(step, b, tokens, mask):
    """Whether tokens of a sequence are valid, that is, not padding; False where `mask` is False."""
    base = tl.load(step + BASE_TOKENS)
    known = mask & (tokens < base)
    table = tl.load(step + VALID).to(tl.pointer_type(tl.int8))
    return (tl.load(table + b * base + tokens, mask=known, other=1) != 0) & mask


@triton.jit
def count_valid(step, b, ends, mask, PADDED: tl.constexpr):
    """The number of valid tokens among the first `ends` tokens of a sequence."""
    if PADDED:
        base = tl.load(step + BASE_TOKENS)
        table = tl.load(step + UPTO).to(tl.pointer_type(tl.int32)) + b * (base + 1)
        known = tl.minimum(ends, base)
        counted = tl.load(table + known, mask=mask, other=0) + (ends - known).to(tl.int32)
    else:
        counted = ends.to(tl.int32)
    return counted


@triton.jit
def log_tokens(step, b, pages, inside, PAGE: tl.constexpr, PADDED: tl.constexpr):
    """Logarithm of the number of valid tokens of complete pages; 0 where `inside` is False."""
    if PADDED:
        before = count_valid(step, b, pages * PAGE, inside, PADDED)
        tokens = count_valid(step, b, (pages + 1) * PAGE, inside, PADDED) - before
        counted = tl.log(tl.where(inside, tl.maximum(tokens, 1), 1).to(tl.float32))
    else:
        counted = tl.where(inside, tl.log(tl.full([], PAGE, tl.float32)), 0.0)
    return counted


@triton.jit
def log_total(most, sums):
    """Log-sum-exp of each row, from the maxima and the sums of its splits: [rows, splits] both."""
    highest = tl.max(most, 1)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    return shift + tl.log(tl.sum(sums * tl.exp(most - shift[:, None]), 1))


@triton.jit
def log_sums(stats, bh, num_splits, BLOCK_G: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr):
    """Log-sum-exp of all logits of each query head of a KV head: [GROUP], -infinity past the last head.

    Args:
        stats: [B * H, num_splits, 2, BLOCK_G], written by `score_kernel`.
        SPLITS: num_splits, rounded up to a power of two.
    """
    split = tl.arange(0, SPLITS)
    group = tl.arange(0, GROUP)
    place = stats + (bh * num_splits + split)[None, :] * 2 * BLOCK_G + group[:, None]
    known = (split < num_splits)[None, :] & (group < BLOCK_G)[:, None]
    most = tl.load(place, mask=known, other=float("-inf"))
    return log_total(most, tl.load(place + BLOCK_G, mask=known, other=0.0))


@triton.jit
def segment_vectors(
    directory, table, units, h, segment, end, stop,
    dtype: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
    ROWS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Load the vectors [RUNS * SEGMENT, BLOCK] of the pages of RUNS segments, and their scales [RUNS * SEGMENT].

    The rows of a segment are consecutive, so a segment needs one address look-up. A thread knows the segment of its rows at
    compile time.

    Args:
        end: the segment to stop before.
        table, units: addresses of the chunk tables of vectors and scales. Scales are read only if `dtype` is int8.
    """
    row_bytes: tl.constexpr = D * (dtype.primitive_bitwidth // 8)
    quantized: tl.constexpr = dtype == tl.int8
    lane = tl.arange(0, RUNS * SEGMENT)
    column = tl.arange(0, BLOCK)
    address = tl.zeros([RUNS * SEGMENT], tl.int64)
    place = tl.zeros([RUNS * SEGMENT], tl.int64)
    for run in tl.static_range(RUNS):
        row = (tl.load(directory + tl.minimum(segment + run, end - 1)).to(tl.int64) * H + h) * SEGMENT
        inside = row % ROWS + lane - run * SEGMENT
        mine = lane >= run * SEGMENT
        chunk = tl.load(table.to(tl.pointer_type(tl.int64)) + row // ROWS)
        address = tl.where(mine, chunk + inside * row_bytes, address)
        if quantized:
            chunk = tl.load(units.to(tl.pointer_type(tl.int64)) + row // ROWS)
            place = tl.where(mine, chunk + inside * 4, place)
    there = segment * SEGMENT + lane < stop
    pointer = tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)
    vectors = tl.load(pointer[:, None] + column[None, :], mask=there[:, None] & (column < D)[None, :], other=0)
    unit = tl.full([RUNS * SEGMENT], 1.0, tl.float32)
    if quantized:
        unit = tl.load(place.to(tl.pointer_type(tl.float32)), mask=there, other=0.0)
    return vectors, unit


@triton.jit
def digits(rows, BLOCK_R: tl.constexpr):
    """Encode queries as integers of two base-256 digits, so that products with int8 vectors are exact integers.

    Args:
        rows: [BLOCK_R, K]; every query stands in two adjacent rows. The first row gets the high digit, the second the low one,
            so that one thread holds both products.
    Returns:
        digits: int8 [BLOCK_R, K]; unit: float32 [BLOCK_R], the value of an integer step.
    """
    unit = tl.maximum(tl.max(tl.abs(rows), 1), 1e-30) / 32512.0
    whole = rounded(rows / unit[:, None])
    high = tl.floor((whole + 128.0) / 256.0)
    digit = tl.where((tl.arange(0, BLOCK_R) % 2 == 0)[:, None], high, whole - high * 256.0)
    return digit.to(tl.int8), unit


@triton.jit
def candidates(step, b, pages, first, stop, PAGE: tl.constexpr, PADDED: tl.constexpr):
    """Whether pages are candidates: in [first, stop), with a valid token."""
    inside = (pages >= first) & (pages < stop)
    if PADDED:
        before = count_valid(step, b, pages * PAGE, inside, PADDED)
        inside = inside & (count_valid(step, b, (pages + 1) * PAGE, inside, PADDED) > before)
    return inside


@triton.jit
def score_bins(scores, BINS: tl.constexpr, PER_NAT: tl.constexpr):
    """The bin of each score, best first: 0 for infinity, then steps of equal width, the last one open-ended."""
    depth = tl.minimum(tl.maximum(-scores, 0.0) * PER_NAT, BINS - 2.0)
    return tl.where(scores == float("inf"), 0, 1 + depth.to(tl.int32))


@triton.jit
def sortable(scores):
    """float32 scores as int32 numbers of the same order."""
    bits = scores.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
