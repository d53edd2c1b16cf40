"""Summaries of the page that a captured step completed, by the method's formulas, of several layers at once, without waiting.

    take_pages       page of every layer, from wherever its home is    ->  [layers * B, H, 1, P, D]
    index_pages      the method
    put_summaries    to the rows of every layer

Launched behind the step. Only kernels of later steps read these summaries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import kernels
from .attention.partition import Pages
from .kernels.fields import LayerField
from .storage.pages import PageStore
from .storage.sequences import SEGMENT_PAGES

if TYPE_CHECKING:
    from .decode import StepKernels
    from .layer import SpinLayer

_BLOCK_BYTES = 4096


def index_completed(step: StepKernels, layers: list[SpinLayer]) -> None:
    """Summarise the last page that the cache holds, which is complete, in those of `layers` that `step` serves."""
    if step.recipe.summarised_by_append:
        return
    alike: dict[object, list[SpinLayer]] = {}
    for layer in layers:
        store = layer.store
        if store is not None and (store.device, store.num_heads) == (step.device, step.num_heads):
            apart = None if step.shared.method.layers_alike else layer.number
            alike.setdefault((store.key_dim, store.value_dim, store.home.dtype, apart), []).append(layer)
    for group in alike.values():
        _index(step, group)


def _index(step: StepKernels, layers: list[SpinLayer]) -> None:
    store, sequences = layers[0].store, step.shared.sequences
    assert store is not None
    page = sequences.length // store.page_size - 1
    addresses = step.layer_addresses[layers[0].number : layers[0].number + len(layers)]
    if [layer.number for layer in layers] != list(range(layers[0].number, layers[0].number + len(layers))):
        addresses = torch.stack([step.layer_addresses[layer.number] for layer in layers])
    content = torch.empty((len(layers), step.streams, store.home.row_bytes), dtype=torch.uint8, device=step.device)
    step.launch.take_pages[(step.streams, len(layers))](
        step.step, addresses, page, content, **_sizes(store, store.home.row_bytes)
    )
    pages = content.view(store.home.dtype).view(len(layers) * step.batch_size, step.num_heads, 1, -1)
    keys, values = kernels.split_pages(pages, store.page_size, store.key_dim)
    first, stop = page * store.page_size, (page + 1) * store.page_size
    shape = (step.batch_size, 1, 1, store.page_size)
    valid = sequences.mask.valid
    if valid is None:
        inside = torch.ones(shape, dtype=torch.bool, device=step.device)
    else:
        inside = valid[:, first:stop].to(step.device, non_blocking=True).view(shape)
    positions = None
    if sequences.mask.keeps_positions:
        positions = sequences.positions(first, stop, step.device).view(shape).repeat(len(layers), 1, 1, 1)
    single = None
    if store.regrouped is not None:  # a page by itself, until it is regrouped
        single = torch.ones(pages.shape[:3], dtype=torch.int64, device=step.device)
    given = Pages(keys, inside.repeat(len(layers), 1, 1, 1), layers[0].number, values, positions, single)
    for name, vectors in step.shared.method.index_pages(given).items():
        for field, kept in _kept(store, name, vectors):
            step.launch.put_summaries[(step.streams, len(layers))](
                step.step,
                addresses,
                page,
                kept.contiguous().view(torch.uint8),
                int(field),
                **_sizes(store, kept[0, 0].nbytes),
            )


def _kept(store: PageStore, name: str, vectors: Tensor) -> list[tuple[int, Tensor]]:
    """Field of the layer descriptor, and what is kept there of `vectors` [n, H, 1, *shape], for each array of a summary."""
    summary = store.summaries[name]
    field = LayerField.SUMMARY_0 + 2 * list(store.summaries).index(name)
    if summary.scale is None:
        return [(field, vectors.to(summary.values.dtype))]
    values, scale = kernels.quantize(vectors)
    return [(field, values), (field + 1, scale.unsqueeze(-1))]


def _sizes(store: PageStore, row_bytes: int) -> dict[str, int]:
    return {
        "ROW_BYTES": row_bytes, "BLOCK": min(_BLOCK_BYTES, 1 << (row_bytes - 1).bit_length()), "H": store.num_heads,
        "SEGMENT": SEGMENT_PAGES, "ROWS": store.home.rows_per_chunk,
    }  # fmt: skip
