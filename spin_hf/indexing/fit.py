"""Tensors that a method fits to each sequence, once: when tokens of the sequence are clustered first.

    fit_new      a span has been clustered        ->  tensors of the sequences that have none yet; all their pages are stale
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
from .span_runs import Run, movable_runs

if TYPE_CHECKING:
    from ..state import CacheState, LayerState


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
    return [row for row, held in enumerate(clustered.tolist()) if not movable_runs(held)]


def fit_new(
    state: CacheState, layers: list[LayerState], content: Tensor, first: int, runs: Iterable[Run],
    observation_queries: Tensor | None,
) -> None:  # fmt: skip
    """Fit the tensors of sequences that have none, to the first of their new runs. Marks all pages as stale.

    Args:
        layers: with pages that can be processed in one call.
        content: pages from `first` on, in their new order, [L * B, H, n, page elements].
        runs: the runs that were clustered.
        observation_queries: [L, B, H, G, number, D], see `ClusteringMethod.form_clusters`.
    """
    method, sequences = state.method, state.sequences
    store = layers[0].store
    if not fits(method) or not isinstance(method, ClusteringMethod) or store is None:
        return
    rows, chosen = set(unfitted_rows(state, first)), list[tuple[Run, list[int]]]()
    for run in sorted(runs, key=lambda run: run.first):
        members = sorted(rows.intersection(run.sequences))
        rows.difference_update(members)
        if members:
            chosen.append((run, members))
    if not chosen:
        return
    keys, values = (part.unflatten(0, (len(layers), -1)) for part in store.backing_layout.take(content))
    before = [_fitted(layer, method) for layer in layers]
    made = [{name: tensor.clone() for name, tensor in held.items()} for held in before]
    for run, members in chosen:
        row, pages = members[0], slice(run.first - first, run.stop - first)
        queries = None if observation_queries is None else observation_queries[:, row]
        found = method.fit(keys[:, row, :, pages], values[:, row, :, pages], queries)
        for name, tensors in found.items():
            for held, tensor in zip(made, tensors, strict=True):
                held[name][members] = tensor
    for layer, held in zip(layers, made, strict=True):
        layer.invalidate(0, sequences.length // sequences.page_size)
        layer.fitted = held


def forget_fits(state: CacheState) -> None:
    """Give sequences without a clustered page the tensors of `unfitted`. Marks all pages as stale if that changes some."""
    if not fits(state.method) or not isinstance(state.method, ClusteringMethod):
        return
    sequences = state.sequences
    rows = unfitted_rows(state, sequences.spans.num_pages)
    for layer in state.layers:
        if layer.fitted is None or not rows:
            continue
        layer.invalidate(0, sequences.length // sequences.page_size)
        if len(rows) == sequences.batch_size or not sequences.length:
            layer.fitted = None
            continue
        fixed, held = _unfitted(layer, state.method), {name: tensor.clone() for name, tensor in layer.fitted.items()}
        for name, tensor in fixed.items():
            held[name][rows] = tensor
        layer.fitted = held


def selected_fits(layer: LayerState, rows: list[int]) -> FittedTensors | None:
    """The tensors of a layer when sequence i becomes sequence rows[i]."""
    return None if layer.fitted is None else {name: tensor[rows] for name, tensor in layer.fitted.items()}


def _unfitted(layer: LayerState, method: ClusteringMethod) -> FittedTensors:
    assert layer.store is not None
    return method.unfitted(layer.store.key_dim, layer.store.value_dim, layer.store.device)


def _fitted(layer: LayerState, method: ClusteringMethod) -> FittedTensors:
    """The tensors of a layer, name -> [B, H, ...]."""
    if layer.fitted is not None:
        return layer.fitted
    assert layer.store is not None
    sizes = layer.store.sequences.batch_size, layer.store.num_heads
    return {name: tensor.expand(*sizes, *tensor.shape) for name, tensor in _unfitted(layer, method).items()}
