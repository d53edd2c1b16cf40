"""Checks a model's position ids against the cache's: the number of earlier tokens in the sequence, without padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import AttentionError

if TYPE_CHECKING:
    from ..state import CacheState


def check_positions(state: CacheState, position_ids: Tensor, new_valid: Tensor | None) -> None:
    """Raise AttentionError if position ids do not count the real tokens (without padding). Reads the device.

    Args:
        position_ids: [B or 1, Q], or [axes, B or 1, Q].
        new_valid: [B, Q], bool, False for padding; None for all valid.
    """
    fresh = position_ids.new_ones((1, position_ids.shape[-1])).bool() if new_valid is None else new_valid
    fresh = fresh.to(position_ids.device)
    counted = state.sequences.mask.next_positions(state.committed, fresh)
    if bool(_differ(position_ids, counted, fresh)):
        raise AttentionError(
            f"{state.model_name} with {type(state.method).__name__}: expected position ids that count the real tokens of "
            f"each sequence, here {counted.tolist()[0][:4]}... in the first one, got {position_ids.flatten().tolist()[:4]}"
            "...; pass position_ids=attention_mask.cumsum(-1) - 1 (of the new tokens) as generate does, or use ShadowKV"
        )


def counts_positions(state: CacheState, position_ids: Tensor | None, new_valid: Tensor | None) -> bool:
    """Whether the position ids of a one-token step count the real tokens. True if the method does not use positions.

    Reads the device.

    Args:
        position_ids: [B or 1, 1], or [axes, B or 1, 1]; None if the model counts all tokens, padding included.
        new_valid: [B, 1], bool, False for padding; None for all valid.
    """
    if not state.method.uses_positions:
        return True
    if position_ids is None:
        return state.sequences.mask.valid is None and (new_valid is None or bool(new_valid.all()))
    fresh = position_ids.new_ones((1, 1)).bool() if new_valid is None else new_valid.to(position_ids.device)
    counted = state.sequences.mask.next_positions(state.committed, fresh)
    return not bool(_differ(position_ids, counted, fresh))


def _differ(position_ids: Tensor, counted: Tensor, fresh: Tensor) -> Tensor:
    """Whether a `fresh` token (not padding) has another position id than `counted`. A bool tensor of one element."""
    return ((position_ids != counted) & fresh).any()
