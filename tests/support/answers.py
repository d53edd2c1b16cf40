"""Answers of `generate` with a cache, and whether they are those of an empty one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


def answer(model: PreTrainedModel, ids: Tensor, cache: Any, **given: Any) -> Any:
    """Five tokens behind a prompt, with their logits."""
    mask = given.pop("attention_mask", torch.ones_like(ids))
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **given,
    )  # fmt: skip


def assert_fresh(model: PreTrainedModel, ids: Tensor, cache: Any, **given: Any) -> None:
    """The answer is that of an empty DynamicCache."""
    ours, theirs = answer(model, ids, cache, **given), answer(model, ids, DynamicCache(config=model.config), **given)
    assert torch.equal(ours.sequences, theirs.sequences)
    ours_logits, theirs_logits = torch.stack(ours.logits), torch.stack(theirs.logits)
    torch.testing.assert_close(ours_logits, theirs_logits, rtol=1e-3, atol=1e-4 * float(theirs_logits.abs().max()))
    cache.check_integrity()
