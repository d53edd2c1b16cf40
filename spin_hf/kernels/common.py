"""What the Triton kernels share: descriptor fields as constants, addresses of pages, valid tokens, sortable scores."""

from __future__ import annotations

import triton
import triton.language as tl

from .fields import LOAD_MARK, Counter, LayerField, PlanField, StepField

POSITION = tl.constexpr(int(StepField.POSITION))
CLOCK = tl.constexpr(int(StepField.CLOCK))
DIRECTORY = tl.constexpr(int(StepField.DIRECTORY))
DIRECTORY_STRIDE = tl.constexpr(int(StepField.DIRECTORY_STRIDE))
VALID = tl.constexpr(int(StepField.VALID))
BASE_TOKENS = tl.constexpr(int(StepField.BASE_TOKENS))
UPTO = tl.constexpr(int(StepField.UPTO))
SHARE = tl.constexpr(int(StepField.SHARE))
LOGITS = tl.constexpr(int(StepField.LOGITS))
PAGE_CAPACITY = tl.constexpr(int(StepField.PAGE_CAPACITY))
SCORES = tl.constexpr(int(StepField.SCORES))
OUTLIER = tl.constexpr(int(StepField.OUTLIER))
KEPT_PAGE = tl.constexpr(int(StepField.KEPT_PAGE))
KEPT_SCORE = tl.constexpr(int(StepField.KEPT_SCORE))
KEPT_COUNT = tl.constexpr(int(StepField.KEPT_COUNT))
TIED = tl.constexpr(int(StepField.TIED))
LIST_PAGE = tl.constexpr(int(StepField.LIST_PAGE))
LIST_CAPACITY = tl.constexpr(int(StepField.LIST_CAPACITY))
VICTIMS = tl.constexpr(int(StepField.VICTIMS))

HOME = tl.constexpr(int(LayerField.HOME))
LANDMARK = tl.constexpr(int(LayerField.LANDMARK))
LANDMARK_SCALE = tl.constexpr(int(LayerField.LANDMARK_SCALE))
MIN_COSINE = tl.constexpr(int(LayerField.MIN_COSINE))
FRAMES = tl.constexpr(int(LayerField.FRAMES))
NUM_SLOTS = tl.constexpr(int(LayerField.NUM_SLOTS))
PAGE_SLOT = tl.constexpr(int(LayerField.PAGE_SLOT))
PAGE_SLOT_STRIDE = tl.constexpr(int(LayerField.PAGE_SLOT_STRIDE))
SLOT_PAGE = tl.constexpr(int(LayerField.SLOT_PAGE))
SLOT_STEP = tl.constexpr(int(LayerField.SLOT_STEP))

FIRST = tl.constexpr(int(PlanField.FIRST))
STOP = tl.constexpr(int(PlanField.STOP))
NUM_PAGES = tl.constexpr(int(PlanField.NUM_PAGES))
NUM_SELECTED = tl.constexpr(int(PlanField.NUM_SELECTED))
NUM_OUTLIERS = tl.constexpr(int(PlanField.NUM_OUTLIERS))
PLAN_FIELDS = tl.constexpr(len(PlanField))

TOKENS = tl.constexpr(int(Counter.TOKENS))
QUERIES = tl.constexpr(int(Counter.QUERIES))
HITS = tl.constexpr(int(Counter.HITS))
LOADS = tl.constexpr(int(Counter.LOADS))
EVICTIONS = tl.constexpr(int(Counter.EVICTIONS))

LOAD = tl.constexpr(LOAD_MARK)
"""The mark of a listed page that is to be loaded."""


@triton.jit
def page_rows(step, b, h, pages, mask, H: tl.constexpr, SEGMENT: tl.constexpr):
    """Rows of pages of one (sequence, KV head): see `storage/sequences.py`."""
    directory = tl.load(step + DIRECTORY).to(tl.pointer_type(tl.int32))
    segments = tl.load(directory + b * tl.load(step + DIRECTORY_STRIDE) + pages // SEGMENT, mask=mask, other=0)
    return (segments.to(tl.int64) * H + h) * SEGMENT + pages % SEGMENT


@triton.jit
def row_addresses(table, rows, mask, ROWS: tl.constexpr, ROW_BYTES: tl.constexpr):
    """Addresses of rows of a chunked array; `table` is the address of its table."""
    bases = tl.load(table.to(tl.pointer_type(tl.int64)) + rows // ROWS, mask=mask, other=0)
    return bases + (rows % ROWS) * ROW_BYTES


@triton.jit
def tokens_valid(step, b, tokens, mask):
    """Whether tokens of a sequence are no padding; False where `mask` is."""
    base = tl.load(step + BASE_TOKENS)
    known = mask & (tokens < base)
    table = tl.load(step + VALID).to(tl.pointer_type(tl.int8))
    return (tl.load(table + b * base + tokens, mask=known, other=1) != 0) & mask


@triton.jit
def count_valid(step, b, ends, mask, PADDED: tl.constexpr):
    """How many of the first `ends` tokens of a sequence are valid."""
    if PADDED:
        base = tl.load(step + BASE_TOKENS)
        table = tl.load(step + UPTO).to(tl.pointer_type(tl.int32)) + b * (base + 1)
        known = tl.minimum(ends, base)
        counted = tl.load(table + known, mask=mask, other=0) + (ends - known).to(tl.int32)
    else:
        counted = ends.to(tl.int32)
    return counted


@triton.jit
def candidates(step, b, pages, first, stop, PAGE: tl.constexpr, PADDED: tl.constexpr):
    """Which pages may be selected: those in [first, stop) that hold a valid token."""
    inside = (pages >= first) & (pages < stop)
    if PADDED:
        before = count_valid(step, b, pages * PAGE, inside, PADDED)
        inside = inside & (count_valid(step, b, (pages + 1) * PAGE, inside, PADDED) > before)
    return inside


@triton.jit
def score_bins(scores, BINS: tl.constexpr, PER_NAT: tl.constexpr):
    """The bin of each score, the best first: 0 for infinity, then equal steps downward, the last without a bottom."""
    depth = tl.minimum(tl.maximum(-scores, 0.0) * PER_NAT, BINS - 2.0)
    return tl.where(scores == float("inf"), 0, 1 + depth.to(tl.int32))


@triton.jit
def sortable(scores):
    """float32 scores as int32 that sort alike."""
    bits = scores.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
