"""Errors of a step or a prompt: of which row they are, and what they keep alive.

An error refers to the frames that it has left, and these to caches and activations. With `forget_frames` their memory is free
again while the error is handled, and while a user holds it.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import BudgetError, CapacityError

OUT_OF_MEMORY = (torch.OutOfMemoryError, CapacityError, BudgetError)


@contextmanager
def blaming(row: int) -> Iterator[None]:
    """Raise errors about memory inside the block as errors of the same type that name the row, with the attribute `row`."""
    try:
        yield
    except (CapacityError, BudgetError) as error:
        if error.row is not None:
            raise
        # No variable for it: error, traceback and frame would be a cycle, which keeps the caches of all rows alive.
        raise _named(error, row) from error


def _named(error: CapacityError | BudgetError, row: int) -> CapacityError | BudgetError:
    named = type(error)(f"row {row}: {error}", error.needed_bytes, error.available_bytes, error.fitting_batch_size)
    named.row = row
    return named


def forget_frames(error: BaseException) -> None:
    """Clear the variables of all frames that an error, and those it came from, have left.

    Tracebacks keep their lines, except for errors about memory, which lose them: frames hold closures, too.
    """
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            if isinstance(each, OUT_OF_MEMORY):
                each.__traceback__ = None
            left += [each.__cause__, each.__context__]
