"""Launches of what precedes the first step that selects pages: tokens are clustered, moved and summarised.

    form_clusters    points of the method               for the longest run of the prompt, and for runs of generated tokens
    index            pages -> moved -> summaries        copied from and to the arrays of a layer
    completed        a page that a captured step has completed (`triton_indexing.py`)

They are made on zeros, with few pages, by the functions that do it in earnest. `compile_behind` compiles their kernels, whose
outputs are never written, so nothing here indexes a tensor by them. Clustering takes as many tokens as in earnest, since its
kernels depend on that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention.methods.base import Pages
from ..attention.methods.clustering import ClusteringMethod
from ..indexing.fit import fitted_of
from ..kernels.launch import Launch, RowCopy
from ..storage.chunked_array import ChunkedArray
from .triton_indexing import index_completed
from .triton_step import StepKernels

if TYPE_CHECKING:
    from ..state import LayerState

_UNITS = 4
"""Units of pages that are summarised."""


def tokens_to_cluster(step: StepKernels, num_tokens: int) -> int:
    """Tokens of the longest run that is clustered behind a prompt of so many tokens; 0 if none is."""
    state = step.state
    method, options = state.method, state.options
    if not isinstance(method, ClusteringMethod):
        return 0
    unit = method.page_size * method.unit_pages
    left = num_tokens - options.recent_window - options.tuning.slack_tokens
    if left < method.cluster_interval:
        return 0
    units = (left - options.num_sink_tokens) // unit
    return units // -(-units // max(1, method.span_tokens // unit)) * unit


def launches_of_clusters(
    step: StepKernels, layer: LayerState, num_tokens: int, queries: Tensor | None, launch: Launch
) -> None:
    """Cluster runs of `num_tokens` tokens.

    Args:
        queries: observation queries [B, H, G, n, D]; None for generated tokens.
    """
    method, store = step.state.method, layer.store
    assert store is not None
    if num_tokens and isinstance(method, ClusteringMethod):
        keys = torch.zeros((1, step.num_heads, num_tokens, store.key_dim), dtype=store.dtype, device=step.device)
        method.form_clusters(keys, None if queries is None else queries[:1])


def launches_of_index(step: StepKernels, layer: LayerState, launch: Launch) -> None:
    """Move and summarise pages of a layer, and copy them and their summaries."""
    store, method, launchers = layer.store, step.state.method, step.launchers
    assert store is not None
    sizes = (step.batch_size, step.num_heads, _UNITS * method.unit_pages)
    rows = torch.zeros(sizes, dtype=torch.int64, device=step.device)
    table = rows.new_zeros((1,))

    def new(array: ChunkedArray) -> Tensor:
        return torch.zeros((*sizes, *array.row_shape), dtype=array.dtype, device=step.device)

    def of(array: ChunkedArray, content: Tensor, rows: Tensor = rows) -> RowCopy:
        return RowCopy([table], array.rows_per_chunk, rows, content.to(array.dtype).contiguous()[None])

    def copy(copies: list[RowCopy], put: bool) -> None:
        (launch_copies,) = launchers.rows_copiers([copies], put)
        launch_copies()

    content = new(store.backing)
    copy([of(store.backing, content)], put=False)
    clusters = None
    if store.permutation is not None:
        places = sizes[2] * store.page_size
        order = torch.arange(places, device=step.device).expand(*sizes[:2], places)
        launchers.move_tokens(content, order, store.page_size, store.backing_layout.token_fields)
        clusters = torch.ones(sizes, dtype=torch.int64, device=step.device)
        notes = [of(array, new(array)) for array in store.permutation.arrays]
        for copies, put in (([of(store.backing, content), *notes], True), (notes[:1], False), (notes[1:], False)):
            copy(copies, put)
        copy(notes, put=True)
    keys, values = store.backing_layout.take(content)
    valid = torch.ones((sizes[0], 1, sizes[2], store.page_size), dtype=torch.bool, device=step.device)
    positions = torch.zeros_like(valid, dtype=torch.int64) if step.state.sequences.mask.keeps_positions else None
    pages = Pages(keys, valid, (layer.number,), values, positions, clusters, fitted_of([layer], method))
    puts = []
    for name, vectors in method.index_pages(pages).items():
        summary = store.summaries[name]
        held = summary.rows_of(rows).contiguous()
        puts += [of(*kept, held) for kept in zip(summary.arrays, summary.stored(vectors), strict=True)]
    copy(puts, put=True)


def launches_of_generated(step: StepKernels, layer: LayerState, launch: Launch) -> None:
    """Cluster generated tokens. They are moved and summarised as those of the prompt."""
    method = step.state.method
    if isinstance(method, ClusteringMethod):
        launches_of_clusters(step, layer, method.cluster_interval, None, launch)


def launches_of_completed(step: StepKernels, layer: LayerState, launch: Launch) -> None:
    """Summarise the last page of a layer."""
    if step.state.sequences.length >= step.state.sequences.page_size:
        index_completed(step, [layer])
