"""Two sequences of 150 tokens, one of them padded if that is wanted, for tests of captured steps on a GPU."""

from __future__ import annotations

from typing import Any

import torch

from .zoo import PAD_TOKEN_ID


def generate(model: Any, cache: Any, padded: bool, count: int = 60) -> Any:
    """What `generate` returns for them: so many tokens each, greedily, with logits."""
    ids = torch.randint(3, 100, (2, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :11], mask[0, :11] = PAD_TOKEN_ID, 0
    return model.generate(
        input_ids=ids.cuda(), attention_mask=mask.cuda(), past_key_values=cache, max_new_tokens=count,
        min_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
