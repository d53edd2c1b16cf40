"""Padding that changes: tokens held may have become padding, or real again, with the mask of the next forward.

    mask [B, tokens]  ->  tokens that differ  ->  their pages are in order and unshared  ->  bits  ->  summaries

Where memory runs out before the bits are written nothing has changed. Behind that the summaries are made before the next
step, as layers know which are stale (`LayerState.invalidate`).

Of new tokens the mask function notes what the mask says, and the first layer takes that (`CacheState.noted`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import BatchSizeError
from ..inference_mode import outside_inference_mode
from ..storage.page_table import check_batch
from . import cluster

if TYPE_CHECKING:
    from ..state import CacheState


def check_mask(batch_size: int, mask: Tensor | None) -> None:
    """Raise BatchSizeError where a padding mask is not one of this batch. Without padding it says nothing, as in transformers.

    Args:
        batch_size: sequences of the forward.
        mask: [B, tokens], bool; None for no padding.
    """
    if mask is not None and mask.shape[0] != batch_size and not bool(mask.all()):
        raise BatchSizeError(
            f"attention_mask: expected one for {batch_size} sequences, as the input has, got one for {mask.shape[0]}; pass the "
            "attention_mask that belongs to the input"
        )


def note(state: CacheState, mask: Tensor | None) -> None:
    """Keep which tokens of the forward to come are real until the next mask is made; `mask` as for `reconcile`."""
    state.noted = None if mask is None else mask[:, state.committed :]


def take(state: CacheState, mask: Tensor | None) -> Tensor | None:
    """Reconcile a cache with the padding mask of a step of one token.

    Args:
        mask: [B, tokens], bool; None for no padding.
    Returns:
        validity [B, 1] of the new tokens, or None where nothing is padding.
    """
    sequences = state.sequences
    if sequences.mask.valid is None and (mask is None or bool(mask.all())):
        return None
    accept(state, sequences.batch_size, mask)
    return None if mask is None else mask[:, -1:]


@outside_inference_mode
def accept(state: CacheState, batch_size: int, mask: Tensor | None) -> None:
    """Take the padding mask of a forward: of the tokens held, where it changes them, and of the new ones.

    Args:
        batch_size: sequences of the forward.
        mask: [B, tokens held and new], bool, False for padding; None for none.
    Raises:
        BatchSizeError: the batch, or its mask, is of other sequences than those held.
        BudgetError, CapacityError: there is no room for copies of pages that sequences share; nothing has changed.
    """
    check_mask(batch_size, mask)
    if state.committed:
        check_batch(state.sequences.batch_size, batch_size)
        reconcile(state, mask)
    note(state, mask)


def reconcile(state: CacheState, mask: Tensor | None) -> None:
    """Take the padding mask of a batch whose tokens a cache holds.

    Args:
        mask: [B, tokens held and new], bool, False for padding; None for none.
    Raises:
        BudgetError, CapacityError: there is no room for copies of pages that sequences share; nothing has changed.
    """
    sequences, length = state.sequences, state.committed
    changed = sequences.mask.changed_tokens(mask, length)
    if changed is None:
        return
    cluster.restore(state, mask, length)
    tokens = changed.any(0).nonzero()
    pages = range(int(tokens.min()) // sequences.page_size, int(tokens.max()) // sequences.page_size + 1)
    for row in changed.any(1).nonzero().flatten().tolist():
        sequences.unshare([row], pages)
    for layer in state.layers:  # before the bits are written, so that an interruption does not lose it
        layer.invalidate(pages.start, min(pages.stop, length // sequences.page_size))
    sequences.replace_padding(mask, length)
