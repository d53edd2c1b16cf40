"""Errors for lack of memory, without their tracebacks, whose frames would keep tensors alive."""

from __future__ import annotations

from collections.abc import Callable

import torch

from spin_hf import CapacityError


def refusal_of(call: Callable[[], object]) -> BaseException | None:
    """The error of `call` if memory ran out; None if it succeeded."""
    try:
        call()
    except (CapacityError, torch.OutOfMemoryError) as error:
        caught = error
    else:
        return None
    for each in (caught, caught.__cause__, caught.__context__):
        if each is not None:
            each.__traceback__ = None
    return caught
