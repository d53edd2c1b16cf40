"""Turns out-of-memory errors into CapacityError, which names the purpose, the size and a remedy.

    with allocating("page frames", num_bytes): torch.empty(...)        raises CapacityError from torch's error

Used for memory that the cache holds. Temporary memory of a forward raises torch's own error.
"""

from __future__ import annotations

import torch

from ..errors import CapacityError

_NO_HOST_MEMORY = "DefaultCPUAllocator"
"""Marks torch's out-of-memory error for host memory, which is a plain RuntimeError."""


class allocating:  # noqa: N801  (a context manager, used like those of contextlib)
    """Convert out-of-memory errors raised inside. A class, as a prompt enters hundreds of them.

    Args:
        what: purpose, as in "the cache needs 4096 bytes more for `what`".
        num_bytes: approximate size, for the message.
    Raises:
        CapacityError: memory ran out. `__cause__` is the original error.
    """

    def __init__(self, what: str, num_bytes: int) -> None:
        self.what, self.num_bytes = what, num_bytes

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            refuse(self.what, self.num_bytes, error)


def refuse(what: str, num_bytes: int, error: BaseException) -> None:
    """Raise CapacityError if `error` means that memory for `what` ran out."""
    if isinstance(error, CapacityError) or not out_of_memory(error):
        return
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
