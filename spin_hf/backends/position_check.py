"""Whether new tokens stand where a method that counts positions takes them to: behind the real tokens of their sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import AttentionError

if TYPE_CHECKING:
    from ..state import CacheState


def check_positions(state: CacheState, position_ids: Tensor, new_valid: Tensor | None) -> None:
    """Raise AttentionError where new tokens do not stand where real tokens are counted to. Reads the device.

    Args:
        position_ids: [B or 1, Q], or [axes, B or 1, Q].
        new_valid: [B, Q], bool, False for padding; None for all valid.
    """
    fresh = position_ids.new_ones((1, position_ids.shape[-1])).bool() if new_valid is None else new_valid
    fresh = fresh.to(position_ids.device)
    counted = state.sequences.mask.next_positions(state.committed, fresh)
    if bool(_elsewhere(position_ids, counted, fresh)):
        raise AttentionError(
            f"{state.model_name} with {type(state.method).__name__}: expected position ids that count the real tokens of "
            f"each sequence, here {counted.tolist()[0][:4]}... in the first one, got {position_ids.flatten().tolist()[:4]}"
            "...; pass position_ids=attention_mask.cumsum(-1) - 1 (of the new tokens) as generate does, or use ShadowKV"
        )


def counts_positions(state: CacheState, position_ids: Tensor | None, new_valid: Tensor | None) -> bool:
    """Whether a step of one token stands where real tokens are counted to, if the method cares. Reads the device.

    Args:
        position_ids: [B or 1, 1], or [axes, B or 1, 1]; None where the model counts all tokens.
        new_valid: [B, 1], bool, False for padding; None for all valid.
    """
    if not state.method.uses_positions:
        return True
    if position_ids is None:
        return state.sequences.mask.valid is None and (new_valid is None or bool(new_valid.all()))
    fresh = position_ids.new_ones((1, 1)).bool() if new_valid is None else new_valid.to(position_ids.device)
    counted = state.sequences.mask.next_positions(state.committed, fresh)
    return not bool(_elsewhere(position_ids, counted, fresh))


def _elsewhere(position_ids: Tensor, counted: Tensor, fresh: Tensor) -> Tensor:
    """Whether a token that is `fresh` does not stand where it is counted to."""
    return ((position_ids != counted) & fresh).any()
