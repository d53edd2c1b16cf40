"""Errors of one row in a step over several: the message says which row, so that the caller can take that one out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import BudgetError, CapacityError


@contextmanager
def blaming(row: int) -> Iterator[None]:
    """Raise errors about memory inside the block as errors of the same type that name the row, with the attribute `row`."""
    try:
        yield
    except (CapacityError, BudgetError) as error:
        if error.row is not None:
            raise
        named = type(error)(f"row {row}: {error}", error.needed_bytes, error.available_bytes, error.fitting_batch_size)
        named.row = row
        raise named from error
