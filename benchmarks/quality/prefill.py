"""One dense prefill of a prompt, and caches of every kind made from it: what is compared differs in nothing else.

    prompt    [------------------------------ taken ------------------------------][-- last --]
    dense     read, and read                                                                        copies of both
    sparse    taken over by `SpinCache.from_cache`, and read: so a method sees what the prompt's end asks, as it does when a
              `SpinCache` reads all of a prompt

The last tokens attend to everything in either way.
"""

from __future__ import annotations

import argparse
import re
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from spin_hf import SpinCache

LAST = 64
"""Tokens that are read by each cache itself; more than what `SpinCache` takes for a verification, which is 16."""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--dtype` and `--device`."""
    names = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=names, default="bfloat16", help="float32 is much faster on an old CPU")
    parser.add_argument("--device", default="cpu")


def rope_scaling(text: str) -> str:
    """A checked `yarn:4`.

    Raises:
        argparse.ArgumentTypeError: it is not of this form.
    """
    kind, _, factor = text.partition(":")
    if kind != "yarn" or not re.fullmatch(r"\d+(\.\d+)?", factor) or float(factor) < 1:
        raise argparse.ArgumentTypeError(f"expected yarn and a factor of at least 1, such as yarn:4, got {text!r}")
    return text


def add_rope_option(parser: argparse.ArgumentParser) -> None:
    """`--rope-scaling`."""
    parser.add_argument(
        "--rope-scaling", type=rope_scaling, metavar="yarn:FACTOR",
        help="YaRN (arXiv 2309.00071), for contexts of up to FACTOR times the model's own",
    )  # fmt: skip


def rope_about(args: argparse.Namespace) -> dict[str, str]:
    """What a results file says of `--rope-scaling`: nothing if it was not given."""
    return {"rope_scaling": args.rope_scaling} if args.rope_scaling else {}


def load_model(name: str, dtype: str, device: str, rope_scaling: str | None = None) -> Any:
    """The model of a folder or hub id.

    Args:
        rope_scaling: such as `yarn:4`, which makes its contexts as many times as long; None for what its config says.
    """
    config = AutoConfig.from_pretrained(name)
    if rope_scaling:
        kind, factor = rope_scaling.split(":")
        text = config.get_text_config()
        native = text.max_position_embeddings
        text.rope_parameters |= {
            "rope_type": kind, "factor": float(factor), "original_max_position_embeddings": native,
        }  # fmt: skip
        text.max_position_embeddings = int(native * float(factor))
    return AutoModelForCausalLM.from_pretrained(name, config=config, dtype=getattr(torch, dtype)).eval().to(device)


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
