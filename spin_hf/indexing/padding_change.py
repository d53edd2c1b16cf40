"""Changes of padding: the next forward's mask may turn held tokens into padding, or back into real tokens.

    mask [B, tokens]  ->  changed tokens  ->  uncluster and unshare their pages  ->  write the mask  ->  summaries

If memory runs out before the mask is written, nothing has changed. The changed pages are marked stale (`LayerState.invalidate`)
and summarized before the next step.

The validity of new tokens is stored in `CacheState.new_token_validity` when the mask is made, and taken by the first layer.
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
    """Raise BatchSizeError if a padding mask has another batch size. A mask without padding is ignored, as in transformers.

    Args:
        batch_size: sequences of the forward.
        mask: [B, tokens], bool, False for padding; None for none.
    """
    if mask is not None and mask.shape[0] != batch_size and not bool(mask.all()):
        raise BatchSizeError(
            f"attention_mask: expected one for {batch_size} sequences, as the input has, got one for {mask.shape[0]}; pass the "
            "attention_mask that belongs to the input"
        )


def note(state: CacheState, mask: Tensor | None) -> None:
    """Store the validity of the next forward's new tokens, until the next mask is made. `mask` as for `reconcile`."""
    state.new_token_validity = None if mask is None else mask[:, state.committed :]


def take(state: CacheState, mask: Tensor | None) -> Tensor | None:
    """Apply the padding mask of a step of one token.

    Args:
        mask: [B, tokens], bool, False for padding; None for none.
    Returns:
        Validity [B, 1] of the new tokens; None without padding.
    """
    sequences = state.sequences
    if sequences.mask.valid is None and (mask is None or bool(mask.all())):
        return None
    accept(state, sequences.batch_size, mask)
    return None if mask is None else mask[:, -1:]


@outside_inference_mode
def accept(state: CacheState, batch_size: int, mask: Tensor | None) -> None:
    """Apply the padding mask of a forward to the tokens held, and store it for the new ones.

    Args:
        batch_size: sequences of the forward.
        mask: [B, tokens held and new], bool, False for padding; None for none.
    Raises:
        BatchSizeError: the batch or its mask has another number of sequences than the cache holds.
        BudgetError, CapacityError: no room for copies of shared pages. Nothing has changed.
    """
    check_mask(batch_size, mask)
    if state.committed:
        check_batch(state.sequences.batch_size, batch_size)
        reconcile(state, mask)
    note(state, mask)


def reconcile(state: CacheState, mask: Tensor | None) -> None:
    """Apply a padding mask to the tokens held. Unclusters, unshares and invalidates the changed pages.

    Args:
        mask: [B, tokens held and new], bool, False for padding; None for none.
    Raises:
        BudgetError, CapacityError: no room for copies of shared pages. Nothing has changed.
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
    for layer in state.layers:  # before the mask is written, so that an interruption does not lose it
        layer.invalidate(pages.start, min(pages.stop, length // sequences.page_size))
    sequences.replace_padding(mask, length)
