"""Memory for what a cache keeps: a refusal says what it was for, how much, and what to do.

    with allocating("page frames", num_bytes): torch.empty(...)        CapacityError, from whatever torch raised

What a forward computes with is not kept; there torch's own error says as much as can be said.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import CapacityError

_NO_HOST_MEMORY = "DefaultCPUAllocator"
"""In the RuntimeError that torch raises where the host has no memory: it has no class of its own."""


@contextmanager
def allocating(what: str, num_bytes: int) -> Iterator[None]:
    """Name what memory is asked for inside.

    Args:
        what: as in "the compute tier needs 4096 bytes for `what`".
        num_bytes: how much, about.
    Raises:
        CapacityError: there is not so much; the cause is what was raised inside.
    """
    try:
        yield
    except CapacityError:
        raise
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise CapacityError(
            f"the cache needs {num_bytes} bytes ({num_bytes / 2**30:.2f} GiB) more for {what} and got none: "
            f"{str(error).splitlines()[0] if str(error) else repr(error)}; free memory and try again, lower gpu_memory so "
            "that pages move to host memory, shorten the context, or use a smaller batch"
        ) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the device or on the host."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and _NO_HOST_MEMORY in str(error)
    )
