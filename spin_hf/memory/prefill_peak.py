"""Temporary memory of a prompt, in addition to its pages, and the chunk size that fits the free memory.

    per token    hidden states, the MLP's intermediate states, outputs of attention before and after they are merged
    pieces       buffers for earlier keys and values (`storage/page_stream.py`), smaller where little memory is free
    mean keys    of a sparse prompt, one for 16 tokens (`backends/sparse_prompt.py`): 1/32 of the pages
    indexing     behind the prompt, when the others are free again: several times the pages of a call

The first is an estimate from the config: the model's own code may allocate more or less. `benchmarks/speed/prefill.py` measures
the peak.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..attention.methods.base import Method
from ..attention.methods.clustering import ClusteringMethod
from ..attention.methods.layer_shapes import LayerShape, layer_shapes
from ..config import INDEX_COPIES, Tuning
from ..kernels import num_means
from ..storage.page_stream import PIECE_BUFFERS
from ..storage.tier_budget import TierBudget
from .gpu_memory import GpuMemory
from .watermarks import Watermarks, free_gpu_memory

_LEAST_CHUNK_TOKENS = 256
_HIDDEN_STATES, _INTERMEDIATE_STATES = 8, 3
"""Tensors of a decoder layer that exist at once: residual, norm, queries, attention outputs; gate, up, and their product."""
_SUMMARY_COPIES = 2
"""As `INDEX_COPIES`, for methods that do not cluster: the pages, and what is computed from them."""


def bytes_per_token(config: Any, item_bytes: int) -> int:
    """Temporary bytes of a forward per token of one sequence; 0 if the config does not say."""
    hidden = getattr(config, "hidden_size", None) or 0
    layers = layer_shapes(config, list(range(getattr(config, "num_hidden_layers", None) or 0))) or []
    states = max((shape.num_heads * (shape.group or 1) * shape.key_dim for shape in layers), default=0)
    dense = getattr(config, "intermediate_size", None) or 4 * hidden
    experts = getattr(config, "num_experts_per_tok", None) or 0
    routed = experts * (getattr(config, "moe_intermediate_size", None) or 0)
    if isinstance(dense, (list, tuple)):
        dense = max(dense)
    return item_bytes * (_HIDDEN_STATES * max(hidden, states) + _INTERMEDIATE_STATES * max(dense, routed))


def key_means_bytes(shapes: Sequence[LayerShape], item_bytes: int, batch_size: int, context_length: int) -> int:
    """Bytes of the mean keys of a sparse prompt.

    Args:
        shapes: of the paged layers. All have mean keys at once while a prompt is read in chunks, else one at a time.
        context_length: tokens of each sequence.
    """
    numbers = sum(shape.num_heads * shape.key_dim for shape in shapes)
    return numbers * item_bytes * batch_size * num_means(context_length)


def piece_bytes(tuning: Tuning, pool: int | None) -> int:
    """Bytes of a piece, so that pieces take at most half of what is left free for prompts.

    Args:
        pool: bytes of the compute tier that the cache holds or that are free; None if not known.
    """
    if pool is None:
        return tuning.piece_bytes
    return min(tuning.piece_bytes, Watermarks(tuning.margin_bytes).margin(pool) // PIECE_BUFFERS)


def pool_of(gpu: GpuMemory, device: torch.device) -> int | None:
    """Bytes of `device` that a cache holds or that are free; None if not known."""
    free = free_gpu_memory(device)
    return None if free is None else gpu.held(device) + free


def prefill_bytes(
    config: Any, item_bytes: int, num_tokens: int, chunk_tokens: int, piece_bytes: int, key_means: int = 0
) -> int:
    """Temporary bytes of reading a prompt.

    Args:
        num_tokens: of all sequences.
        chunk_tokens: most tokens of all sequences in a forward.
        piece_bytes: of a piece of earlier keys and values.
        key_means: bytes of mean keys.
    """
    pieces = PIECE_BUFFERS * piece_bytes if num_tokens > chunk_tokens else 0
    return bytes_per_token(config, item_bytes) * min(num_tokens, chunk_tokens) + pieces + key_means


def indexing_bytes(
    method: Method,
    budgets: Sequence[TierBudget],
    tuning: Tuning,
    batch_size: int,
    context_length: int,
    free: int | None,
) -> int:
    """Temporary bytes of clustering and summarizing the pages of a prompt.

    Args:
        budgets: of the paged layers.
        context_length: tokens of each sequence.
        free: free bytes of the compute tier behind the prompt; None if not known.
    """
    token_bytes = [batch_size * budget.num_heads * budget.page_bytes // method.page_size for budget in budgets]
    copies, least = _SUMMARY_COPIES, method.page_size * method.unit_pages
    if isinstance(method, ClusteringMethod):
        copies, least = INDEX_COPIES, method.span_tokens if free is not None else tuning.cluster_tokens
    most = max(tuning.index_room(free), least * max(token_bytes, default=0))
    return copies * min(most, sum(token_bytes) * context_length)


def chunk_tokens(
    config: Any, item_bytes: int, gpu: GpuMemory, devices: Iterable[torch.device], key_means: int = 0
) -> int:  # fmt: skip
    """Tokens of all sequences in a chunk whose forward fits the memory that caches leave free for prompts, on each device.

    Args:
        devices: of the inputs and of the layers.
        key_means: bytes of mean keys that the prompt takes.
    """
    return min(
        fitting_tokens(config, item_bytes, gpu.tuning, gpu.held(device), free_gpu_memory(device), key_means)
        for device in set(devices)
    )


def fitting_tokens(
    config: Any, item_bytes: int, tuning: Tuning, held: int, free: int | None, key_means: int = 0
) -> int:
    """As `chunk_tokens`, for a cache that holds `held` bytes while `free` bytes are free; None if that is not known."""
    if free is None:
        return tuning.prefill_tokens
    room = min(free, 2 * Watermarks(tuning.margin_bytes).margin(held + free))
    room -= PIECE_BUFFERS * piece_bytes(tuning, held + free) + key_means
    fitting = max(1, room // max(1, bytes_per_token(config, item_bytes)))
    return max(_LEAST_CHUNK_TOKENS, min(tuning.prefill_tokens, 1 << (int(fitting).bit_length() - 1)))
