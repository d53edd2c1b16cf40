"""Which sequences of a batch are meant: what users write, as a list of numbers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from ..errors import BatchSizeError, OptionError, OptionTypeError


def rows_of(indices: Any, held: int | None) -> list[int]:
    """The sequences that `indices` name, from 0 on; negative numbers count from the end.

    Args:
        indices: integers [n], or a bool for each sequence: a tensor, an array, a list or another sequence, or a slice.
        held: sequences that there are; None where the cache is empty, which has none to name.
    Raises:
        OptionTypeError: they are no such numbers.
        BatchSizeError: they name none, or others than those held.
    """
    if isinstance(indices, slice):
        indices = list(range(held or 0))[indices]
    try:
        given = indices if isinstance(indices, Tensor) else torch.as_tensor(indices)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise _wrong(indices) from error
    if not given.numel() and given.dim() == 1:
        given = given.long()
    if given.dim() != 1 or given.is_floating_point() or given.is_complex():
        raise _wrong(indices)
    if held is None:
        return []
    if given.dtype == torch.bool:
        if given.shape[0] != held:
            raise BatchSizeError(
                f"indices: expected a bool for each of the {held} sequences held, got {given.shape[0]}; pass {held} of them"
            )
        given = given.nonzero().flatten()
    rows: list[int] = given.tolist()
    if not rows:
        raise BatchSizeError(f"expected at least one of the {held} sequences held, got none; call cache.reset()")
    bad = [row for row in rows if not -held <= row < held]
    if bad:
        raise BatchSizeError(f"indices {bad} are outside the {held} sequences held; pass 0 to {held - 1}")
    return [row % held for row in rows]


def times_of(repeats: Any) -> int:
    """How often every sequence is to be there.

    Raises:
        OptionTypeError, OptionError: it is no number from 1 on.
    """
    try:
        times = operator.index(repeats)
    except TypeError as error:
        raise OptionTypeError(
            f"repeats: expected a whole number, got {repeats!r}; pass one number for all sequences, or name them with "
            "batch_select_indices"
        ) from error
    if times < 1:
        raise OptionError(f"repeats: expected 1 or more, got {times}; call cache.reset() to forget all sequences")
    return times


def _wrong(indices: Any) -> OptionTypeError:
    return OptionTypeError(
        f"indices: expected whole numbers in one dimension, or a bool for each sequence, got {indices!r}; pass a tensor or "
        "a list such as [0, 2]"
    )
