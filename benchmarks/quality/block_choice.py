"""Which key blocks a block of queries reads in a sparse prefill: ways of estimating attention masses, and of choosing by them.

    way      query [H, G, S, D] at positions start..start + S, keys [H, T, D]  ->  masses [bands, H, G, S / 128, T / 128]
    combine  masses of a KV head's G query heads  ->  one row for the group ("mean", "max"), or one for each head ("head")
    choose   masses, a rule and its parameter  ->  bool, chosen or not; a block is chosen if it is in any band

A mass is the share of a query block's softmax that falls on a key block, mean over its queries. The first block and the
diagonal are always chosen. S, T and `start` are multiples of 128. Queries are scaled: logits are their products with keys.

    way                 reads                                               products, share of QK^T
    exact               everything: the bound for all others                1
    antidiagonal-s      sums of antidiagonals of s x s tiles (XAttention)   1 / s
    sampled-s           every s-th query, all keys                          1 / s
    means-q-k           mean queries of q tokens, mean keys of k            1 / (q k)
    spread-q-k          every q-th query, mean and variance of k keys       2 / (q k)
    block-means         all queries, mean keys of blocks (FlashPrefill)     1 / 128
    prism               mean queries and keys of blocks, in two bands       1 / 128^2
    vertical-slash      the last 64 queries, all keys (MInference)          64 / S
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128
PROBES = 64
Way = Callable[[Tensor, Tensor, int], Tensor]


def _block_masses(logits: Tensor, start: int, queries: int, keys: int) -> Tensor:
    """Masses of blocks by logits [H, G, m, n] of units of `queries` and `keys` tokens.

    A unit of queries sees the units of keys that begin before its end.
    """
    rows, columns = logits.shape[-2:]
    seen = keys * torch.arange(columns) < start + queries * (torch.arange(rows)[:, None] + 1)
    weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    blocks = weights.unflatten(-1, (-1, BLOCK // keys)).sum(-1)
    return blocks.unflatten(-2, (-1, BLOCK // queries)).mean(-2)


def _means(states: Tensor, tokens: int) -> Tensor:
    return states.unflatten(-2, (-1, tokens)).mean(-2)


def exact(query: Tensor, keys: Tensor, start: int) -> Tensor:
    """True masses."""
    made = []
    for row in range(0, query.shape[2], BLOCK):
        stop = start + row + BLOCK
        masses = _block_masses(query[:, :, row : row + BLOCK] @ keys[:, None, :stop].mT, start + row, 1, 1)
        made.append(torch.nn.functional.pad(masses, (0, (keys.shape[1] - stop) // BLOCK)))
    return torch.cat(made, 2)[None]


def antidiagonal(stride: int) -> Way:
    """Mean logit of the antidiagonal of every tile of `stride` queries and keys (XAttention, arXiv 2503.16428)."""

    def way(query: Tensor, keys: Tensor, start: int) -> Tensor:
        rows = query.unflatten(-2, (-1, stride)).flip(-2).flatten(-2)
        columns = keys.unflatten(-2, (-1, stride)).flatten(-2)
        return _block_masses(rows @ columns[:, None].mT / stride, start, stride, stride)[None]

    return way


def sampled(stride: int, key_stride: int = 1) -> Way:
    """True weights of the last of every `stride` queries, over all keys or the last of every `key_stride`."""

    def way(query: Tensor, keys: Tensor, start: int) -> Tensor:
        logits = query[:, :, stride - 1 :: stride] @ keys[:, None, key_stride - 1 :: key_stride].mT
        return _block_masses(logits, start, stride, key_stride)[None]

    return way


def means(queries: int, tokens: int) -> Way:
    """Mean queries by mean keys."""

    def way(query: Tensor, keys: Tensor, start: int) -> Tensor:
        return _block_masses(_means(query, queries) @ _means(keys, tokens)[:, None].mT, start, queries, tokens)[None]

    return way


def spread(queries: int, tokens: int, share: float = 0.5) -> Way:
    """The last of every `queries` queries by normally distributed keys: log E exp(q.k) = q.mean + q^2.variance / 2."""

    def way(query: Tensor, keys: Tensor, start: int) -> Tensor:
        rows, pages = query[:, :, queries - 1 :: queries], keys.unflatten(-2, (-1, tokens))
        variance = pages.var(-2, unbiased=False)
        logits = rows @ pages.mean(-2)[:, None].mT + share * rows.square() @ variance[:, None].mT
        return _block_masses(logits, start, queries, tokens)[None]

    return way


def prism(query: Tensor, keys: Tensor, start: int) -> Tensor:
    """Softmax over mean keys in a band of high and a band of low rotary frequencies (Prism, arXiv 2602.08426).

    A band's logits are divided by how much smaller its means are than those of all channels.
    """
    dim = query.shape[-1]
    rows, columns = _means(query, BLOCK), _means(keys, BLOCK)
    half, made = dim // 2, []
    for first, last in ((0, dim // 4), (half - 3 * dim // 8, half)):
        band = torch.cat((torch.arange(first, last), torch.arange(half + first, half + last)))
        high_rows, high_columns = rows[..., band], columns[..., band]
        energy = [
            part.square().mean((-2, -1), keepdim=True).sqrt() for part in (high_rows, rows, high_columns, columns)
        ]
        width = len(band) / dim
        temperature = width * energy[0] / energy[1] * (energy[2] / energy[3])[:, None]
        made.append(_block_masses(high_rows @ high_columns[:, None].mT / temperature, start, BLOCK, BLOCK))
    return torch.stack(made)


def vertical_slash(query: Tensor, keys: Tensor, start: int) -> Tensor:
    """Columns and diagonals of the last queries' weights, half of each (MInference, arXiv 2407.02490)."""
    rows, total = query.shape[2] // BLOCK, keys.shape[1]
    probes = query[:, :, -PROBES:] @ keys[:, None].mT
    distance = start + query.shape[2] - PROBES + torch.arange(PROBES)[:, None] - torch.arange(total)
    weights = probes.masked_fill(distance < 0, float("-inf")).softmax(-1)
    columns = weights.mean(2).unflatten(-1, (-1, BLOCK)).sum(-1)
    index = distance.clamp(min=0).expand_as(weights)
    diagonals = torch.zeros(*query.shape[:2], total).scatter_add_(2, index.flatten(2), weights.flatten(2)) / PROBES
    halves = diagonals.unflatten(-1, (-1, BLOCK))  # of two neighbouring diagonals of blocks each, by how far along
    along = torch.arange(BLOCK) / BLOCK
    near, far = (halves * (1 - along)).sum(-1), (halves * along).sum(-1)
    by_distance = near + torch.nn.functional.pad(far, (1, -1))
    apart = start // BLOCK + torch.arange(rows)[:, None] - torch.arange(total // BLOCK)
    masses = columns[:, :, None] + by_distance[:, :, apart.clamp(min=0)]
    masses = masses.masked_fill(apart < 0, 0.0)
    return (masses / masses.sum(-1, keepdim=True))[None]


