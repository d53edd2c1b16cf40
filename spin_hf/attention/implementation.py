"""Switches the attention implementation in a model's config to "spin", and restores it.

Attention modules read `config._attn_implementation` at every call. It must be "spin" while a call with a `SpinCache` runs. A
config is switched while it has holders:

    a call of a model that carries a cache     while the call runs
    a cache that was made from a config        until its first forward has shown which model runs it

The first holder switches the config and remembers the previous implementation. The last one restores it, unless somebody
changed it in between. While the config is switched, calls without a `SpinCache` go to the previous implementation.

Only the config itself is written, not its sub-configs: transformers' setter would set all of them to one value.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import AttentionError

NAME = "spin"
FIELD = "_attn_implementation_internal"
"""The attribute behind the property `_attn_implementation` of transformers' configs."""

logger = logging.getLogger("spin_hf")


class _Entry:
    """One config: its previous implementation, and its number of holders."""

    def __init__(self, config: Any) -> None:
        self.config = weakref.ref(config)
        self.previous: str | None = None
        """None if the config was loaded with "spin"."""
        self.users = 0
        self.announced = False


_entries: dict[int, _Entry] = {}
_lock = threading.RLock()
"""Held while entries change. Reentrant, because the garbage collector may drop a cache, and so call `release`, inside."""


def announce(config: Any) -> None:
    """Remember the implementation of `config`, and log once that calls with a `SpinCache` use "spin" instead."""
    with _lock:
        entry = _entry(config)
        _remember(entry, config)
        announced, entry.announced = entry.announced or entry.previous is None, True
    if not announced:
        logger.info("attention implementation of %s: %r -> %r", type(config).__name__, entry.previous, NAME)


def acquire(config: Any) -> None:
    """Add a holder of `config` and switch it to "spin"."""
    with _lock:
        entry = _entry(config)
        _remember(entry, config)
        entry.users += 1
        setattr(config, FIELD, NAME)


def release(config: Any) -> None:
    """Remove a holder of `config`. The last one restores the previous implementation."""
    with _lock:
        entry = _entries.get(id(config))
        if entry is None:
            return
        entry.users -= 1
        if entry.users == 0 and entry.previous is not None and config._attn_implementation == NAME:
            setattr(config, FIELD, entry.previous)


@contextmanager
def held(config: Any) -> Iterator[None]:
    """Hold `config` switched to "spin" inside the block."""
    acquire(config)
    try:
        yield
    finally:
        release(config)


def previous(config: Any) -> str | None:
    """The previous implementation of `config`; None if it was "spin" from the start."""
    entry = _entries.get(id(config))
    return entry.previous if entry is not None else None


def check(config: Any) -> None:
    """Raise AttentionError if `config` names another implementation while a `SpinCache` is used."""
    if config._attn_implementation != NAME:
        raise AttentionError(
            f'expected the attention implementation "spin", got {config._attn_implementation!r} (changed '
            'after the cache was made); call model.set_attn_implementation("spin"), or make a new SpinCache(model)'
        )


def _entry(config: Any) -> _Entry:
    entry = _entries.get(id(config))
    if entry is None or entry.config() is not config:
        entry = _entries[id(config)] = _Entry(config)
        weakref.finalize(config, _entries.pop, id(config), None)
    return entry


def _remember(entry: _Entry, config: Any) -> None:
    if config._attn_implementation != NAME:
        entry.previous = config._attn_implementation
