"""Compiles what later chunks of a prompt launch, and what is launched behind it, while it is read: on background threads.

    prompt, first layer   compile_behind_prompt    arguments of the launches, as they will be  ->  background threads
    later chunks          launch_now               waits for a kernel that is being compiled
    first step            StepKernels.attend       waits for its own kernels
    first that selects    wait_for_index           waits for those that cluster and summarise (`early_index.py`)

Triton specialises a kernel on dtypes, on constants, and on whether numbers and addresses are multiples of 16. So small tensors
of the same kind stand for the step's query, keys and output, and for pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..kernels.descriptor_fields import MAX_QUERIES
from ..kernels.launch import Launch
from ..state import LayerState
from ..storage.page_stream import resident_pages
from .base import Call
from .early_index import (
    launches_of_clusters,
    launches_of_completed,
    launches_of_generated,
    launches_of_index,
    tokens_to_cluster,
)
from .row_kernels import RowKernels
from .triton_step import StepKernels

_SHORT_PROMPT = 32768
"""Tokens of all sequences that a GPU reads sooner than processes start that compile."""


@torch.no_grad()
def compile_behind_prompt(step: StepKernels, layer: LayerState, call: Call, row_sizes: Sequence[int] = ()) -> None:
    """Start to compile what steps behind a prompt launch, unless that has been started.

    Args:
        call: of the prompt or of a chunk of it.
        row_sizes: places of the batches of rows, if the cache will be a row of one; else its own steps are compiled.
    """
    if call.query.shape[3] <= MAX_QUERIES or not _is_compiled_early(step):
        return
    shape, dense = step.shape(layer), step.is_dense_layer(layer)
    if row_sizes:
        shape = replace(shape, apart=True)
    if (shape, dense) in step.early:
        return
    is_first = all(known != shape for known, _ in step.early)
    sequences, behind = step.state.sequences, step.launchers.compile_behind
    step.early[shape, dense] = found = {}
    length = max(sequences.length, sequences.expected_tokens)
    is_short = length * sequences.batch_size <= _SHORT_PROMPT
    reads_all, run = step.may_read_all(length + 1), tokens_to_cluster(step, length)
    steps = partial(launches_of_steps, step, layer, call)
    if row_sizes:
        steps = partial(launches_of_rows, step, layer, call, row_sizes)
    needed = {
        "pieces": partial(launches_of_pieces, step, layer, call),
        "reads all": partial(steps, True),
        "clusters": partial(launches_of_clusters, step, layer, run, layer.observation_queries),
        "index": partial(launches_of_index, step, layer),
        "selects": partial(steps, False),
        "completed": partial(launches_of_completed, step, layer),
        "generated": partial(launches_of_generated, step, layer),
    }  # in the order in which steps need them
    if not reads_all and not row_sizes:  # whether rows read all depends on the other rows
        del needed["reads all"]
    if not is_first or sequences.expected_tokens <= sequences.length:
        del needed["pieces"]
    if not is_first:
        del needed["clusters"], needed["index"], needed["completed"], needed["generated"]
    with suppress(torch.OutOfMemoryError):  # the prompt does not need these tensors: the first step compiles then
        for name, launches in needed.items():
            compiles = behind(launches, step.device, is_short or name == "pieces")
            if name in ("reads all", "selects"):
                found[name == "reads all"] = compiles
            elif name in ("clusters", "index"):
                step.compiling.append(compiles)


def wait_for_index(step: StepKernels) -> None:
    """Wait until the kernels are compiled that cluster and summarise a prompt."""
    while step.compiling:
        step.launchers.wait_for_compiles(step.compiling.pop(0))


def launches_of_pieces(step: StepKernels, layer: LayerState, call: Call, launch: Launch) -> None:
    """Launch what later chunks do about earlier tokens: gather them, and merge attention to pieces of them."""
    store, (batch, heads, group) = layer.store, call.query.shape[:3]
    assert store is not None
    pages = resident_pages(store, 0, 1)
    if pages is not None:
        step.launchers.gather_tokens(pages, 1)
    partial_out = call.query.new_empty((batch, heads, group, MAX_QUERIES, store.value_dim))
    lse = torch.empty(partial_out.shape[:4], dtype=torch.float32, device=step.device)
    out = call.query.new_empty((batch, MAX_QUERIES, heads * group, store.value_dim))
    step.launchers.merge_into([(partial_out, lse)] * 2, call.sinks, out)


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
    if not step.apart:  # tokens of rows are appended by attention
        step.launchers.append_tokens(
            launch, step.buffers, step.layer_buffers[layer.number], *token, num_pages=1,
            summarizes=step.recipe.summarised_by_append, shape=shape,
        )  # fmt: skip
    if step.recipe.scans_codes and not reads_all:
        step.launchers.encode_last_unit(
            launch, step.step, step.layer_addresses, batch_size=batch, first=0, num_pages=1, shape=shape
        )  # fmt: skip


def launches_of_rows(
    step: StepKernels, layer: LayerState, call: Call, sizes: Sequence[int], reads_all: bool, launch: Launch
) -> None:
    """As `launches_of_steps`, of batches with so many rows, of which the cache of `step` may be one."""
    for number in sizes:
        rows = RowKernels(step.state, step.launchers, step.device, number, step.num_heads)
        rows.plan(layer, call)
        rows.binding.known = {"planned": False}
        query = call.query[:1].expand(number, *call.query.shape[1:])
        launches_of_steps(rows, layer, replace(call, query=query), reads_all, launch)


def _is_compiled_early(step: StepKernels) -> bool:
    """On GPUs, unless queries are projected by kernels of the method's own, which would have to run."""
    tuning = step.state.options.tuning
    return step.device.type == "cuda" and tuning.compiles_early and not step.recipe.projects_queries
