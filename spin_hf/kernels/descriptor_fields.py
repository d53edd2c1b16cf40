"""Where the kernels find what grows: two small int64 tensors on the device, read by every kernel of a decode step.

    step descriptor    one per batch and device     position, directory, padding, scratch that grows with the context
    layer descriptor   one per layer                address tables of pages and summaries, page frames, their tables

A captured graph holds the addresses of the descriptors only. What a field points to may move between replays, as
long as the field is written before the next one; so a cache grows without capturing again. Addresses are in bytes.
"""

from __future__ import annotations

from enum import IntEnum


class StepField(IntEnum):
    """Fields of a step descriptor. B sequences, H KV heads, G query heads per KV head, N pages at most."""

    POSITION = 0
    """Tokens held before the step: the position of its first query."""
    CLOCK = 1
    """Queries so far; the clock of the residency."""
    DIRECTORY = 2
    """int32 [B, DIRECTORY_STRIDE]: segments of each sequence."""
    DIRECTORY_STRIDE = 3
    VALID = 4
    """uint8 [B, BASE_TOKENS]: 0 for padding; address 0 where nothing is padding."""
    BASE_TOKENS = 5
    """Tokens that VALID and UPTO know; all later ones are valid."""
    UPTO = 6
    """int32 [B, BASE_TOKENS + 1]: how many of the first i tokens are valid."""
    SHARE = 7
    """The budget as a share of the context (the bits of a float64), or 0."""
    LOGITS = 8
    """float32 [B, H, G, PAGE_CAPACITY]: scale times query times landmark."""
    PAGE_CAPACITY = 9
    """N: pages of a sequence that the scratch has room for."""
    SCORES = 10
    """float32 [B, H, PAGE_CAPACITY]: what a page is worth to its KV head: infinity for outliers, -infinity for no candidate."""
    OUTLIER = 11
    """uint8 [L, B, H, PAGE_CAPACITY]: 1 for the outliers among the candidates of a layer."""
    KEPT_PAGE = 12
    """int32 [B, H, PAGE_CAPACITY]: the pages that may be chosen, the i-th of part j of `parts` at i * parts + j."""
    KEPT_SCORE = 13
    """float32, the same shape: their scores."""
    KEPT_COUNT = 14
    """int32 [B, H, parts]: how many they are."""
    TIED = 15
    """int64 [B, H, PAGE_CAPACITY]: pages of the bin in which the budget ends, as keys that sort by score, then by page."""
    LIST_PAGE = 16
    """int32 [B, H, LIST_CAPACITY]: the pages that the query attends to, those to be loaded marked."""
    LIST_CAPACITY = 17
    VICTIMS = 18
    """int32, the shape of LIST_PAGE: slots that make room."""
    RERANK = 19
    """float32 [B, H, G, PAGE_CAPACITY]: log weights of the pages that were looked at closer, by place in KEPT_PAGE."""


class LayerField(IntEnum):
    """Fields of a layer descriptor."""

    BACKING = 0
    """int64 table: base address of each chunk of pages."""
    SUMMARY_0 = 1
    """int64 table: base address of each chunk of the first of the method's summaries, in the order of `summary_shapes`."""
    SCALE_0 = 2
    """int64 table of its float32 scales, or 0 where it is no int8."""
    SUMMARY_1 = 3
    SCALE_1 = 4
    SUMMARY_2 = 5
    SCALE_2 = 6
    SUMMARY_3 = 7
    SCALE_3 = 8
    FRAMES = 9
    """Page frames, or 0 where pages are at home in the compute tier: NUM_SLOTS for each (sequence, KV head), in that order."""
    NUM_SLOTS = 10
    """Slots of each (sequence, KV head), 0 where there are no page frames; -1 where SHARES says how many."""
    PAGE_SLOT = 11
    """int32 [B, H, PAGE_SLOT_STRIDE]: page -> slot, -1 where it is not resident."""
    PAGE_SLOT_STRIDE = 12
    SLOT_PAGE = 13
    """int32, one for each frame: slot -> page, -1 where it is free."""
    SLOT_STEP = 14
    """int64, one for each frame: the clock when the slot was last touched."""
    SHARES = 15
    """int64 [B, 2]: slots of each KV head of a sequence, and the first frame of its first head; 0 where all have as many."""


def summary_field(index: int, array: int) -> LayerField:
    """The field of a summary's values (array 0) or scales (1), by the summary's place in `summary_shapes`."""
    return LayerField(LayerField.SUMMARY_0 + 2 * index + array)


class PlanField(IntEnum):
    """What `plan_step` computes for each query and sequence: int32 [Q, B, len(PlanField)]."""

    FIRST = 0
    """First candidate page; pages before it hold sinks."""
    STOP = 1
    """Behind the last candidate page; pages from here on hold the recent window."""
    NUM_PAGES = 2
    """Pages up to the query's own."""
    NUM_SELECTED = 3
    """Pages to select per KV head."""
    NUM_OUTLIERS = 4
    """How many of them go to outliers."""
    OWN_POSITION = 5
    """Valid tokens before the query's own."""
    CANDIDATES = 6
    """Pages in [FIRST, STOP) with a valid token."""
    LEADING = 7
    """Pages before the first one with a valid token; at most FIRST."""


class Counter(IntEnum):
    """What a layer counts: int64 [len(Counter)]."""

    TOKENS = 0
    QUERIES = 1
    HITS = 2
    LOADS = 3
    EVICTIONS = 4


class Rating(IntEnum):
    """What the logits of a group make of a page, always a logarithm of at most about 0."""

    LIKELIEST = 0
    """The largest of the shares (softmax over the candidates) that the query heads of a KV head give it."""
    SHARE = 1
    """The mean of these shares (as good as their sum)."""
    BOUND = 2
    """The largest product with a key in the page's box (first summary: low, second: high), so moved and spaned that all
    pages of a KV head lie between -30 and 0: what products spread over is not known beforehand."""


NUM_BINS = 2048
"""Bins of scores: the first for outliers, the last for all below the others."""

BINS_PER_NAT = 64
"""Scores are logarithms of probabilities, so bins reach down to exp(-32)."""

PART_PAGES = 1024
"""Pages that are rated together: a part."""

LOAD_MARK = 1 << 30
"""Added to a listed page that is to be loaded."""

MAX_QUERIES = 16
"""Most tokens of one call whose queries select pages; longer calls are prefill and attend to everything."""
