"""Parses the sequence indices that users pass to the cache's batch operations."""

from __future__ import annotations

import operator
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from ..errors import BatchSizeError, OptionError, OptionTypeError

_CROP_TAKES_LENGTHS = Version(transformers.__version__) < Version("5.18")


def rows_of(indices: Any, held: int | None) -> list[int]:
    """The rows that `indices` select, each in [0, held). Negative indices count from the end.

    Args:
        indices: integers [n], or a bool for each sequence: a tensor, an array, a list or another sequence; or a slice.
        held: number of sequences; None if the cache is empty, which gives no rows.
    Raises:
        OptionTypeError: `indices` is of another type or shape.
        BatchSizeError: `indices` selects no sequence, or is out of range.
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


def times_of(repeats: Any, name: str = "repeats") -> int:
    """`repeats` as an int; `name` is the argument's name in messages.

    Raises:
        OptionTypeError, OptionError: not an integer of 1 or more.
    """
    try:
        times = operator.index(repeats)
    except TypeError as error:
        raise OptionTypeError(
            f"{name}: expected a whole number, got {repeats!r}; pass one number for all sequences, or name them with "
            "batch_select_indices"
        ) from error
    if times < 1:
        raise OptionError(f"{name}: expected 1 or more, got {times}; call cache.reset() to forget all sequences")
    return times


def _wrong(indices: Any) -> OptionTypeError:
    return OptionTypeError(
        f"indices: expected whole numbers in one dimension, or a bool for each sequence, got {indices!r}; pass a tensor or "
        "a list such as [0, 2]"
    )


def removed_by_crop(tokens_to_remove: Any) -> int:
    """The argument of `crop` as an int: 0 or negative. Before transformers 5.18 also a length, which is positive.

    Raises:
        OptionError: it is positive.
    """
    removed = int(tokens_to_remove)  # older transformers pass a tensor
    if removed > 0 and not _CROP_TAKES_LENGTHS:
        raise OptionError(f"crop: expected 0 or a negative number of tokens to remove, got {removed}; pass -n")
    return removed
