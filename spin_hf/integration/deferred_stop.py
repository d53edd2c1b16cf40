"""`generate` does not wait for the device after every token of a cache whose steps are captured.

    transformers reads after each step whether to stop     step ─ stop? ─> host: next call ─> step      the device waits
    reads that one step late                               step ─ step ─ step                           for nobody
                                                              └ stop? ─> host

Reading late is transformers' own (`DeferredStopCheck`): one forward too many behind an end-of-sequence token, whose token is
cropped from the cache. It asks itself whether that is supported, and by now says so for MPS alone. Here the answer is widened,
for as long as a cache lives that may want it and for such caches only.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation import utils

_CHECK: Any = getattr(utils, "DeferredStopCheck", None)
"""None in a transformers that has no such thing: then every step is waited for."""

_users = 0
_previous: Any = None
_supports: Callable[[Any, torch.device], bool]
_lock = threading.RLock()
"""Held while the answer is changed; the garbage collector may drop a cache, and so come here, inside as well."""


def _is_supported(*args: Any, **kwargs: Any) -> bool:
    given = inspect.signature(_previous).bind(*args, **kwargs).arguments
    if not given.get("is_assistant") and _supports(given.get("cache"), given["device"]):
        return True
    return bool(_previous(*args, **kwargs))


def acquire(supports: Callable[[Any, torch.device], bool]) -> None:
    """Count one more cache that `generate` may read late for; the first one widens the answer.

    Args:
        supports: whether a cache can be read late on a device.
    """
    global _users, _previous, _supports
    with _lock:
        _users += 1
        _supports = supports
        if _users == 1 and _CHECK is not None:
            _previous = _CHECK.is_supported
            _CHECK.is_supported = staticmethod(_is_supported)


def release() -> None:
    """Count one less; the last one puts back what stood there, unless somebody has changed it since."""
    global _users
    with _lock:
        _users -= 1
        if _users == 0 and _CHECK is not None and _CHECK.is_supported is _is_supported:
            _CHECK.is_supported = staticmethod(_previous)
