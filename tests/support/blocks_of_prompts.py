"""Prompts of which some blocks matter much more than others, and their keys and values in pages."""

from __future__ import annotations

import torch

from spin_hf.kernels import ResidentPages
from spin_hf.kernels.reference_blocks import block_means

SHAPES = [
    # batch, KV heads, group, earlier blocks, queries, key dim, value dim
    (1, 2, 3, 0, 512, 16, 16), (2, 1, 1, 3, 300, 20, 12), (1, 2, 4, 5, 256, 32, 32), (1, 1, 2, 2, 17, 16, 8),
]  # fmt: skip


def states(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, in which some blocks matter much more than others."""
    batch, heads, group, earlier, queries, key_dim, value_dim = shape
    generator = torch.Generator().manual_seed(seed)
    tokens = 128 * earlier + queries
    topics = 3 * torch.randn((tokens // 16 + 1, key_dim), generator=generator).repeat_interleave(16, 0)[:tokens]
    keys = torch.randn((batch, heads, tokens, key_dim), generator=generator) + topics
    query = torch.randn((batch, queries, heads, group, key_dim), generator=generator).permute(0, 2, 3, 1, 4)
    query = query + topics.roll(40, 0)[-queries:]
    return query, keys, torch.randn((batch, heads, tokens, value_dim), generator=generator)


def means_of(query: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return block_means(query.flatten(1, 2)), block_means(keys)


SEGMENT = 32


def in_pages(keys: torch.Tensor, values: torch.Tensor, page_size: int) -> tuple[ResidentPages, list[torch.Tensor]]:
    """Pages of these tokens, in segments in another order than the tokens, on two chunks; and the chunks."""
    batch, heads, tokens, key_dim = keys.shape
    missing = -tokens % (SEGMENT * page_size)
    padded = [torch.nn.functional.pad(each, (0, 0, 0, missing), value=float("nan")) for each in (keys, values)]
    pages = torch.cat([each.unflatten(2, (-1, page_size)).flatten(3) for each in padded], -1)  # [B, H, pages, numbers]
    each = pages.shape[2] // SEGMENT
    order = torch.randperm(batch * each, generator=torch.Generator().manual_seed(0)).view(batch, each)
    first = (order.view(batch, 1, each, 1) * heads + torch.arange(heads).view(1, -1, 1, 1)) * SEGMENT
    rows = (first + torch.arange(SEGMENT)).flatten(2)
    per_chunk = -(-batch * each // 2) * heads * SEGMENT
    content = torch.full((2 * per_chunk, pages.shape[3]), float("nan"), dtype=keys.dtype)
    content[rows] = pages
    chunks = [part.clone() for part in content.split(per_chunk)]
    table = torch.tensor([chunk.data_ptr() for chunk in chunks])
    held = -(-tokens // page_size)
    sizes = (per_chunk, SEGMENT, page_size, key_dim, values.shape[3], keys.dtype)
    return ResidentPages(table, rows[:, :, :held], *sizes), chunks
