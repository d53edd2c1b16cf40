"""A step of `RowKernels` without a model: caches of `CacheDriver`, random queries, keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import spin_hf.kernels
from spin_hf.attention.methods.base import recipe_of
from spin_hf.backends.base import Call
from spin_hf.backends.row_descriptors import RowDescriptors
from spin_hf.backends.row_kernels import RowKernels
from spin_hf.backends.triton_indexing import index_completed_rows
from tests.support.cache_driver import CacheDriver
from tests.support.inspection import forward_of, state_of


def kernels_for(drivers: list[CacheDriver], num_rows: int) -> RowKernels:
    """Kernels of `num_rows` rows, in which the drivers' caches are seated from the second place on."""
    states = [state_of(driver.cache) for driver in drivers]
    store, recipe = states[0].layers[0].store, recipe_of(states[0].method)
    assert store is not None
    assert recipe is not None
    launchers: Any = spin_hf.kernels.launchers(store.device)
    made = RowKernels(states[0], launchers, store.device, num_rows, store.num_heads)
    rows: list[RowDescriptors | None] = [None] * num_rows
    rows[1 : 1 + len(states)] = [RowDescriptors(state, store.device, store.num_heads, recipe) for state in states]
    made.seat(rows)
    return made


def step_of(
    drivers: list[CacheDriver], kernels: RowKernels, query: Tensor, key: Tensor, value: Tensor, reads_all: bool = False
) -> list[Tensor]:
    """One step of all rows; returns [R, 1, heads, Dv] of each layer.

    Args:
        query: [layers, R, heads, 1, Dk]; key, value: [layers, R, H, 1, D].
    """
    passes = [forward_of(driver.cache) for driver in drivers]
    for each in passes:
        each.prepare_row(reads_all)
    kernels.reads_all = reads_all
    kernels.begin_rows()
    first, outputs = drivers[0], []
    for layer in first.cache.paged_layers:
        number = layer.state.number
        of_layer = query[number], key[number], value[number]
        call = Call(of_layer[0].unflatten(1, (first.shape.kv_heads, -1)), first.scale, first.arguments["softcap"],
                    first.arguments["s_aux"])  # fmt: skip
        out = torch.zeros((len(query[number]), 1, first.shape.heads, first.shape.value_dim), dtype=query.dtype)
        kernels.attend(layer.state, call, out, of_layer[1:])
        outputs.append(out)
    index_completed_rows(kernels)
    for each in passes:
        each.finish_row()
    return outputs
