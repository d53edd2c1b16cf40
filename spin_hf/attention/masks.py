"""Attention masks: those from the user, and those that the cache makes itself.

    padding mask [B, tokens]         any dtype, 0 for padding    goes through the mask function, which stores it in the cache
    given mask, 4-D                  bool or floating point      reaches attention unchanged and is applied as it is
    marker mask [B, 1, Q, 0]         no elements                 the cache has stored which of the Q new tokens are padding
    validity mask [B, 1, 1, 1, Q]    bool                        which new tokens are real. For code that Dynamo traces, which
                                                                 cannot store it in the cache

Marker and validity masks are recognized by their shapes, which no given mask has. A shape survives where a tensor attribute is
lost: copies between devices, graph breaks, compiled code that gets its masks from outside.

Given masks have the meaning that torch's scaled_dot_product_attention gives them: bool is True where a query may attend,
floating point is added to the scores, integers are refused, and size 1 or a missing leading dimension broadcasts. Neither
causality nor stored padding is added to them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import AttentionError, BatchSizeError

_TRACED_DIMENSIONS = 5


def validity_mask(valid: Tensor) -> Tensor:
    """The validity mask of `valid` [B, Q]."""
    return valid[:, None, None, None]


def marker_mask(mask: Tensor, num_queries: int) -> Tensor:
    """The marker mask for a cache that has stored the padding mask `mask` [B, tokens]."""
    return mask.new_empty((mask.shape[0], 1, num_queries, 0), dtype=torch.bool)


def is_internal(mask: Tensor | None) -> bool:
    """Whether `mask` was made by `validity_mask` or `marker_mask`."""
    return mask is not None and (mask.dim() == _TRACED_DIMENSIONS or mask.shape[-1] == 0)


def new_validity(mask: Tensor | None, stored: Tensor | None) -> Tensor | None:
    """Which of the new tokens are real, [B, Q], bool; None for all.

    Args:
        mask: as attention received it. A given mask means no padding.
        stored: validity of the new tokens from the latest padding mask, as the cache stored it.
    Raises:
        AttentionError: the mask is over no tokens, and the cache has stored none for these tokens.
    """
    if mask is None or not is_internal(mask):
        return None
    if mask.dim() == _TRACED_DIMENSIONS:
        return mask[:, 0, 0, 0]
    if stored is None or stored.shape != (mask.shape[0], mask.shape[-2]):
        raise AttentionError(
            f"attention_mask: expected a mask over the tokens held and new, got one over none, {tuple(mask.shape)}; pass a "
            "padding mask [B, tokens]"
        )
    return stored


def check_kind(mask: Any) -> None:
    """Raise AttentionError for a given mask that attention cannot apply: not a tensor, or integers."""
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
    """`check_kind` for the `attention_mask` of a forward, before it computes anything.

    Args:
        mask: a tensor, which is a given mask only if it has 4 dimensions; masks by layer type; or None.
    """
    for each in mask.values() if isinstance(mask, dict) else (mask,):
        if not isinstance(each, Tensor) or each.dim() == 4:
            check_kind(each)


def over_tokens(mask: Tensor, batch_size: int, num_heads: int, num_queries: int, num_tokens: int) -> Tensor:
    """A given mask as a view [B, 1 or heads, Q, tokens].

    Raises:
        AttentionError: its shape does not broadcast to these sequences, heads, queries and tokens.
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
    """Raise AttentionError if the mask that the mask function receives is not [B, tokens]."""
    if mask.dim() != 2:
        raise AttentionError(
            f"attention_mask: expected 2 dimensions (padding, [B, tokens]) or 4 (a mask over all queries and tokens), got "
            f"{tuple(mask.shape)}"
        )


def padding_mask_of(mask: Tensor | None, length: int, batch_size: int) -> Tensor | None:
    """A padding mask [B, n] as bool [B, length]; None for no padding. As in transformers, tokens beyond n are padding.

    Args:
        mask: may have another number of rows if all its values are true; transformers ignores such a mask.
        length: number of tokens held and new.
    Raises:
        AttentionError, BatchSizeError: the mask does not belong to this batch. Only a wrong number of rows synchronises with
            the device.
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
