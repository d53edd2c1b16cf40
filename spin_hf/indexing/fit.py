"""Tensors that a method fits to each sequence, once: when tokens of the sequence are clustered first.

    runs_to_fit  a span is clustered              ->  what is fitted: measure_fits, then new_fits; all pages are stale
    forget_fits  no clustered page is left        ->  the tensors of `ClusteringMethod.unfitted` again; all pages are stale
    fitted_of    tensors of layers, to summarise pages or to select by them

A sequence is fitted if it has clustered pages. Tensors are replaced, never written to, as forks share them. Sequences that
share a segment have equal tensors: a copy of a sequence has its tensors, and `cluster.py` copies segments that sequences to
be fitted share with others.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention.methods.base import FittedTensors, Method
from ..attention.methods.clustering import ClusteringMethod
from .span_runs import Run

if TYPE_CHECKING:
    from ..state import CacheState, LayerState

Measured = dict[str, Tensor]
"""What `ClusteringMethod.measure` returns."""
Fitting = tuple[Run, list[int]]
"""A run, and the sequences whose tensors are fitted to it."""


def fits(method: Method) -> bool:
    """Whether a method fits tensors to sequences."""
    return type(method).fitted_shapes is not Method.fitted_shapes


def fitted_of(layers: list[LayerState], method: Method) -> FittedTensors | None:
    """Fitted tensors of layers, name -> [L * B, H, ...]; None if the method has none.

    Args:
        layers: with pages that can be processed in one call.
    """
    if not fits(method) or not isinstance(method, ClusteringMethod):
        return None
    each = [_fitted(layer, method) for layer in layers]
    return each[0] if len(each) == 1 else {name: torch.cat([held[name] for held in each]) for name in each[0]}


def unfitted_rows(state: CacheState, num_pages: int) -> list[int]:
    """Sequences that have no clustered page among the first `num_pages` pages."""
    clustered = state.sequences.spans.clustered[:, :num_pages]
    if not clustered.shape[1]:
        return list(range(state.sequences.batch_size))
    has_run = (clustered[:, 1:] & clustered[:, :-1]).any(1)
    return [row for row, is_fitted in enumerate(has_run.tolist()) if not is_fitted]


def runs_to_fit(state: CacheState, first: int, runs: Iterable[Run]) -> list[Fitting]:
    """The first new run of each sequence that has no fitted tensors; none if the method fits none.

    Args:
        first: pages before the new runs.
        runs: the runs that are clustered.
    """
    if not fits(state.method):
        return []
    rows, chosen = set(unfitted_rows(state, first)), list[Fitting]()
    for run in sorted(runs, key=lambda run: run.first):
        members = sorted(rows.intersection(run.sequences))
        rows.difference_update(members)
        if members:
            chosen.append((run, members))
    return chosen


def measure_fits(
    state: CacheState, layers: list[LayerState], content: Tensor, order: Tensor, first: int, to_fit: list[Fitting],
    observation_queries: Tensor | None,
) -> list[Measured]:  # fmt: skip
    """Measure the runs that tensors are fitted to.

    Args:
        layers: with pages that can be processed in one call.
        content: pages from `first` on, in their old order, [L * B, H, n, page elements].
        order: [L * B, H, tokens], int64: place i will get the token at place order[i].
        to_fit: the runs.
        observation_queries: [L, B, H, G, number, D], see `ClusteringMethod.form_clusters`.
    Returns:
        name -> [L, H, ...], for each run.
    """
    method, store = state.method, layers[0].store
    if not to_fit or not isinstance(method, ClusteringMethod) or store is None:
        return []
    each, size, measured = (len(layers), -1), store.page_size, []
    parts = [part.unflatten(0, each) for part in store.backing_layout.take(content)]
    order = order.unflatten(0, each)
    for run, members in to_fit:
        row, pages = members[0], slice(run.first - first, run.stop - first)
        index = order[:, row, :, pages.start * size : pages.stop * size, None] - pages.start * size
        tokens = [part[:, row, :, pages].flatten(2, 3) for part in parts]  # copies, so only of the run
        moved = [part.gather(2, index.expand(-1, -1, -1, part.shape[-1])) for part in tokens]
        queries = None if observation_queries is None else observation_queries[:, row]
        keys, values = (part.unflatten(2, (-1, size)) for part in moved)
        measured.append(method.measure(keys, values, queries))
    return measured


def new_fits(
    state: CacheState, groups: list[list[LayerState]], measured: list[list[Measured]], to_fit: list[Fitting]
) -> list[list[FittedTensors] | None]:
    """Fit the tensors of several groups of layers, in one call for each device.

    Args:
        measured: what `measure_fits` returned for each group.
        to_fit: as for `measure_fits`.
    Returns:
        the new tensors of each layer of each group; None if nothing is fitted.
    """
    method = state.method
    if not to_fit or not isinstance(method, ClusteringMethod):
        return [None] * len(groups)
    made = [
        [{name: each.clone() for name, each in _fitted(layer, method).items()} for layer in group] for group in groups
    ]
    by_device: dict[torch.device, list[int]] = {}
    for number, (layer, *_) in enumerate(groups):
        assert layer.store is not None
        by_device.setdefault(layer.store.device, []).append(number)
    for numbers in by_device.values():
        layers = [held for number in numbers for held in made[number]]
        for index, (_, members) in enumerate(to_fit):
            parts = [measured[number][index] for number in numbers]
            found = method.fit({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
            for name, tensors in found.items():
                for held, tensor in zip(layers, tensors, strict=True):
                    held[name][members] = tensor
    return list(made)


def forget_fits(state: CacheState) -> None:
    """Give sequences without a clustered page the tensors of `unfitted`. Marks all pages as stale if that changes some."""
    if not fits(state.method) or not isinstance(state.method, ClusteringMethod):
        return
    sequences = state.sequences
    rows = unfitted_rows(state, sequences.spans.num_pages)
    none_left = len(rows) == sequences.batch_size  # also without sequences
    for layer in state.layers:
        if layer.fitted is None or not (rows or none_left):
            continue
        layer.invalidate(0, sequences.length // sequences.page_size)
        if none_left:
            layer.fitted = None
            continue
        assert layer.store is not None
        fixed = state.method.unfitted(layer.store.key_dim, layer.store.value_dim, layer.store.device)
        held = {name: tensor.clone() for name, tensor in layer.fitted.items()}
        for name, tensor in fixed.items():
            held[name][rows] = tensor
        layer.fitted = held


def selected_fits(layer: LayerState, rows: list[int]) -> FittedTensors | None:
    """The tensors of a layer when sequence i becomes sequence rows[i]."""
    return None if layer.fitted is None else {name: tensor[rows] for name, tensor in layer.fitted.items()}


def unfitted(method: ClusteringMethod, sizes: tuple[int, int, int, int], device: torch.device) -> FittedTensors:
    """The tensors of a layer before the fit, name -> [B, H, ...]. They are not written to.

    Args:
        sizes: B, H, and the sizes of keys and of values.
    """
    held = method.unfitted(*sizes[2:], device)
    return {name: tensor.expand(*sizes[:2], *tensor.shape) for name, tensor in held.items()}


def _fitted(layer: LayerState, method: ClusteringMethod) -> FittedTensors:
    """The tensors of a layer, name -> [B, H, ...]."""
    if layer.fitted is not None:
        return layer.fitted
    store = layer.store
    assert store is not None
    sizes = store.sequences.batch_size, store.num_heads, store.key_dim, store.value_dim
    return unfitted(method, sizes, store.device)
