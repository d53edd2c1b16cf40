"""Which attention implementation a model's config names, and what it named before.

A cache needs `config._attn_implementation == "spin"`; the attention modules read it at every call. The first cache of a
config switches it and remembers what stood there; when the last one is gone it is put back, unless somebody has changed
it since. In between, calls without a `SpinCache` are handed to the remembered implementation.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Any

from ..errors import AttentionError

NAME = "spin"

logger = logging.getLogger("spin_hf")


class _Entry:
    """One switched config: what it said before, and how many caches use it."""

    def __init__(self, config: Any, previous: str | None) -> None:
        self.config = weakref.ref(config)
        self.previous = previous
        self.users = 0
        self.announced = False


_entries: dict[int, _Entry] = {}
_lock = threading.RLock()
"""Held while entries change; the garbage collector may drop a cache, and so come here, inside as well."""


def acquire(config: Any) -> None:
    """Count one more cache of `config` and switch it to "spin"."""
    announced = True
    with _lock:
        entry = _entries.get(id(config))
        if entry is None or entry.config() is not config:
            current = config._attn_implementation
            entry = _entries[id(config)] = _Entry(config, None if current == NAME else current)
            weakref.finalize(config, _entries.pop, id(config), None)
        entry.users += 1
        if config._attn_implementation != NAME:
            entry.previous = config._attn_implementation
            announced, entry.announced = entry.announced, True
            config._attn_implementation = NAME
    if not announced:
        logger.info("attention implementation of %s: %r -> %r", type(config).__name__, entry.previous, NAME)


def release(config: Any) -> None:
    """Count one cache of `config` less; the last one puts the remembered implementation back."""
    with _lock:
        entry = _entries.get(id(config))
        if entry is None:
            return
        entry.users -= 1
        if entry.users == 0 and entry.previous is not None and config._attn_implementation == NAME:
            config._attn_implementation = entry.previous


def previous(config: Any) -> str | None:
    """The remembered implementation of `config`; None if it said "spin" from the start."""
    entry = _entries.get(id(config))
    return entry.previous if entry is not None else None


def check(config: Any) -> None:
    """Raise AttentionError where somebody has switched a config in use to another implementation since."""
    if config._attn_implementation != NAME and id(config) in _entries and _entries[id(config)].users:
        raise AttentionError(
            f'expected the attention implementation "spin", got {config._attn_implementation!r} (changed '
            'after the cache was made); call model.set_attn_implementation("spin"), or make a new SpinCache(model)'
        )
