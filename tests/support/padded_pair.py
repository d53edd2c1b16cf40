"""Two sequences on a GPU, the first of them padded if that is wanted, for tests of captured and compiled steps."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.zoo import PAD_TOKEN_ID

FULL: dict[str, Any] = {"method": "shadowkv", "budget": 1 << 20}
"""Options with which nothing is left out."""


def padded_inputs(padded: bool = False, length: int = 90) -> dict[str, torch.Tensor]:
    """Token ids and mask [2, length]; with `padded` the first sequence begins with 11 tokens of padding."""
    ids = torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :11], mask[0, :11] = PAD_TOKEN_ID, 0
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}


def generate(model: Any, cache: Any, padded: bool, count: int = 60) -> Any:
    """What `generate` returns behind 150 tokens each: `count` tokens, greedily, with logits."""
    return model.generate(
        **padded_inputs(padded, 150), past_key_values=cache, max_new_tokens=count, min_new_tokens=count, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip


def generate_short(model: Any, cache: Any, padded: bool = False, **options: Any) -> Any:
    """What `generate` returns behind 90 tokens each: 40 tokens, greedily, unless `options` say otherwise."""
    torch.manual_seed(5)
    return model.generate(
        **padded_inputs(padded), past_key_values=cache, return_dict_in_generate=True, output_logits=True,
        **{"max_new_tokens": 40, "do_sample": False} | options,
    )  # fmt: skip
