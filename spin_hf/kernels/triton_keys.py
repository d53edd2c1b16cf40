"""Makes triton's cache keys the same in all processes, whichever kernels they launch first.

    kernel -> functions it calls -> functions these call

Triton 3.6 adds the constants that a called function reads to the caller's key only if that function has a key already. So a
key depends on what was compiled before, and a kernel may not be found in the cache on the disk. With keys of called functions
first, all of them are complete.
"""

from __future__ import annotations

from typing import Any

from triton.runtime.jit import JITFunction


def complete_key(kernel: Any) -> None:
    """Compute a kernel's key, those of the functions that it calls first. Costs nothing if it has one."""
    if getattr(kernel, "hash", "") is not None:  # an interpreted kernel has none
        return
    for name in kernel.fn.__code__.co_names:
        called = kernel.fn.__globals__.get(name)
        if isinstance(called, JITFunction) and called is not kernel:
            complete_key(called)
    assert kernel.cache_key
