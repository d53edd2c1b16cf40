"""Requests that decode as rows of a batch, and the same requests decoded alone.

alone     greedy tokens of one prompt in a cache of its own
Requests  prompts by number: `start` reads one and joins, `step` decodes a token of some, `leave` takes one out
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spin_hf import SpinCache
from spin_hf.serving.row_batch import RowBatch


@torch.no_grad()
def alone(model: Any, prompt: Tensor, number: int, **options: Any) -> list[int]:
    """`number` greedy tokens behind `prompt` [1, n]."""
    cache, tokens = SpinCache(model, **options), []
    logits = model(prompt, past_key_values=cache).logits[0, -1]
    for _ in range(number):
        tokens.append(int(logits.argmax()))
        logits = model(torch.tensor([tokens[-1:]], device=prompt.device), past_key_values=cache).logits[0, -1]
    return tokens


class Requests:
    """Requests on one model.

    Args:
        model: the model.
        prompts: [1, n] each.
        max_rows: as for `RowBatch`.
        options: as for `SpinCache`.
    """

    def __init__(self, model: Any, prompts: list[Tensor], max_rows: int, **options: Any) -> None:
        self.model, self.prompts, self.options = model, prompts, options
        self.batch = RowBatch(model, max_rows)
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.row: dict[int, int] = {}
        self.logits: dict[int, Tensor] = {}

    @torch.no_grad()
    def start(self, *numbers: int, **options: Any) -> None:
        """Read the prompts and join."""
        for number in numbers:
            cache = SpinCache(self.model, **{**self.options, **options})
            self.logits[number] = self.model(self.prompts[number], past_key_values=cache).logits[0, -1]
            self.row[number] = self.batch.join(cache)

    def step(self, *numbers: int, on_device: bool = False) -> None:
        """Decode one greedy token of each of the numbered requests, in this order.

        Args:
            on_device: whether the batch gets the tokens as a tensor.
        """
        new = {number: int(self.logits[number].argmax()) for number in numbers}
        tokens = {self.row[number]: token for number, token in new.items()}
        if on_device:
            ids = torch.tensor(list(tokens.values()), device=self.model.device)
            logits = self.batch.step(dict.fromkeys(tokens, 0), ids)
        else:
            logits = self.batch.step(tokens)
        for number, of_row in zip(numbers, logits, strict=True):
            self.tokens[number].append(new[number])
            self.logits[number] = of_row

    def leave(self, number: int) -> SpinCache:
        """Take a request's cache out of the batch."""
        return self.batch.leave(self.row.pop(number))

    @torch.no_grad()
    def go_on_alone(self, number: int, cache: SpinCache, steps: int) -> None:
        """Decode tokens of a request that has left."""
        for _ in range(steps):
            self.tokens[number].append(int(self.logits[number].argmax()))
            ids = torch.tensor([self.tokens[number][-1:]], device=self.prompts[number].device)
            self.logits[number] = self.model(ids, past_key_values=cache).logits[0, -1]

    def check(self, expected: list[list[int]]) -> None:
        """Each request's tokens are the first ones of what is expected."""
        for number, tokens in enumerate(self.tokens):
            assert tokens == expected[number][: len(tokens)], f"request {number}"
