"""Clusters tokens into spans, in all layers at once, and restores position order.

    cluster_new_tokens   before a step                                   ->  `grow`, then summarize stale pages
    grow                 enough tokens have left the recent window       ->  one or more new spans
    restore, in_order    before a crop or a change of padding            ->  the spans it touches are in position order again

All run on the host, eagerly, between two steps. Every layer's store knows its own token order, so an interruption leaves a
valid cache. `grow` then continues with the layers that have fewer `clustered_pages` than there are pages in spans.

Pages of sequences that share segments are clustered once. If sequences share only part of a span, each gets its own copy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention.methods.base import FittedTensors, Method
from ..attention.methods.clustering import ClusteringMethod, TokenClusters
from ..errors import BudgetError, CacheStateError, CapacityError, require_integrity
from ..storage import permute_pages
from ..storage.clustered_spans import ClusteredSpans, Plan, pages_that_may_move
from ..storage.page_store import PageStore
from ..storage.segment_pool import segment_indices
from ..storage.token_permutation import is_permutation, tiles
from .fit import fits, forget_fits, measure_fits, new_fits, runs_to_fit, unfitted_rows
from .span_runs import Run, by_length, cut, group_equal, in_whole_units, movable_runs, runs_of
from .summarize import index_pages, index_room, pages_that_fit, stores_of, summarize_stale, together

if TYPE_CHECKING:
    from ..state import CacheState, LayerState

logger = logging.getLogger("spin_hf")


def cluster_new_tokens(state: CacheState) -> None:
    """Cluster tokens that left the recent window, and summarize stale pages. Cheap if there is nothing to do.

    Raises:
        CacheStateError: as for `grow`. Stale pages are then summarized before the next step.
    """
    grow(state)
    summarize_stale(state)
    for layer in state.layers:
        layer.observation_queries = None  # they belong to the prompt just clustered, not to later tokens


def grow(state: CacheState) -> None:
    """Cluster tokens that left the recent window, once there are `cluster_interval` of them. Cheap otherwise.

    Raises:
        CacheStateError: the method returned an invalid order or cluster sizes. Those pages stay in position order.
    """
    sequences, method, options = state.sequences, state.method, state.options
    if not isinstance(method, ClusteringMethod):
        return
    _cluster_layers(state, method)  # continue after an interruption
    window = options.recent_window + options.tuning.slack_tokens
    first, stop = sequences.spans.num_pages, (sequences.length - window) // sequences.page_size
    stop -= stop % state.method.unit_pages
    planned = sequences.spans.planned
    if planned is not None and planned[:2] != (sequences.length, first):
        planned = None
    if planned is None:
        tokens = (stop - first) * sequences.page_size
        if tokens < method.cluster_interval or not sequences.batch_size:
            return
    may_move = pages_that_may_move(
        sequences.mask.valid, sequences.batch_size, sequences.length, sequences.page_size, options.num_sink_tokens, window
    )  # fmt: skip
    may_move = in_whole_units(may_move, state.method.unit_pages)
    if planned is None:
        most = max(1, method.span_tokens // sequences.page_size)
        stops = cut(may_move[:, first:stop].any(0).tolist(), most, state.method.unit_pages)
        at_once = _spans_at_once(state, stops)
        stops = [first + stop for stop in stops]
        planned = (sequences.length, first, [stops[start : start + at_once] for start in range(0, len(stops), at_once)])
    for index, stops in enumerate(planned[2]):
        if not _add_spans(state, method, stops, may_move, (planned[0], stops[-1], planned[2][index + 1 :])):
            return


def _spans_at_once(state: CacheState, stops: list[int]) -> int:
    """How many of the spans that end at `stops` are clustered together: as many as `cluster_tokens` and memory allow."""
    if len(stops) == 1:
        return 1
    fitting, pages = pages_that_fit(state), state.options.tuning.cluster_tokens // state.sequences.page_size
    pages = pages if fitting is None else min(pages, fitting)
    return max(1, pages // -(-stops[-1] // len(stops)))


def restore(state: CacheState, valid: Tensor | None, length: int) -> None:
    """Restore position order where the padding `valid` does not allow clustering. Drops the affected spans.

    Args:
        valid: [B, >= length], bool, False for padding; None for none.
        length: tokens that every layer holds.
    """
    left = in_order(state, valid, length)
    if left is not state.sequences.spans:
        state.sequences.set_spans(left)
        forget_clustered(state)


def in_order(state: CacheState, valid: Tensor | None, length: int) -> ClusteredSpans:
    """Restore position order where a crop to `length` tokens with padding `valid` does not allow clustering.

    Spans wholly behind `length` are not reordered. The page table's spans do not change; the caller sets the returned ones.

    Args:
        valid: [B, >= length], bool, False for padding; None for none.
        length: tokens left after the crop.
    Returns:
        The remaining spans.
    """
    sequences, spans = state.sequences, state.sequences.spans
    left = length - spans.num_pages * sequences.page_size
    if not spans.stops or (valid is None and left >= state.options.recent_window):
        return spans
    touched = _misplaced(state, valid, length).any(0).nonzero().flatten()
    lowest = int(touched[0]) if touched.numel() else spans.num_pages
    while spans.num_pages > min(lowest, length // sequences.page_size):
        first, stop = spans.bounds[-1]
        if first * sequences.page_size < length:  # else the crop drops it
            sequences.own(range(first, stop))
            for group in together(state, stop - first):
                for layer in group:  # if interrupted, the span is clustered again
                    layer.clustered_pages = min(layer.clustered_pages, first)
                stores = stores_of(group)
                order = permute_pages.positions(stores, first, stop).flatten(2).argsort(2)
                sizes = order.new_ones((*order.shape[:2], stop - first))
                content = permute_pages.content(stores, first, stop)
                _permute_span(state.method, group, first, stop, order, sizes, content)
        spans = spans.without_last()
    return spans


def forget_clustered(state: CacheState) -> None:
    """Lower `clustered_pages` of all layers to the pages in spans, and forget what was fitted to others."""
    for layer in state.layers:
        layer.clustered_pages = min(layer.clustered_pages, state.sequences.spans.num_pages)
    forget_fits(state)


def check_integrity(state: CacheState) -> None:
    """Raise CacheStateError if sinks, recent pages or pages with padding are clustered. Summarizes stale pages first."""
    summarize_stale(state)
    sequences = state.sequences
    if sequences.spans.stops:
        misplaced = bool(_misplaced(state, sequences.mask.valid, sequences.length).any())
        require_integrity(not misplaced, "a clustered page has to be a run of positions")


def _misplaced(state: CacheState, valid: Tensor | None, length: int) -> Tensor:
    """Clustered pages that must not be with `length` tokens and padding `valid`: [B, pages in spans], bool."""
    sequences, options = state.sequences, state.options
    may_move = pages_that_may_move(
        valid, sequences.batch_size, length, sequences.page_size, options.num_sink_tokens, options.recent_window
    )
    misplaced = sequences.spans.clustered.clone()
    misplaced[:, : may_move.shape[1]] &= ~may_move[:, : misplaced.shape[1]]
    return misplaced


def _add_spans(state: CacheState, method: ClusteringMethod, stops: list[int], may_move: Tensor, planned: Plan) -> bool:
    """Add spans that end at `stops` and cluster their pages in `may_move` [B, N]. `planned` lists the spans after them.

    Returns:
        False if nothing has changed, as the caps leave no room for copies of pages that forks use.
    """
    sequences = state.sequences
    first, stop = sequences.spans.num_pages, stops[-1]
    unfitted = unfitted_rows(state, first) if fits(state.method) else []  # all their pages are summarised again
    changed = range(sequences.num_pages) if unfitted else range(first, stop)
    if not _has_room(state, lambda: sequences.own(changed)):
        return False
    clustered = [_own_copies(state, *each, may_move[:, slice(*each)], unfitted) for each in pairwise([first, *stops])]
    groups = list(together(state, stop - first))
    for group in groups:
        permute_pages.write_runs(stores_of(group), first, stop)
        for layer in group:
            layer.clustered_pages = first
    spans = sequences.spans.copy()
    for end, moves in zip(stops, clustered, strict=True):
        spans.append(end, moves)
    spans.planned = planned if planned[2] else None
    sequences.set_spans(spans)
    _cluster_layers(state, method, groups)
    return True


def _cluster_layers(state: CacheState, method: ClusteringMethod, new: list[list[LayerState]] | None = None) -> None:
    """Cluster the newest spans in the layers where that has not been done.

    Args:
        new: all layers, grouped by `together`, if `write_runs` has noted their pages; None if some may be clustered already.
    """
    spans = state.sequences.spans
    layers = [layer for layer in state.layers if layer.store is not None and layer.clustered_pages < spans.num_pages]
    if not layers:
        return
    first, stop = min(layer.clustered_pages for layer in layers), spans.num_pages
    state.sequences.own(range(first, stop))
    groups = list(together(state, stop - first, layers)) if new is None else new
    most_tokens = state.options.tuning.cluster_tokens
    bounds = [(start, end) for start, end in spans.bounds if start >= first]
    runs = [run for around in bounds for run in runs_of(state.sequences.directory, spans.clustered, *around)]
    to_fit, valid = runs_to_fit(state, first, runs), []
    for batch in _batches(state, stop - first, groups):
        formed = []
        for group in batch:
            content = permute_pages.content(stores_of(group), first, stop)
            queries = _observation_queries(group)
            order, cluster_pages, sound = _form_clusters(
                method, stores_of(group), content, first, runs, queries, most_tokens
            )
            valid += sound
            measured = measure_fits(state, group, content, order, first, to_fit, queries)
            formed.append((order, cluster_pages, content if len(batch) == 1 else None, measured))
            del content
        fitted = new_fits(state, batch, [measured for *_, measured in formed], to_fit)
        for group, (order, cluster_pages, held, _), tensors in zip(batch, formed, fitted, strict=True):
            content = permute_pages.content(stores_of(group), first, stop) if held is None else held
            args = first, stop, order, cluster_pages, content, stop, tensors, new is not None
            _permute_span(state.method, group, *args)
    if valid and not bool(
        torch.stack([sound.to(valid[0].device) for sound in valid]).all()
    ):  # the only synchronization
        raise CacheStateError(
            f"method {method}: expected form_clusters to return a permutation of a span's tokens for each KV head and "
            "pages_per_cluster that cover every page once, got missing or repeated tokens or pages; correct the method"
        )


def _batches(state: CacheState, num_pages: int, groups: list[list[LayerState]]) -> Iterator[list[list[LayerState]]]:
    """Groups of layers, as `together` makes them: as many of them as are fitted in one call.

    A fit takes many small launches, as many for a few layers as for all. Until it is done, the new order of all its groups is
    held, and their pages are read twice. So groups with pages in host memory, and those of methods without a fit, are alone.
    """
    if len(groups) == 1:
        yield groups
        return
    room = index_room(state, stores_of(groups[0])[0]) // 4
    batch: list[list[LayerState]] = []
    taken = 0
    for group in groups:
        store = group[0].store
        assert store is not None
        streams = len(group) * state.sequences.batch_size * store.num_heads
        takes = torch.int64.itemsize * streams * num_pages * (store.page_size + 1)  # order, and pages per cluster
        alone = store.frames is not None or not fits(state.method)
        if batch and (alone or taken + takes > room):
            yield batch
            batch, taken = [], 0
        batch, taken = [*batch, group], taken + takes
        if alone:
            yield batch
            batch, taken = [], 0
    if batch:
        yield batch


def _own_copies(state: CacheState, first: int, stop: int, may_move: Tensor, unfitted: list[int]) -> Tensor:
    """Unshare a span between sequences that move different pages of it, and all pages of sequences to be fitted.

    Returns:
        `may_move` [B, n], bool; all False if the caps leave no room for the copies.
    """
    sequences = state.sequences
    pages = [movable_runs(row) for row in may_move.tolist()]
    new = set(unfitted)
    labels = [(tuple(held), row in new) for row, held in enumerate(pages)]

    def unshare() -> None:
        for rows in group_equal(sequences.directory, segment_indices(first, stop), labels):
            if pages[rows[0]]:
                sequences.unshare(rows, range(sequences.num_pages) if rows[0] in new else range(first, stop))

    return may_move if _has_room(state, unshare) else torch.zeros_like(may_move)


def _has_room(state: CacheState, unshare: Callable[[], None]) -> bool:
    """Call `unshare`, which copies segments. False, and a warning once, if the caps leave no room for the copies."""
    try:
        unshare()
        return True
    except (BudgetError, CapacityError) as error:
        if error.available_bytes is None:  # not a cap: memory ran out
            raise
        if not state.warned_clustering:
            state.warned_clustering = True
            logger.warning("tokens stay unclustered, as there is no room for copies of what sequences share: %s", error)
        return False


def _form_clusters(
    method: ClusteringMethod, stores: list[PageStore], content: Tensor, first: int, runs: list[Run],
    observation_queries: Tensor | None,
    most_tokens: int,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
    """Let the method cluster the pages from `first` on. Pages outside of runs keep their order.

    Args:
        content: the pages, [L * B, H, n, page elements].
        observation_queries: [L, B, H, G, number, D], see `ClusteringMethod.form_clusters`.
        most_tokens: per call of the method, unless a run has more.
    Returns:
        order [L * B, H, tokens], pages per cluster [L * B, H, n] (None if each is one page), and for each call of the method
        whether its result is valid ([], bool, on the device). Runs with an invalid result keep their order.
    """
    layers, size, valid = len(stores), stores[0].page_size, []
    keys = stores[0].backing_layout.take(content)[0].unflatten(0, (layers, -1))
    order = torch.arange(content.shape[2] * size, device=keys.device).repeat(*keys.shape[:3], 1)
    cluster_pages = order.new_ones(keys.shape[:4]) if method.multi_page_clusters else None
    for alike in by_length(runs, most_tokens // size):
        of_runs = [keys[:, run.sequences[0], :, run.first - first : run.stop - first] for run in alike]
        inside = torch.stack(of_runs).flatten(0, 1).flatten(2, 3)  # [runs * L, H, tokens, D]
        queries = None
        if observation_queries is not None:
            held = [observation_queries[:, run.sequences[0]] for run in alike]
            queries = torch.stack(held).flatten(0, 1)
        made = method.form_clusters(inside, queries)
        good = _is_valid(method, made, inside.shape[:3], size)
        valid.append(good)
        each, sizes = (len(alike), layers), made.pages_per_cluster
        of_run = [None] * len(alike) if sizes is None else sizes.unflatten(0, each)
        for run, places, pages in zip(alike, made.order.unflatten(0, each), of_run, strict=True):
            start, end = run.first - first, run.stop - first
            for row in run.sequences:
                stay = order[:, row, :, start * size : end * size]
                torch.where(good, places + start * size if start else places, stay, out=stay)
                if cluster_pages is not None and pages is not None:
                    cluster_pages[:, row, :, start:end] = pages.where(good, 1)
    return order.flatten(0, 1), None if cluster_pages is None else cluster_pages.flatten(0, 1), valid


def _observation_queries(layers: list[LayerState]) -> Tensor | None:
    """Observation queries of all layers: [L, B, H, G, n, D]; None if a layer has none or shapes differ."""
    held = [layer.observation_queries for layer in layers if layer.observation_queries is not None]
    alike = len(held) == len(layers) and all(queries.shape == held[0].shape for queries in held)
    return torch.stack(held) if alike else None


def _permute_span(
    method: Method, layers: list[LayerState], first: int, stop: int, order: Tensor, cluster_pages: Tensor | None,
    content: Tensor, clustered_pages: int = 0, fitted: list[FittedTensors] | None = None, are_runs: bool = False,
) -> None:  # fmt: skip
    """Permute the tokens of a span, in all of the layers or in none, then summarize it.

    If summarizing fails, the pages stay stale until `summarize_stale`.

    Args:
        order, cluster_pages, content, are_runs: as for `permute_pages.permute_tokens`.
        clustered_pages: lower bound of the layers' `clustered_pages` afterwards.
        fitted: new tensors of the layers, with which all their pages are to be summarized. They are set with the permutation.
    """
    stores, before = stores_of(layers), [(layer.clustered_pages, layer.fitted) for layer in layers]
    after = [(max(each, clustered_pages), held) for each, held in before]
    if fitted is not None:
        after = [(each, held) for (each, _), held in zip(after, fitted, strict=True)]
    for layer in layers:
        layer.invalidate(first, stop)
        if fitted is not None:
            layer.invalidate(0, stores[0].length // stores[0].page_size)

    def note(states: list[tuple[int, FittedTensors | None]]) -> None:
        for layer, (pages, held) in zip(layers, states, strict=True):
            layer.clustered_pages, layer.fitted = pages, held

    marks = partial(note, after), partial(note, before)
    moved = permute_pages.permute_tokens(stores, first, stop, order, cluster_pages, content, marks, are_runs)
    index_pages(layers, method, first, stop, moved)
    for layer in layers:
        layer.mark_summarized(first, stop)


def _is_valid(method: ClusteringMethod, made: TokenClusters, shape: torch.Size, page_size: int) -> Tensor:
    """Whether clusters cover all tokens and pages once: [], bool, on the device. Raises CacheStateError on wrong shapes."""
    order, pages = made.order, made.pages_per_cluster
    expected = torch.Size((*shape[:2], shape[2] // page_size))
    if pages is not None and not method.multi_page_clusters:
        raise CacheStateError(
            f"method {method}: expected form_clusters to return no pages_per_cluster, as multi_page_clusters is False, got "
            "some; correct the method"
        )
    if order.shape != shape or (pages is not None and pages.shape != expected):
        raise CacheStateError(
            f"method {method}: expected form_clusters to return an order {tuple(shape)} and pages_per_cluster {expected} or "
            f"None, got {tuple(order.shape)} and {None if pages is None else tuple(pages.shape)}; correct the method"
        )
    valid = is_permutation(order)
    return valid if pages is None else valid & tiles(pages)
