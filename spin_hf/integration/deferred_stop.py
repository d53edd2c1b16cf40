"""Enables transformers' deferred stop check for caches with captured steps, so that `generate` does not stall the device.

    stop check after each step      step ─ stop? ─> host: next call ─> step      the device waits for the host
    stop check one step late        step ─ step ─ step                           the device does not wait
                                       └ stop? ─> host

The late check is transformers' own (`DeferredStopCheck`). It runs one forward too many after an end-of-sequence token and crops
that token from the cache. transformers 5.24 supports it on MPS only. While a cache that may use it lives, `is_supported` is
patched to return True for such caches too.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation import utils

_CHECK: Any = getattr(utils, "DeferredStopCheck", None)
"""None in versions of transformers without it: then the host waits for every step."""

_users = 0
_previous: Any = None
_supports: Callable[[Any, torch.device], bool]
_lock = threading.RLock()
"""Held while `is_supported` is patched. Reentrant: the garbage collector may drop a cache, and so call `release`, inside."""


def _is_supported(*args: Any, **kwargs: Any) -> bool:
    given = inspect.signature(_previous).bind(*args, **kwargs).arguments
    if not given.get("is_assistant") and _supports(given.get("cache"), given["device"]):
        return True
    return bool(_previous(*args, **kwargs))


def acquire(supports: Callable[[Any, torch.device], bool]) -> None:
    """Count one more cache that may use the late check. The first one patches `is_supported`.

    Args:
        supports: whether a cache can use the late check on a device.
    """
    global _users, _previous, _supports
    with _lock:
        _users += 1
        _supports = supports
        if _users == 1 and _CHECK is not None:
            _previous = _CHECK.is_supported
            _CHECK.is_supported = staticmethod(_is_supported)


def release() -> None:
    """Count one cache less. The last one restores `is_supported`, unless somebody has replaced it since."""
    global _users
    with _lock:
        _users -= 1
        if _users == 0 and _CHECK is not None and _CHECK.is_supported is _is_supported:
            _CHECK.is_supported = staticmethod(_previous)
