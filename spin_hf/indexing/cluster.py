"""ClusteringMethod: when tokens trade places, in all layers at once, and when they go back.

    cluster_new_tokens   before a step: what the last forward put off
    grow       enough tokens have left the recent window                     ->  a span, or several
    restore    before a crop, or padding that changes                         ->  the spans that it touches are runs again

Both are the host's work in an eager place, between two steps: `CacheState.begin`, `truncate` and `reconcile`. A layer is
always consistent by itself, as its store knows what stands where: whatever is interrupted leaves a cache that is right, and
`grow` goes on where it was, with the layers that have not been `clustered_pages` so far.
PageTable that share segments are clustered_pages once; where they share a part of a span only, each gets its own copy.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..attention.methods.base import Method
from ..attention.methods.clustering import ClusteringMethod, TokenClusters
from ..errors import BudgetError, CacheStateError, CapacityError
from ..storage import permute_pages
from ..storage.clustered_spans import ClusteredSpans, Plan, pages_that_may_move
from ..storage.page_store import PageStore
from ..storage.page_table import SEGMENT_PAGES, segments_of
from ..storage.token_permutation import tiles
from .summarize import index_pages, stores_of, summarize_stale, together

if TYPE_CHECKING:
    from ..state import CacheState, LayerState

logger = logging.getLogger("spin_hf")

SLACK_TOKENS = 64
"""Tokens behind the recent window that stay where they are, so that a verification may take some back."""

_TOKENS_AT_ONCE = 32768
"""Most tokens of a sequence that are clustered at a time, and of all that a method arranges: bounds temporary memory."""

Pages = list[tuple[int, int]]


class Run(NamedTuple):
    """Pages [first, stop) of sequences that hold the same there, to be clustered_pages as one."""

    sequences: list[int]
    first: int
    stop: int


def cluster_new_tokens(state: CacheState) -> None:
    """Cluster what has become old enough, and summarise what waited for that. Cheap where there is nothing to do.

    Raises:
        as `grow`; what waits is done by the next step then.
    """
    grow(state)
    summarize_stale(state)
    for layer in state.layers:
        layer.observation_queries = None  # of tokens to come nobody knows yet what asks for them


def grow(state: CacheState) -> None:
    """Cluster what has become old enough, if that is enough. Cheap where it is not.

    Raises:
        CacheStateError: the method's arrangement loses tokens or pages. Where it does, they stay in order.
    """
    sequences, method, options = state.sequences, state.method, state.options
    if not isinstance(method, ClusteringMethod):
        return
    _cluster_layers(state, method)  # there is something to do where it was interrupted
    window = options.recent_window + SLACK_TOKENS
    first, stop = sequences.spans.num_pages, (sequences.length - window) // sequences.page_size
    planned = sequences.spans.planned
    if planned is not None and planned[:2] != (sequences.length, first):
        planned = None
    if planned is None:
        tokens = (stop - first) * sequences.page_size
        if tokens < method.cluster_interval or not sequences.batch_size:
            return
    may_move = pages_that_may_move(
        sequences.mask.valid,
        sequences.batch_size,
        sequences.length,
        sequences.page_size,
        options.num_sink_tokens,
        window,
    )
    if planned is None:
        stops = _cut(may_move[:, first:stop].any(0).tolist(), max(1, method.span_tokens // sequences.page_size))
        at_once = max(1, _TOKENS_AT_ONCE // (sequences.page_size * -(-stops[-1] // len(stops))))
        stops = [first + stop for stop in stops]
        planned = (sequences.length, first, [stops[part : part + at_once] for part in range(0, len(stops), at_once)])
    for index, stops in enumerate(planned[2]):
        _add_spans(state, method, stops, may_move, (planned[0], stops[-1], planned[2][index + 1 :]))


def restore(state: CacheState, valid: Tensor | None, length: int) -> None:
    """Put tokens back in order that may not be out of it with padding as in `valid`, where all of them stay.

    Args:
        valid: [B, >= length], bool; None for no padding.
        length: tokens that every layer holds.
    """
    left = in_order(state, valid, length)
    if left is not state.sequences.spans:
        state.sequences.set_spans(left)
        forget_clustered(state)


def in_order(state: CacheState, valid: Tensor | None, length: int) -> ClusteredSpans:
    """Put tokens back in order that may not be out of it once `length` of them are left, with padding as in `valid`.

    Those behind `length` stay where they are, so the spans are what they were until the others are gone.

    Args:
        valid: [B, >= length], bool; None for no padding.
    Returns:
        The spans that are left then.
    """
    sequences, spans = state.sequences, state.sequences.spans
    left = length - spans.num_pages * sequences.page_size
    if not spans.stops or (valid is None and left >= state.options.recent_window):
        return spans
    touched = _misplaced(state, valid, length).any(0).nonzero().flatten()
    lowest = int(touched[0]) if touched.numel() else spans.num_pages
    while spans.num_pages > min(lowest, length // sequences.page_size):
        first, stop = spans.bounds[-1]
        if first * sequences.page_size < length:  # else none of it is left
            for group in together(state, stop - first):
                for layer in group:  # to be clustered_pages again, where an interruption leaves the span as it is
                    layer.clustered_pages = min(layer.clustered_pages, first)
                stores = stores_of(group)
                order = permute_pages.positions(stores, first, stop).flatten(2).argsort(2)
                partitions = order.new_ones((*order.shape[:2], stop - first))
                content = permute_pages.content(stores, first, stop)
                _rearrange(state.method, group, first, stop, order, partitions, content)
        spans = spans.without_last()
    return spans


def forget_clustered(state: CacheState) -> None:
    """Note that no layer has clustered_pages more than there are spans."""
    for layer in state.layers:
        layer.clustered_pages = min(layer.clustered_pages, state.sequences.spans.num_pages)


def check_integrity(state: CacheState) -> None:
    """Raise CacheStateError where tokens traded places that must be in order: sinks, recent ones, pages with padding."""
    summarize_stale(state)
    sequences = state.sequences
    if sequences.spans.stops and bool(_misplaced(state, sequences.mask.valid, sequences.length).any()):
        raise CacheStateError("integrity: a clustered page has to be a run of positions; please report this as a bug")


def _misplaced(state: CacheState, valid: Tensor | None, length: int) -> Tensor:
    """Clustered pages that may not be, once `length` tokens are left: [B, pages in spans], bool."""
    sequences, options = state.sequences, state.options
    may_move = pages_that_may_move(
        valid, sequences.batch_size, length, sequences.page_size, options.num_sink_tokens, options.recent_window
    )
    misplaced = sequences.spans.grouped.clone()
    misplaced[:, : may_move.shape[1]] &= ~may_move[:, : misplaced.shape[1]]
    return misplaced


def _cut(may_move: list[bool], most: int) -> list[int]:
    """Where to cut pages into spans: equal parts of `most` pages or fewer, the first one with what must stay before it.

    What is then left, fewer pages than there are parts, waits for the next time.
    """
    lead = may_move.index(True) if True in may_move else 0
    parts = -(-(len(may_move) - lead) // most)
    each = (len(may_move) - lead) // parts
    return [lead + each * (part + 1) for part in range(parts)]


def _add_spans(
    state: CacheState, method: ClusteringMethod, stops: list[int], may_move: Tensor, planned: Plan
) -> None:  # fmt: skip
    """Cluster the pages `may_move` [B, N] of the spans that end at `stops`, in one go in each layer; `planned` is next."""
    sequences = state.sequences
    first, stop = sequences.spans.num_pages, stops[-1]
    grouped = [_own_copies(state, start, end, may_move[:, start:end]) for start, end in pairwise([first, *stops])]
    for group in together(state, stop - first):
        permute_pages.write_runs(stores_of(group), first, stop)
        for layer in group:
            layer.clustered_pages = first
    spans = sequences.spans.copy()
    for end, moves in zip(stops, grouped, strict=True):
        spans.append(end, moves)
    spans.planned = planned if planned[2] else None
    sequences.set_spans(spans)
    _cluster_layers(state, method)


def _cluster_layers(state: CacheState, method: ClusteringMethod) -> None:
    """Arrange what the newest spans hold in the layers where that has not been done."""
    spans = state.sequences.spans
    layers = [layer for layer in state.layers if layer.store is not None and layer.clustered_pages < spans.num_pages]
    if not layers:
        return
    first, stop = min(layer.clustered_pages for layer in layers), spans.num_pages
    runs = [run for start, end in spans.bounds if start >= first for run in _runs_in(state, start, end)]
    flawless = []
    for group in together(state, stop - first, layers):
        content = permute_pages.content(stores_of(group), first, stop)
        order, partitions, sound = _form_clusters(
            method, stores_of(group), content, first, runs, _observation_queries(group)
        )
        _rearrange(state.method, group, first, stop, order, partitions, content, stop)
        flawless += sound
    if flawless and not bool(torch.stack(flawless).all()):  # the only waiting for the device
        raise CacheStateError(
            f"method {method}: expected arrange to return a permutation of the tokens of a span in each KV head, and "
            "pages_per_cluster that cover every page once, got numbers or pages twice or not at all; correct the method"
        )


def _own_copies(state: CacheState, first: int, stop: int, may_move: Tensor) -> Tensor:
    """Copies of what sequences share in part of a span.

    Returns:
        `may_move` [B, n], or nothing where the caps have no room for copies.
    """
    sequences = state.sequences
    pages = [_runs_of(row) for row in may_move.tolist()]
    try:
        for rows in _alike(sequences.directory, range(first // SEGMENT_PAGES, segments_of(stop)), pages):
            if pages[rows[0]]:
                sequences.unshare(rows, range(first, stop))
    except (BudgetError, CapacityError) as error:
        if error.available_bytes is None:  # no cap says so: memory has run out
            raise
        if not state.warned_clustering:
            state.warned_clustering = True
            logger.warning("tokens stay ungrouped, as there is no room for copies of what sequences share: %s", error)
        return torch.zeros_like(may_move)
    return may_move


def _runs_in(state: CacheState, first: int, stop: int) -> list[Run]:
    """The runs of a span that are to be clustered_pages, each once for the sequences that hold the same."""
    sequences = state.sequences
    pages = [_runs_of(row) for row in sequences.spans.grouped[:, first:stop].tolist()]
    groups = _alike(sequences.directory, range(first // SEGMENT_PAGES, segments_of(stop)), pages)
    return [Run(rows, first + start, first + end) for rows in groups for start, end in pages[rows[0]]]


def _alike(directory: list[list[int]], segments: range, runs: list[Pages]) -> list[list[int]]:
    """PageTable in groups that hold the same segments, and may move the same pages."""
    groups: dict[object, list[int]] = {}
    for row, held in enumerate(directory):
        groups.setdefault((tuple(held[index] for index in segments), tuple(runs[row])), []).append(row)
    return list(groups.values())


def _runs_of(may_move: list[bool]) -> Pages:
    """First page and the page behind, of each run of two or more pages that may move."""
    runs, start = [], 0
    for page, moves in enumerate([*may_move, False]):
        if not moves:
            if page - start > 1:
                runs.append((start, page))
            start = page + 1
    return runs


def _form_clusters(
    method: ClusteringMethod,
    stores: list[PageStore],
    content: Tensor,
    first: int,
    runs: list[Run],
    observation_queries: Tensor | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Order [L * B, H, tokens] and partitions [L * B, H, n] of pages from `first` on; those outside of runs stay.

    Args:
        content: the pages, [L * B, H, n, page elements].
        observation_queries: [L, B, H, G, number, D], see `ClusteringMethod.form_clusters`.
    Returns:
        Also whether what the method made of runs is sound, on the device; runs of which it is not stay as they are.
    """
    layers, size, sound = len(stores), stores[0].page_size, []
    keys = stores[0].backing_layout.take(content)[0].unflatten(0, (layers, -1))
    order = torch.arange(content.shape[2] * size, device=keys.device).expand(*keys.shape[:3], -1).clone()
    partitions = order.new_ones(keys.shape[:4])
    for alike in _of_one_length(runs, _TOKENS_AT_ONCE // size):
        parts = [keys[:, run.sequences[0], :, run.first - first : run.stop - first] for run in alike]
        inside = torch.stack(parts).flatten(0, 1).flatten(2, 3)  # [runs * L, H, tokens, D]
        queries = (
            None
            if observation_queries is None
            else torch.stack([observation_queries[:, run.sequences[0]] for run in alike]).flatten(0, 1)
        )
        made = method.form_clusters(inside, queries)
        good = _is_sound(method, made, inside.shape[:3], size)
        sound.append(good)
        for run, places, pages in zip(
            alike,
            made.order.unflatten(0, (-1, layers)),
            [None] * len(alike)
            if made.pages_per_cluster is None
            else made.pages_per_cluster.unflatten(0, (-1, layers)),
            strict=True,
        ):
            start, end = run.first - first, run.stop - first
            for row in run.sequences:
                stay = order[:, row, :, start * size : end * size]
                stay.copy_(torch.where(good, places + start * size, stay))
                if pages is not None:
                    partitions[:, row, :, start:end] = pages.where(good, 1)
    return order.flatten(0, 1), partitions.flatten(0, 1), sound


def _observation_queries(layers: list[LayerState]) -> Tensor | None:
    """What a prompt's end asked, in all of the layers: [L, B, H, G, n, D]; None where some have nothing, or differ."""
    held = [layer.observation_queries for layer in layers if layer.observation_queries is not None]
    alike = len(held) == len(layers) and all(queries.shape == held[0].shape for queries in held)
    return torch.stack(held) if alike else None


def _of_one_length(runs: list[Run], most_pages: int) -> Iterator[list[Run]]:
    """Runs of as many pages each, `most_pages` in all or a single one."""
    by_length: dict[int, list[Run]] = {}
    for run in runs:
        by_length.setdefault(run.stop - run.first, []).append(run)
    for length, alike in by_length.items():
        at_once = max(1, most_pages // length)
        yield from (alike[start : start + at_once] for start in range(0, len(alike), at_once))


def _rearrange(
    method: Method,
    layers: list[LayerState],
    first: int,
    stop: int,
    order: Tensor,
    partitions: Tensor,
    content: Tensor,
    clustered_pages: int = 0,
) -> None:
    """Rearrange a span of layers, or leave them as they were, and index it; where that fails, it is left to `summarize_stale`.

    Args:
        clustered_pages: pages of spans that are clustered_pages in these layers then, if that is more than before.
    """
    stores, before = stores_of(layers), [layer.clustered_pages for layer in layers]
    for layer in layers:
        layer.invalidate(first, stop)

    def note(pages: list[int]) -> None:
        for layer, each in zip(layers, pages, strict=True):
            layer.clustered_pages = each

    marks = partial(note, [max(each, clustered_pages) for each in before]), partial(note, before)
    moved = permute_pages.permute_tokens(stores, first, stop, order, partitions, content, marks)
    index_pages(stores, method, layers[0].number, first, stop, moved)
    for layer in layers:
        layer.mark_summarized(first, stop)


def _is_sound(method: ClusteringMethod, made: TokenClusters, shape: torch.Size, page_size: int) -> Tensor:
    """Whether an arrangement loses nothing, on the device. Raises CacheStateError where its shapes are wrong."""
    order, pages = made.order, made.pages_per_cluster
    expected = torch.Size((*shape[:2], shape[2] // page_size))
    if pages is not None and not method.multi_page_clusters:
        raise CacheStateError(
            f"method {method}: expected arrange to return no pages_per_cluster, as multi_page_clusters is False, got some; "
            "correct the method"
        )
    if order.shape != shape or (pages is not None and pages.shape != expected):
        raise CacheStateError(
            f"method {method}: expected arrange to return an order {tuple(shape)} and pages_per_cluster {expected} or None, "
            f"got {tuple(order.shape)} and {None if pages is None else tuple(pages.shape)}; correct the method"
        )
    sound = _times_each(order).eq(1).all()
    return sound if pages is None else sound & tiles(pages)


def _times_each(order: Tensor) -> Tensor:
    """How often an order [..., n] has each of the n places, and at the end one more than it has other numbers: [..., n + 1]."""
    count = order.shape[-1]
    places = torch.where((order >= 0) & (order < count), order, count)
    times = order.new_zeros((*order.shape[:-1], count + 1))
    times[..., -1] = 1
    return times.scatter_add_(-1, places, torch.ones_like(places))
