"""One dense prefill of a prompt, and caches of every kind made from it: what is compared differs in nothing else.

    prompt    [------------------------------ taken ------------------------------][-- last --]
    dense     read, and read                                                                        copies of both
    sparse    taken over by `SpinCache.from_cache`, and read: so a method sees what the prompt's end asks, as it does when a
              `SpinCache` reads all of a prompt

The last tokens attend to everything in either way.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from spin_hf import SpinCache

LAST = 64
"""Tokens that are read by each cache itself; more than what `SpinCache` takes for a verification, which is 16."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--dtype` and `--device`."""
    names = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=names, default="bfloat16", help="float32 is much faster on an old CPU")
    parser.add_argument("--device", default="cpu")


def load_model(name: str, dtype: str, device: str) -> Any:
    """The model of a folder or hub id."""
    return AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).eval().to(device)


class Prefill:
    """A prompt that `model` has read.

    Args:
        ids: its tokens, more than `LAST`.
    Raises:
        ValueError: there are not as many.
    """

    def __init__(self, model: Any, ids: list[int]) -> None:
        if len(ids) <= LAST:
            raise ValueError(f"expected a prompt of more than {LAST} tokens, got {len(ids)}")
        self.model, self.last = model, ids[-LAST:]
        self.taken = DynamicCache(config=model.config)
        self._read(self.taken, ids[:-LAST])
        self.whole = deepcopy(self.taken)
        self._read(self.whole, self.last)

    def dense(self) -> DynamicCache:
        """A cache of its own that holds the prompt."""
        return deepcopy(self.whole)

    def sparse(self, method: Any, **options: Any) -> SpinCache:
        """A cache of its own that holds the prompt, with options as for `SpinCache`."""
        cache = SpinCache.from_cache(self.taken, self.model, method, **options)
        self._read(cache, self.last)
        return cache

    @torch.no_grad()
    def _read(self, cache: Any, ids: list[int]) -> None:
        self.model(torch.tensor([ids], device=self.model.device), past_key_values=cache, logits_to_keep=1)
