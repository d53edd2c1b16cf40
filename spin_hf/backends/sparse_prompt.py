"""Block-sparse attention of long prompts (`prefill="sparse"`): blocks of 128 queries choose blocks of 128 keys.

    key blocks      | 0 |   |   |   |   |   |   |   |
    query block 7   | x |   | x |   |   | x |   | x |      the first, its own, and the heaviest up to `prefill_top_p`
    last 512 tokens | x | x | x | x | x | x | x | x |      everything

    pages on the GPU         read where they are, in one launch (`kernels/prompt/attend_resident_blocks.py`)
    pages in host memory     piece by piece, as are pages that blocks do not divide into (`dense.attend_in_pieces`)

Blocks are weighed by mean queries and keys of 16 tokens (`kernels/reference_blocks.py`). Mean keys of earlier chunks are kept
until the prompt has been read: 1/32 of the pages' memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..kernels import BLOCK_TOKENS, device_limits
from ..state import CacheState, LayerState
from ..storage.page_store import PageStore
from ..storage.page_stream import TokenStream, resident_pages
from .base import Call
from .dense import Partial, attend_in_pieces

DENSE_TOKENS = 512
"""Last tokens of a prompt that attend to everything."""


def serves(state: CacheState, call: Call, key: Tensor) -> bool:
    """Whether the queries of `call` may skip blocks. Padding, given masks and softcaps are read densely.

    Args:
        key: [B, H, n, D], the new tokens.
    """
    sequences, num_new = state.sequences, key.shape[2]
    if state.options.prefill != "sparse" or call.softcap is not None or call.weights is not None:
        return False
    if call.query.shape[3] != num_new or sequences.start % BLOCK_TOKENS or sequences.mask.valid is not None:
        return False
    return sequences.start // BLOCK_TOKENS < _dense_from(state) and device_limits.multiplies(key.device)


def attend(state: CacheState, layer: LayerState, call: Call, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Attention of the new tokens to the blocks that they choose among all tokens held.

    Args:
        key, value: [B, H, n, Dk] and [B, H, n, Dv], the new tokens.
        out: [B, n, heads, Dv]; written.
    """
    store, start, stop = layer.store, state.sequences.start, state.sequences.length
    assert store is not None
    first, dense_from, means = start // BLOCK_TOKENS, _dense_from(state), _key_means(state, layer, store, key)
    chosen = kernels.choose_blocks(
        kernels.block_means(call.query.flatten(1, 2)), means[:, :, : kernels.num_means(stop)], call.scale,
        state.options.prefill_top_p, first, dense_from,
    )  # fmt: skip
    pages = resident_pages(store, 0, store.sequences.num_pages)
    if pages is not None and pages.holds_blocks_of(BLOCK_TOKENS):
        num_dense = max(0, -(-stop // BLOCK_TOKENS) - max(first, dense_from))
        with torch.inference_mode(out.is_inference()):  # as in `put`
            kernels.attend_resident_blocks(call.query, pages, chosen, num_dense, call.scale, call.sinks, out)
        return

    def attend_piece(token: int, keys: Tensor, values: Tensor, causal: bool) -> Partial:
        return kernels.attend_blocks(call.query, keys, values, chosen, call.scale, token // BLOCK_TOKENS, causal)

    attend_in_pieces(call, key, value, store, out, attend_piece)


def _dense_from(state: CacheState) -> int:
    """The block from which on queries attend to everything."""
    tokens = max(state.sequences.expected_tokens, state.sequences.length)
    return max(0, tokens - DENSE_TOKENS) // BLOCK_TOKENS


def _key_means(state: CacheState, layer: LayerState, store: PageStore, key: Tensor) -> Tensor:
    """Mean keys of all tokens held, [B, H, pages or more, Dk]. Kept in `layer.key_means` while chunks of the prompt follow."""
    start, stop, expected = state.sequences.start, state.sequences.length, state.sequences.expected_tokens
    before = kernels.num_means(start)
    means = None if layer.key_means is None or layer.key_means[1] != start else layer.key_means[0]
    if means is None:
        means = key.new_empty((*key.shape[:2], kernels.num_means(max(stop, expected)), key.shape[3]))
        with TokenStream(store, start) as earlier:
            for token, keys, _ in earlier:
                found = kernels.block_means(keys)
                means[:, :, kernels.num_means(token) : kernels.num_means(token) + found.shape[2]] = found
    means[:, :, before : kernels.num_means(stop)] = kernels.block_means(key)
    layer.key_means = (means, stop) if stop < expected else None
    return means
