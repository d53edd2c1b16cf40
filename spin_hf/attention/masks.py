"""Masks: what a user gives, and how the cache's own are told apart from it.

    padding mask [B, tokens]     any dtype, 0 for padding    goes through the mask function; the cache keeps it
    given mask, 4-D              bool or floating point      reaches attention as the user gave it, and is applied as it is
    own mask [B, 1, Q, 0]        says that the cache has noted which of the Q new tokens are padding
    own mask [B, 1, 1, 1, Q]     bool, the validity itself: of code that Dynamo traces, which cannot leave a note

Own masks have forms that no given mask has: over no tokens, or with five dimensions. A form survives what an attribute of the
tensor does not: copies between devices, breaks of a traced graph, compiled code that gets its masks from outside.

Given masks are read as torch's scaled_dot_product_attention reads them, whatever implementation the config named before:
bool is True where a query may attend, floating point is added to the scores, integers are refused, and size 1 or a missing
leading dimension stands for all. Nothing is added to them: neither causality nor the padding that the cache knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import AttentionError, BatchSizeError

_TRACED_DIMENSIONS = 5


def traced_mask(valid: Tensor) -> Tensor:
    """The own mask that holds validity `valid` [B, Q] itself."""
    return valid[:, None, None, None]


def noted_mask(mask: Tensor, num_queries: int) -> Tensor:
    """The own mask of a batch whose padding mask [B, tokens] the cache has noted."""
    return mask.new_empty((mask.shape[0], 1, num_queries, 0), dtype=torch.bool)


def is_own(mask: Tensor | None) -> bool:
    """Whether `mask` was made by `traced_mask` or `noted_mask`."""
    return mask is not None and (mask.dim() == _TRACED_DIMENSIONS or mask.shape[-1] == 0)


def new_validity(mask: Tensor | None, noted: Tensor | None) -> Tensor | None:
    """Which of the new tokens are real, [B, Q], bool; None for all.

    Args:
        mask: as attention received it; a given one says nothing of padding.
        noted: what the cache has noted of the latest padding mask.
    Raises:
        AttentionError: the mask is over no tokens, and none was made for these tokens.
    """
    if mask is None or not is_own(mask):
        return None
    if mask.dim() == _TRACED_DIMENSIONS:
        return mask[:, 0, 0, 0]
    if noted is None or noted.shape != (mask.shape[0], mask.shape[-2]):
        raise AttentionError(
            f"attention_mask: expected a mask over the tokens held and new, got one over none, {tuple(mask.shape)}; pass a "
            "padding mask [B, tokens]"
        )
    return noted


def check_kind(mask: Any) -> None:
    """Raise AttentionError where a given mask is of a kind that attention cannot apply: no tensor, or integers."""
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise AttentionError(
            f"attention_mask: expected a tensor, got a {type(mask).__name__}; pass a padding mask [B, tokens] or a bool mask "
            "[B, 1, Q, tokens]"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise AttentionError(
            f"attention_mask: expected a mask of 4 dimensions to be bool (True where a query may attend) or floating point "
            f"(added to the scores), got {mask.dtype}; pass mask.bool() if it holds 0 and 1"
        )


def check_argument(mask: Any) -> None:
    """The same of the `attention_mask` that a forward gets, before it computes anything.

    Args:
        mask: a tensor, of which only one of 4 dimensions is a given mask; masks by layer type; or None.
    """
    for each in mask.values() if isinstance(mask, dict) else (mask,):
        if not isinstance(each, Tensor) or each.dim() == 4:
            check_kind(each)


def over_tokens(mask: Tensor, batch_size: int, num_heads: int, num_queries: int, num_tokens: int) -> Tensor:
    """A given mask as [B, 1 or heads, Q, tokens], a view.

    Raises:
        AttentionError: it is not over these sequences, heads, queries and tokens.
    """
    wanted = (batch_size, num_heads, num_queries, num_tokens)
    shape = (1,) * (len(wanted) - mask.dim()) + tuple(mask.shape)
    if len(shape) > len(wanted) or any(size not in (1, want) for size, want in zip(shape, wanted, strict=True)):
        raise AttentionError(
            f"attention_mask: expected a mask over {batch_size} sequences, {num_heads} heads, {num_queries} queries and "
            f"{num_tokens} tokens (size 1 stands for all), got {tuple(mask.shape)}; pass a padding mask [B, tokens], or a "
            "mask [B, 1, Q, tokens] over all tokens, those that the cache holds included"
        )
    return mask.view(shape).expand(batch_size, -1, num_queries, num_tokens)


def check_padding(mask: Tensor) -> None:
    """Raise AttentionError where a mask that the mask function gets has other dimensions than [B, tokens]."""
    if mask.dim() != 2:
        raise AttentionError(
            f"attention_mask: expected 2 dimensions (padding, [B, tokens]) or 4 (a mask over all queries and tokens), got "
            f"{tuple(mask.shape)}"
        )


def padding_mask_of(mask: Tensor | None, length: int, batch_size: int) -> Tensor | None:
    """A padding mask [B, n] as bool [B, length], None for no padding; as in transformers, what it does not cover is padding.

    Args:
        mask: its rows may be of another number than the batch's where all of it is true, as transformers ignores it then.
        length: tokens held and new.
    Raises:
        AttentionError, BatchSizeError: it is no mask of this batch. Reads the device only before the latter.
    """
    if mask is None:
        return None
    check_padding(mask)
    if mask.shape[0] != batch_size:
        if mask.shape[1] >= length and bool(mask[:, :length].all()):
            return None
        raise BatchSizeError(
            f"attention_mask: expected a row for each of the {batch_size} sequences, got {tuple(mask.shape)}; pass the mask of "
            "this batch"
        )
    return torch.nn.functional.pad(mask, (0, length - mask.shape[1])).bool()
