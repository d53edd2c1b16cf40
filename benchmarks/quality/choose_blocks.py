"""Which blocks of keys a block of queries reads in a sparse prefill, in PyTorch: the reference for kernels.

    pool      mean query of 16 queries, mean key of 16 keys                a page of each
    weigh     softmax of each query page over the key pages before its end
    mass      of a block of keys: the weights of its pages, mean over the 8 query pages of a block of queries
    choose    the first visible block, the blocks of the queries' own positions, then the heaviest, until `top_p` is reached

Heads with sharp attention so read few blocks, and heads with even attention many. A threshold on the mass itself would give
the latter nothing.

Cost: 1 / 256 of the products and exponentials of QK^T. Queries and keys are read once for their means.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_TOKENS = 128
PAGE_TOKENS = 16


@torch.no_grad()
def choose_blocks(
    query: Tensor,
    keys: Tensor,
    *,
    top_p: float,
    scale: float,
    dense_from: int | None = None,
    visible: Tensor | None = None,
    per_kv_head: bool = False,
) -> Tensor:
    """Blocks of keys that the queries of a chunk read.

    Args:
        query: [B, heads, S, D], the queries at positions T - S..T. A block of queries is 128 of them, from the first one.
        keys: [B, H, T, D], the keys at positions 0..T, those of the chunk included. A block of keys begins at a multiple
            of 128. `heads` is a multiple of H.
        top_p: share of a block of queries' estimated attention that is read, above 0. With 1 everything that weighs is.
        scale: of the logits.
        dense_from: position from which queries read everything; None for nowhere.
        visible: bool [B, T], False for padding; None if all keys are visible.
        per_kv_head: whether the query heads of a KV head read the same blocks, by their mean mass.
    Returns:
        bool [B, heads or H, ceil(S / 128), ceil(T / 128)]. The kernel still masks single keys: by position, and padding.
    Raises:
        ValueError: more queries than keys.
    """
    batch, _, queries, _ = query.shape
    kv_heads, total = keys.shape[1:3]
    if queries > total:
        raise ValueError(
            f"expected at most {total} queries, one for every key, got {queries}; pass the keys of the chunk too"
        )
    device, start = query.device, total - queries
    if visible is None:
        visible = torch.ones(batch, total, dtype=torch.bool, device=device)

    rows = _page_means(query, visible[:, None, start:])[0].unflatten(1, (kv_heads, -1))  # [B, H, G, m, D]
    columns, occupied = _page_means(keys, visible[:, None])  # [B, H, n, D], [B, 1, n]
    last_query = (start + PAGE_TOKENS * (torch.arange(rows.shape[3], device=device) + 1)).clamp(max=total) - 1
    earlier = PAGE_TOKENS * torch.arange(columns.shape[2], device=device) <= last_query[:, None]
    logits = (rows @ columns[:, :, None].mT * scale).masked_fill(~(earlier & occupied[:, :, None, None]), float("-inf"))
    masses = _block_masses(logits.softmax(-1).nan_to_num(0.0))  # a page of padding sees nothing
    masses = masses.mean(2) if per_kv_head else masses.flatten(1, 2)

    first = start + BLOCK_TOKENS * torch.arange(masses.shape[2], device=device)[:, None]
    last = (first + BLOCK_TOKENS - 1).clamp(max=total - 1)
    block = torch.arange(masses.shape[3], device=device)
    causal = block <= last // BLOCK_TOKENS
    sink = visible.int().argmax(-1)[:, None, None, None] // BLOCK_TOKENS
    always = (block >= first // BLOCK_TOKENS) | (block == sink)
    if dense_from is not None:
        always = always | (last >= dense_from)
    return (_top_p(masses, always & causal, top_p) | always) & causal


def _top_p(masses: Tensor, always: Tensor, top_p: float) -> Tensor:
    """The heaviest blocks of each row that reach `top_p` together with those of `always`, bool [..., columns]."""
    given = (masses * always).sum(-1, keepdim=True)
    order = masses.masked_fill(always, 0.0).sort(-1, descending=True)
    before = given + order.values.cumsum(-1) - order.values
    return torch.zeros_like(always.expand_as(masses)).scatter(-1, order.indices, (before < top_p) & (order.values > 0))


def _page_means(states: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Mean states [..., n, D] of the visible tokens of each page, in float32, and bool [..., n], whether there are any.

    Args:
        states: [..., tokens, D].
        visible: bool [..., tokens].
    """
    spare = -states.shape[-2] % PAGE_TOKENS
    weights = torch.nn.functional.pad(visible, (0, spare)).unflatten(-1, (-1, PAGE_TOKENS)).float()
    pages = torch.nn.functional.pad(states, (0, 0, 0, spare)).unflatten(-2, (-1, PAGE_TOKENS)).float()
    count = weights.sum(-1)
    return (weights.unsqueeze(-2) @ pages).squeeze(-2) / count.clamp(min=1).unsqueeze(-1), count > 0


def _block_masses(weights: Tensor) -> Tensor:
    """Masses [..., rows, columns] of blocks: weights [..., m, n] of pages, summed over key pages, mean over query pages."""
    pages = BLOCK_TOKENS // PAGE_TOKENS
    queries, keys = weights.shape[-2:]
    padded = torch.nn.functional.pad(weights, (0, -keys % pages, 0, -queries % pages))
    summed = padded.unflatten(-1, (-1, pages)).sum(-1).unflatten(-2, (-1, pages)).sum(-2)
    rows = torch.arange(summed.shape[-2], device=weights.device)
    return summed / (queries - pages * rows).clamp(max=pages).unsqueeze(-1)
