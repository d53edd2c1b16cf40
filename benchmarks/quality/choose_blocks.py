"""Which blocks of keys a block of queries reads in a sparse prefill, in PyTorch: the reference for kernels.

    sample    the last of every `stride` queries                                   128 / stride queries of a block
    weigh     their exact softmax over all earlier keys, summed over each block    mass of a block, mean over the sample
    choose    masses of at least `threshold`, the first visible block, the block's own keys

A query block so reads at most 1 / threshold + 2 blocks of a chunk that begins at a multiple of 128, whatever the context.

Cost: 1 / stride of the products and exponentials of QK^T, and all keys once for every tile of sampled queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_TOKENS = 128


@torch.no_grad()
def choose_blocks(
    query: Tensor,
    keys: Tensor,
    *,
    threshold: float,
    scale: float,
    stride: int = 16,
    dense_from: int | None = None,
    visible: Tensor | None = None,
    per_kv_head: bool = False,
) -> Tensor:
    """Blocks of keys that the queries of a chunk read.

    Args:
        query: [B, heads, S, D], the queries at positions T - S..T. A block of queries is 128 of them, from the first one.
        keys: [B, H, T, D], the keys at positions 0..T, those of the chunk included. A block of keys begins at a multiple
            of 128. `heads` is a multiple of H.
        threshold: least share of the sampled queries' attention for which a block is read.
        scale: of the logits.
        stride: distance of sampled queries, a divisor of 128.
        dense_from: position from which queries read everything; None for nowhere.
        visible: bool [B, T], False for padding; None if all keys are visible.
        per_kv_head: whether the query heads of a KV head read the same blocks, by their mean mass.
    Returns:
        bool [B, heads or H, ceil(S / 128), ceil(T / 128)]. The kernel still masks single keys: by position, and padding.
    Raises:
        ValueError: more queries than keys, or a stride that does not divide 128.
    """
    batch, _, queries, _ = query.shape
    kv_heads, total = keys.shape[1:3]
    if queries > total or BLOCK_TOKENS % stride:
        raise ValueError(
            f"expected at most {total} queries (one for every key) and a stride that divides {BLOCK_TOKENS}, "
            f"got {queries} queries and a stride of {stride}; pass the keys of the chunk too"
        )
    device, start = query.device, total - queries
    rows, columns = -(-queries // BLOCK_TOKENS), -(-total // BLOCK_TOKENS)
    if visible is None:
        visible = torch.ones(batch, total, dtype=torch.bool, device=device)

    sample = torch.arange(stride - 1, rows * BLOCK_TOKENS, stride, device=device).clamp(max=queries - 1)
    allowed = (torch.arange(total, device=device) <= start + sample[:, None]) & visible[:, None]  # [B, samples, T]
    masses = torch.stack(
        [
            _masses(states, keys[:, head], allowed, scale, rows)
            for head, states in enumerate(query[:, :, sample].unflatten(1, (kv_heads, -1)).unbind(1))
        ],
        1,
    )  # [B, H, G, rows, columns]
    chosen = (masses.mean(2) if per_kv_head else masses.flatten(1, 2)) >= threshold

    first_query = start + BLOCK_TOKENS * torch.arange(rows, device=device)
    last_query = (first_query + BLOCK_TOKENS - 1).clamp(max=total - 1)
    block = torch.arange(columns, device=device)
    causal = block <= last_query[:, None] // BLOCK_TOKENS
    chosen |= causal & (block >= first_query[:, None] // BLOCK_TOKENS)
    sink = visible.int().argmax(-1) // BLOCK_TOKENS
    chosen |= (block == sink[:, None])[:, None, None] & causal
    if dense_from is not None:
        chosen |= causal & (last_query >= dense_from)[:, None]
    return chosen


def _masses(query: Tensor, keys: Tensor, allowed: Tensor, scale: float, rows: int) -> Tensor:
    """Masses [B, G, rows, columns] of sampled queries [B, G, samples, D] over the keys [B, T, D] of one KV head, float32."""
    logits = (query.float() @ keys.float()[:, None].mT * scale).masked_fill(~allowed[:, None], float("-inf"))
    weights = logits.softmax(-1).nan_to_num(0.0)  # a query of padding sees nothing
    weights = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % BLOCK_TOKENS))
    return weights.unflatten(-1, (-1, BLOCK_TOKENS)).sum(-1).unflatten(-2, (rows, -1)).mean(-2)
