"""Turns out-of-memory errors into CapacityError, which names the purpose, the size and a remedy.

    with allocating("page frames", num_bytes): torch.empty(...)        raises CapacityError from torch's error

Used for memory that the cache holds. Temporary memory of a forward raises torch's own error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import CapacityError

_NO_HOST_MEMORY = "DefaultCPUAllocator"
"""Marks torch's out-of-memory error for host memory, which is a plain RuntimeError."""


@contextmanager
def allocating(what: str, num_bytes: int) -> Iterator[None]:
    """Convert out-of-memory errors raised inside.

    Args:
        what: purpose, as in "the cache needs 4096 bytes more for `what`".
        num_bytes: approximate size, for the message.
    Raises:
        CapacityError: memory ran out. `__cause__` is the original error.
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
    """Whether an error means that device or host memory ran out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and _NO_HOST_MEMORY in str(error)
    )
