"""Compiles the kernels of decode steps while the prompt is read, on a background thread.

    prompt, first layer   compile_behind_prompt    arguments of the first steps' launches, as they will be  ->  a thread
    first step            wait_for_all             until those are compiled that select pages; `StepKernels.attend`: its own

Triton specialises a kernel on dtypes, on constants, and on whether numbers and addresses are multiples of 16. So small tensors
of the same kind stand for the step's query, keys and output.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from ..kernels.descriptor_fields import MAX_QUERIES
from ..kernels.launch import Launch
from ..state import LayerState
from .base import Call
from .triton_step import StepKernels


def compile_behind_prompt(step: StepKernels, layer: LayerState, call: Call) -> None:
    """Start to compile what steps behind a prompt launch, unless that has been started.

    Args:
        call: of the prompt or of a chunk of it.
    """
    if call.query.shape[3] <= MAX_QUERIES or not _is_compiled_early(step):
        return
    variant = step.shape(layer), step.is_dense_layer(layer)
    if variant in step.early:
        return
    sequences = step.state.sequences
    step.early[variant] = found = {}
    reads_all = step.may_read_all(max(sequences.length, sequences.expected_tokens) + 1)
    with suppress(torch.OutOfMemoryError):  # the prompt does not need these tensors: the first step compiles then
        for kind in (True, False) if reads_all else (False,):  # what is needed first
            found[kind] = step.launchers.compile_behind(
                partial(launches_of_steps, step, layer, call, kind), step.device
            )
        step.compiling.append(found[False])


def wait_for_all(step: StepKernels) -> None:
    """Wait until all launches of steps that select pages are compiled."""
    while step.compiling:
        step.launchers.wait_for_compiles(step.compiling.pop())


def launches_of_steps(step: StepKernels, layer: LayerState, call: Call, reads_all: bool, launch: Launch) -> None:
    """Launch, with tensors that stand for a step's, what a layer launches in a step of one token, eager and captured."""
    store, (batch, heads, group) = layer.store, call.query.shape[:3]
    assert store is not None
    shape, device = step.shape(layer), step.device

    def new(*sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device)

    query = new(batch, heads * group, 1, store.key_dim, dtype=call.query.dtype)
    out = new(batch, 1, heads * group, store.value_dim, dtype=call.query.dtype)
    token = tuple(new(batch, heads, 1, dim, dtype=call.query.dtype) for dim in (store.key_dim, store.value_dim))
    for given in (None, (token[0], token[1])):
        step.launch_attention(launch, layer, query, call, out, given, shape, reads_all)
    step.launchers.append_tokens(
        launch, step.buffers, step.layer_buffers[layer.number], *token, num_pages=1,
        summarizes=step.recipe.summarised_by_append, shape=shape,
    )  # fmt: skip
    if step.recipe.scans_codes and not reads_all:
        content = new(1, heads, step.state.method.unit_pages, *store.backing.row_shape, dtype=store.backing.dtype)
        keys, values = store.backing_layout.take(content)
        valid = torch.ones((1, 1, *keys.shape[2:4]), dtype=torch.bool, device=device)
        bases = []
        for dim in (store.key_dim, store.value_dim):
            vectors = new(1, heads, dim, dtype=torch.float32)
            bases.append((vectors, new(1, heads, dim, dim, dtype=keys.dtype), vectors))
        step.launchers.encode_units(keys, values, valid, bases[0], bases[1], launch=launch)
        step.launchers.encode_last_unit(
            launch, step.step, step.layer_addresses, batch_size=batch, first=0, num_pages=1, shape=shape
        )  # fmt: skip


def _is_compiled_early(step: StepKernels) -> bool:
    """On GPUs, unless queries are projected by kernels of the method's own, which would have to run."""
    tuning = step.state.options.tuning
    return step.device.type == "cuda" and tuning.compiles_early and not step.recipe.projects_queries
