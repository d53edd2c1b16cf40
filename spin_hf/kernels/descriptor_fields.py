"""Descriptors: two small int64 tensors on the device, through which decode kernels reach tensors that grow.

    step descriptor    one per batch and device     position, directory, padding, scratch that grows with the context
    layer descriptor   one per layer                address tables of pages and summaries, page frames, their tables

A captured graph holds the addresses of the descriptors only. A tensor may move between replays if its field is updated
before the next replay, so a cache grows without a new capture. Addresses are in bytes.
"""

from __future__ import annotations

from enum import IntEnum


class StepField(IntEnum):
    """Fields of a step descriptor. B sequences, H KV heads, G query heads per KV head, L layers."""

    POSITION = 0
    """Tokens before the step: the position of its first query."""
    CLOCK = 1
    """Queries so far; the clock of the eviction policy."""
    DIRECTORY = 2
    """int32 [B, DIRECTORY_STRIDE]: segments of each sequence."""
    DIRECTORY_STRIDE = 3
    VALID = 4
    """uint8 [B, BASE_TOKENS]: 0 for padding; address 0 if there is no padding."""
    BASE_TOKENS = 5
    """Tokens that VALID and UPTO cover; all later tokens are valid."""
    UPTO = 6
    """int32 [B, BASE_TOKENS + 1]: entry i is the number of valid tokens among the first i."""
    BUDGET_FRACTION = 7
    """The budget as a fraction of the context (the bits of a float64), or 0 for a budget in tokens."""
    LOGITS = 8
    """float32 [B, H, G, PAGE_CAPACITY]: scale * query . summary."""
    PAGE_CAPACITY = 9
    """Pages per sequence that the scratch has room for."""
    SCORES = 10
    """float32 [B, H, PAGE_CAPACITY]: score of each page; infinity for outliers, -infinity for pages that are not candidates."""
    OUTLIER = 11
    """uint8 [L, B, H, PAGE_CAPACITY]: 1 for outliers among the candidates."""
    BIN_LIST_PAGE = 12
    """int32 [B, H, PAGE_CAPACITY]: bin lists, the pages to select from. Entry i of list j is at i * num_lists + j."""
    BIN_LIST_SCORE = 13
    """float32, the same shape: the scores of these pages."""
    BIN_LIST_LENGTH = 14
    """int32 [B, H, num_lists]: the length of each bin list."""
    TIED = 15
    """int64 [B, H, PAGE_CAPACITY]: pages of the bin in which the budget ends, as keys that sort by score, then by page."""
    LIST_PAGE = 16
    """int32 [B, H, LIST_CAPACITY]: the page list: pages that the query attends to, with LOAD_MARK if they must be loaded."""
    LIST_CAPACITY = 17
    VICTIMS = 18
    """int32, the shape of LIST_PAGE: slots to evict from."""
    RERANK = 19
    """float32 [B, H, G, PAGE_CAPACITY]: log weights of the reranked pages, indexed as BIN_LIST_PAGE."""


class LayerField(IntEnum):
    """Fields of a layer descriptor."""

    BACKING = 0
    """int64 table: base address of each chunk of pages in the backing store."""
    SUMMARY_0 = 1
    """int64 table: base address of each chunk of the first summary in `summary_shapes`."""
    SCALE_0 = 2
    """int64 table of its float32 scales, or 0 if the summary is not int8."""
    SUMMARY_1 = 3
    SCALE_1 = 4
    SUMMARY_2 = 5
    SCALE_2 = 6
    SUMMARY_3 = 7
    SCALE_3 = 8
    SUMMARY_4 = 9
    SCALE_4 = 10
    KEY_BASIS = 11
    """[B, H, D, D] in the dtype of the pages: queries are transformed by q @ this (`CodedBasis.inverse`); 0 without codes."""
    VALUE_BASIS = 12
    """[B, H, Dv, Dv] in the dtype of the pages: values are coordinates @ this, transposed (`CodedBasis.value_axes`)."""
    BASIS_VECTORS = 13
    """float32 [B, H, 2 * D + 2 * Dv]: origin and widths of keys, origin and widths of values (`CodedBasis`)."""
    KEY_FORWARD = 14
    """[B, H, D, D] in the dtype of the pages: coordinates of keys are (key - origin) @ this (`CodedBasis.forward`)."""
    FRAMES = 15
    """Page frames, NUM_SLOTS per (sequence, KV head), in that order; 0 if the backing store is on the GPU."""
    NUM_SLOTS = 16
    """Slots per (sequence, KV head); 0 without page frames, -1 if SLOT_COUNTS has a count for each sequence."""
    PAGE_SLOT = 17
    """int32 [B, H, PAGE_SLOT_STRIDE]: page -> slot, -1 if the page is not resident."""
    PAGE_SLOT_STRIDE = 18
    SLOT_PAGE = 19
    """int32, one per frame: slot -> page, -1 if the slot is free."""
    SLOT_STEP = 20
    """int64, one per frame: the clock when the slot was last touched."""
    SLOT_COUNTS = 21
    """int64 [B, 2]: slots per KV head of a sequence, and the first frame of its first head; 0 if all counts are equal."""


def summary_field(index: int, array: int) -> LayerField:
    """The field of a summary's values (array 0) or scales (1), by the summary's place in `summary_shapes`."""
    return LayerField(LayerField.SUMMARY_0 + 2 * index + array)


class PlanField(IntEnum):
    """Zones and budget of each query and sequence, written by `plan_zones`: int32 [Q, B, len(PlanField)]."""

    FIRST = 0
    """First candidate page; earlier pages hold sinks."""
    STOP = 1
    """One past the last candidate page; later pages hold the recent window."""
    NUM_PAGES = 2
    """Pages up to and including the query's own."""
    NUM_SELECTED = 3
    """Pages to select per KV head."""
    NUM_OUTLIERS = 4
    """Pages of NUM_SELECTED that are outliers."""
    OWN_POSITION = 5
    """Valid tokens before the query's own."""
    CANDIDATES = 6
    """Pages in [FIRST, STOP) with a valid token."""
    LEADING = 7
    """Leading pages without a valid token; at most FIRST."""


class Counter(IntEnum):
    """Counters of a layer: int64 [len(Counter)]."""

    TOKENS = 0
    QUERIES = 1
    HITS = 2
    LOADS = 3
    EVICTIONS = 4


class Rating(IntEnum):
    """How the logits of a KV head's query heads become the score of a page: a logarithm of at most about 0."""

    LIKELIEST = 0
    """The largest probability (softmax over the candidates) over the query heads."""
    MEAN = 1
    """The mean probability over the query heads."""
    BOUND = 2
    """The largest product with a key in the page's box (first summary: low, second: high) over the query heads. The bounds of
    a KV head are shifted and scaled to [-30, 0], because their range is not known in advance."""


NUM_BINS = 2048
"""Score bins: the first for outliers, the last for all scores below the others."""

BINS_PER_NAT = 64
"""Scores are log probabilities, so bins reach down to exp(-32)."""

BIN_TILE_PAGES = 1024
"""Pages that one program bins at a time. Each such set of pages has its own bin list (`StepField.BIN_LIST_PAGE`)."""

LOAD_MARK = 1 << 30
"""Added to a listed page that must be loaded."""

MAX_QUERIES = 16
"""Upper limit of tokens of a call whose queries select pages; longer calls are prefill and attend to all tokens."""
