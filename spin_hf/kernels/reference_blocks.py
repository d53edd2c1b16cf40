"""Block-sparse attention of prompts, in PyTorch: the specification of the kernels in `prompt/`.

    block       128 consecutive tokens, from a multiple of 128 on
    mean        of 16 consecutive tokens' queries or keys; a block has 8
    weigh       softmax of each mean query over the mean keys up to its own
    mass        of a key block for a query block: the weights of its mean keys, averaged over the block's mean queries
    choose      the first block, the query block's own one, then the heaviest until they have `top_p` of the mass

Queries and keys are read once for their means. The products of means are 1/256 of those of attention.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import attend

BLOCK_TOKENS, MEAN_TOKENS = 128, 16
_BLOCK_MEANS = BLOCK_TOKENS // MEAN_TOKENS


class BlockLists(NamedTuple):
    """Key blocks that query blocks attend to.

    Attributes:
        blocks: [B, heads, query blocks, n], int32: indices in ascending order, then undefined.
        counts: [B, heads, query blocks], int32: how many of them count.
        first: index of the first query block.
    """

    blocks: Tensor
    counts: Tensor
    first: int

    def mask(self, num_blocks: int) -> Tensor:
        """[B, heads, query blocks, num_blocks], bool: which key blocks are listed."""
        width = self.blocks.shape[3]
        listed = torch.arange(width, device=self.blocks.device) < self.counts.unsqueeze(-1)
        mask = torch.zeros((*self.counts.shape, num_blocks + 1), dtype=torch.bool, device=self.blocks.device)
        return mask.scatter_(3, self.blocks.long().masked_fill(~listed, num_blocks).clamp(max=num_blocks), True)[
            ..., :num_blocks
        ]


def num_means(num_tokens: int) -> int:
    """Means of 16 tokens each that `num_tokens` tokens have."""
    return -(-num_tokens // MEAN_TOKENS)


def block_means(states: Tensor) -> Tensor:
    """Mean of each 16 tokens of states [..., n, D]: [..., ceil(n / 16), D]. The last mean may have fewer tokens."""
    whole = states.shape[-2] // MEAN_TOKENS * MEAN_TOKENS
    means = states[..., :whole, :].unflatten(-2, (-1, MEAN_TOKENS)).mean(-2)
    if whole == states.shape[-2]:
        return means
    return torch.cat([means, states[..., whole:, :].mean(-2, keepdim=True)], -2)


def choose_blocks(
    query_means: Tensor, key_means: Tensor, scale: float, top_p: float, first: int, dense_from: int
) -> BlockLists:  # fmt: skip
    """Choose the key blocks of each query block.

    Args:
        query_means: [B, H * G, m, D], from block `first` on.
        key_means: [B, H, n, D], of all tokens up to the last query.
        scale: factor of the scores.
        top_p: share of the mass that is read.
        dense_from: index of the block from which query blocks read everything.
    """
    masses = _block_masses(query_means, key_means, scale, first)
    own = first + torch.arange(masses.shape[2], device=masses.device).unsqueeze(1)
    block = torch.arange(masses.shape[3], device=masses.device)
    causal, always = block <= own, (block == 0) | (block == own) | (own >= dense_from)
    chosen = (
        (masses >= _least_mass(masses.masked_fill(always, 0.0), masses.where(always, 0.0), top_p)) | always
    ) & causal
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return BlockLists(order.int(), chosen.sum(-1, dtype=torch.int32), first)


def _block_masses(query_means: Tensor, key_means: Tensor, scale: float, first: int) -> Tensor:
    """Masses [B, H * G, query blocks, key blocks], float32."""
    num_heads, num_queries, num_keys = key_means.shape[1], query_means.shape[2], key_means.shape[2]
    grouped = query_means.unflatten(1, (num_heads, -1)).float()
    scores = (grouped @ key_means.float().unsqueeze(2).mT * scale).flatten(1, 2)
    index = torch.arange(num_keys, device=scores.device)
    own = first * _BLOCK_MEANS + torch.arange(num_queries, device=scores.device).unsqueeze(1)
    weights = scores.masked_fill(index > own, float("-inf")).softmax(-1)
    padded = torch.nn.functional.pad(weights, (0, -num_keys % _BLOCK_MEANS, 0, -num_queries % _BLOCK_MEANS))
    masses = padded.unflatten(-1, (-1, _BLOCK_MEANS)).sum(-1).unflatten(-2, (-1, _BLOCK_MEANS)).sum(-2)
    rows = _BLOCK_MEANS * torch.arange(masses.shape[2], device=masses.device)
    return masses / (num_queries - rows).clamp(max=_BLOCK_MEANS).unsqueeze(1)


def _least_mass(masses: Tensor, given: Tensor, top_p: float) -> Tensor:
    """The mass [..., 1] from which on blocks are read, above 0: the largest one that reaches `top_p`, else the smallest.

    Args:
        masses: [..., n], 0 for blocks that cannot be chosen.
        given: [..., n], masses of the blocks that are read anyway.
    """
    falling = masses.sort(-1, descending=True).values
    given = given.sum(-1, keepdim=True)
    enough = given + falling.cumsum(-1) >= top_p
    index = torch.where(enough.any(-1, keepdim=True), enough.int().argmax(-1, keepdim=True), masses.shape[-1] - 1)
    least = falling.gather(-1, index).clamp(min=torch.finfo(torch.float32).tiny)
    return least.masked_fill(given >= top_p, float("inf"))


def attend_blocks(
    query: Tensor, keys: Tensor, values: Tensor, lists: BlockLists, scale: float, first: int, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of query blocks to the listed blocks among some consecutive keys.

    Args:
        query: [B, H, G, S, Dk], from block `lists.first` on.
        keys, values: [B, H, M, Dk] and [B, H, M, Dv], from block `first` on.
        causal: whether the keys are the queries' own tokens; else all of them are earlier.
    Returns:
        out: [B, H, G, S, Dv], float32 or the query's dtype; lse: [B, H, G, S], float32. As `reference.attend`.
    """
    num_heads, num_queries, num_keys = keys.shape[1], query.shape[3], keys.shape[2]
    mask = lists.mask(first + -(-num_keys // BLOCK_TOKENS))[..., first:]
    mask = mask.repeat_interleave(BLOCK_TOKENS, 3)[..., :num_keys].repeat_interleave(BLOCK_TOKENS, 2)[
        :, :, :num_queries
    ]
    if causal:
        mask = mask & torch.ones(mask.shape[2:], dtype=torch.bool, device=mask.device).tril()
    return attend(query, keys, values, mask.unflatten(1, (num_heads, -1)), scale)