WAYS: dict[str, Way] = {
    "exact": exact,
    **{f"antidiagonal-{stride}": antidiagonal(stride) for stride in (8, 16, 32)},
    **{f"sampled-{stride}": sampled(stride) for stride in (8, 16, 32, 64, 128)},
    **{f"sampled-{stride}-{keys}": sampled(stride, keys) for stride, keys in ((16, 4), (32, 2), (32, 4))},
    "block-means": means(1, BLOCK),
    "means-16-16": means(16, 16),
    "means-128-128": means(BLOCK, BLOCK),
    **{f"spread-{queries}-{tokens}": spread(queries, tokens) for queries, tokens in ((16, 16), (16, 8), (8, 16))},
    "prism": prism,
    "vertical-slash": vertical_slash,
}  # fmt: skip


def combine(masses: Tensor, per: str) -> Tensor:
    """Masses [bands, rows, S / 128, T / 128] that are chosen by: a row for every query head, or one for every KV head."""
    if per == "head":
        return masses.flatten(1, 2)
    return masses.mean(2) if per == "mean" else masses.amax(2)


def always(rows: int, columns: int) -> Tensor:
    """The first block and the diagonal, bool [rows, columns], of query blocks at the end of the keys."""
    own = columns - rows + torch.arange(rows)[:, None]
    return (torch.arange(columns) == own) | (torch.arange(columns) == 0)


def causal(rows: int, columns: int) -> Tensor:
    """Key blocks that are not in the future, bool [rows, columns]."""
    return torch.arange(columns) <= columns - rows + torch.arange(rows)[:, None]


def choose(masses: Tensor, rule: str, parameter: float) -> Tensor:
    """Blocks of masses [bands, rows, S / 128, T / 128].

    Args:
        rule: "top-p", the best until their mass is `parameter`; "top-k", that share of the causal blocks; "max", those with
            at least `parameter` times the largest mass; "mass", those with at least this mass.
    Returns:
        bool [rows, S / 128, T / 128].
    """
    rows, columns = masses.shape[-2:]
    forced, allowed = always(rows, columns), causal(rows, columns)
    if rule == "max":
        chosen = masses >= parameter * masses.amax(-1, keepdim=True)
    elif rule == "mass":
        chosen = masses >= parameter
    else:
        order = (masses + 2.0 * forced).argsort(-1, descending=True)
        ordered = masses.gather(-1, order)
        if rule == "top-p":
            wanted = ordered.cumsum(-1) - ordered < parameter
        else:
            count = (allowed.sum(-1, keepdim=True) * parameter).ceil()
            wanted = (torch.arange(columns) < count).expand_as(masses)
        chosen = torch.zeros_like(masses, dtype=torch.bool).scatter(-1, order, wanted)
    return (chosen.any(0) | forced) & allowed


def scaled(query: Tensor, keys: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Queries [1, heads, S, D] and keys [1, H, T, D] of a layer as ways take them, in float32."""
    grouped = query[0].float().unflatten(0, (keys.shape[1], -1)) * scale
    return grouped, keys[0].float()


def parameter_for(rows: list[Tensor], rule: str, density: float) -> float:
    """The parameter at which the rule chooses this share of causal blocks, over masses of many layers."""
    low, high, falls = 0.0, 1.0, rule in ("max", "mass")
    blocks = sum(int(causal(*masses.shape[-2:]).sum()) * masses.shape[1] for masses in rows)
    for _ in range(24):
        middle = math.sqrt(max(low, 1e-7) * high) if falls else (low + high) / 2
        share = sum(int(choose(masses, rule, middle).sum()) for masses in rows) / blocks
        low, high = (middle, high) if (share > density) == falls else (low, middle)
    return high if falls else low
