"""The tokens of a batch, which of them are real, and new masks that change that.

    Batch   ids [B, L]      tokens held
            valid [B, L]    real tokens by the last mask
            fed [B, L]      tokens that were real when they came: only their keys are compared

A token that was padding when it came never becomes real later: attention of a padded query is undefined. A token that was real
may be hidden and shown again.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.support.families import VOCAB_SIZE
from tests.support.zoo import FIRST_TOKEN_ID, PAD_TOKEN_ID

LEAST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Batch:
    """See the module's head. Never changed in place."""

    ids: Tensor
    valid: Tensor
    fed: Tensor

    @classmethod
    def empty(cls, rows: int) -> Batch:
        nothing = torch.zeros((rows, 0), dtype=torch.bool)
        return cls(torch.zeros((rows, 0), dtype=torch.int64), nothing, nothing)

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def followed_by(self, ids: Tensor, valid: Tensor) -> Batch:
        """With more tokens, [B, n]."""
        return Batch(torch.cat([self.ids, ids], 1), torch.cat([self.valid, valid], 1), torch.cat([self.fed, valid], 1))

    def cut(self, length: int) -> Batch:
        return Batch(self.ids[:, :length], self.valid[:, :length], self.fed[:, :length])

    def select(self, rows: list[int]) -> Batch:
        return Batch(self.ids[rows], self.valid[rows], self.fed[rows])

    def with_other_holes(self, dice: random.Random) -> Batch:
        """Some tokens that were real when they came are hidden, others are shown again."""
        flips = torch.rand(self.valid.shape, generator=generator(dice)) < dice.choice([0.02, 0.2])
        return replace(self, valid=(self.valid ^ flips) & self.fed)

    def shown(self) -> Batch:
        """As a forward without a mask reads it; only where all tokens were real when they came."""
        return replace(self, valid=self.fed)


def generator(dice: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(dice.getrandbits(31))


def new_tokens(rows: int, count: int, dice: random.Random, padding: str) -> tuple[Tensor, Tensor]:
    """Token ids, and which of them are real, [rows, count]; `padding`: "none", "left", "right" or "holes"."""
    ids = torch.randint(FIRST_TOKEN_ID, VOCAB_SIZE, (rows, count), generator=generator(dice))
    valid = torch.ones((rows, count), dtype=torch.bool)
    for row in range(rows):
        padded = dice.randint(0, count - 1) if dice.random() < 0.7 else 0
        if padding == "left":
            valid[row, :padded] = False
        elif padding == "right":
            valid[row, count - padded :] = False
        elif padding == "holes":
            valid[row] = torch.rand(count, generator=generator(dice)) >= 0.3
    if padding != "none" and bool((~valid).all(1).any()):
        valid[:, -1] = True
    return ids.masked_fill(~valid, PAD_TOKEN_ID), valid


def positions(valid: Tensor, count: int) -> Tensor:
    """Positions of the last `count` tokens [B, count], as `generate` counts them."""
    return (valid.long().cumsum(1) - 1).clamp(min=0)[:, -count:]


def four_dimensional(valid: Tensor, count: int, dice: random.Random, adds: bool) -> Tensor:
    """A mask [B, 1, count, L] of the last `count` queries: causal, some older tokens hidden.

    Args:
        adds: whether it must be additive, as transformers' eager attention demands; else it may be bool.
    """
    rows, length = valid.shape
    query, key = torch.arange(length - count, length)[:, None], torch.arange(length)[None]
    hidden = torch.rand((rows, 1, count, length), generator=generator(dice)) < dice.choice([0.0, 0.25])
    seen = (key <= query) & valid[:, None, None] & ~hidden | (key == query)
    return torch.where(seen, 0.0, LEAST) if adds or dice.random() < 0.5 else seen
