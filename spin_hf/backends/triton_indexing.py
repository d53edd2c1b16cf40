"""Summarises the page that a captured step completed, with its unit, for several layers in one call and without waiting.

    copy_page      the pages of each layer, from its backing store  ->  [layers * B, H, n, P, D]
    index_pages    the method; for coded pages instead of all this `encode_last_unit`, one launch
    copy_page      summaries  ->  each layer's summary arrays; a method with units summarises all pages of the last unit again

Launched after the step. Only kernels of later steps read these summaries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention.methods.base import Pages
from ..indexing.fit import fitted_of
from ..indexing.summarize import tokens_of
from ..kernels.descriptor_fields import LayerField, summary_field
from .row_kernels import RowKernels

if TYPE_CHECKING:
    from ..state import LayerState
    from .triton_step import StepKernels


def index_completed(step: StepKernels, layers: list[LayerState]) -> None:
    """Summarise the cache's last page, which is full, in the `layers` that `step` serves."""
    if not step.recipe.summarised_by_append:
        _index_all(step, layers)


def index_completed_rows(step: RowKernels) -> None:
    """As `index_completed`, for the rows whose last page is full, if one of them selects pages.

    The kernels find them by their positions. What they write for rows that attend to everything is stale at once.
    """
    states, page_size = [row.state for row in step.rows if row is not None], step.method.page_size
    completed = any(state.sequences.length % page_size == 0 and not state.reads_all for state in states)
    if completed and not step.recipe.summarised_by_append:
        _index_all(step, states[0].layers)


def _index_all(step: StepKernels, layers: list[LayerState]) -> None:
    alike: dict[object, list[LayerState]] = {}
    for layer in filter(step.serves, layers):
        store = layer.store
        assert store is not None
        alike.setdefault(store.backing_layout, []).append(layer)
    for group in alike.values():
        _index(step, group)


def _index(step: StepKernels, layers: list[LayerState]) -> None:
    store, sequences, count = layers[0].store, step.state.sequences, len(layers)
    assert store is not None
    stop, method = sequences.length // store.page_size, step.method
    page = (stop - 1) // method.unit_pages * method.unit_pages  # with rows, kernels take that of each row instead
    if step.apart:
        assert method.unit_pages == 1 or step.recipe.scans_codes
        page, stop = 0, 1
    addresses = torch.stack([step.layer_addresses[layer.number] for layer in layers])
    if step.recipe.scans_codes:
        done = step.launchers.encode_last_unit(
            step.launchers.launch_now, step.step, addresses, batch_size=step.batch_size, first=page, num_pages=stop - page,
            shape=step.shape(layers[0]),
        )  # fmt: skip
        if done:
            return

    def copy(field: LayerField, packed: Tensor, put: bool, pages_per_row: int = 1) -> None:
        """Copy the pages' rows of each layer's array from or to `packed` [layers * B, H, n, ...]."""
        step.launchers.copy_page(
            step.step, addresses, packed, page=page, field=field, put=put, shape=step.shape(layers[0]),
            pages_per_row=pages_per_row,
        )  # fmt: skip

    shape = (count * step.batch_size, step.num_heads, stop - page, *store.backing.row_shape)
    pages = torch.empty(shape, dtype=store.backing.dtype, device=step.device)
    copy(LayerField.BACKING, pages, put=False)
    keys, values = store.backing_layout.take(pages)
    if isinstance(step, RowKernels):
        valid, positions = step.tokens_of_last_pages()
    else:
        valid, positions = tokens_of(sequences, page, stop, step.device)
    single = None
    if store.permutation is not None:  # one page per cluster until tokens are clustered
        single = torch.ones(shape[:3], dtype=torch.int64, device=step.device)
    given = Pages(
        keys, valid.repeat(count, 1, 1, 1), tuple(layer.number for layer in layers), values,
        None if positions is None else positions.repeat(count, 1, 1, 1), single, fitted_of(layers, method),
    )  # fmt: skip
    made = method.index_pages(given)
    for index, (name, summary) in enumerate(store.summaries.items()):
        for array, content in enumerate(summary.stored(made[name])):
            copy(summary_field(index, array), content.contiguous(), True, summary.pages_per_row)
