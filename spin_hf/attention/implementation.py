"""Which attention implementation a model's config names, and what it named before.

Attention modules read `config._attn_implementation` at every call. It has to say "spin" while a call with a `SpinCache` runs:

    holders    calls of a model that carry a cache      for as long as each runs
               caches that were made from a config      for as long as each lives: their calls are not seen

The first holder of a config switches it and remembers what stood there. The last one puts that back, unless somebody has
changed it since. In between, calls without a `SpinCache` are handed to the remembered implementation.

Only the config itself is written, not its sub-configs: the setter of transformers would give all of them one value.
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
"""Where transformers' configs keep what `_attn_implementation` gives."""

logger = logging.getLogger("spin_hf")


class _Entry:
    """One config: what it said before it was switched, and how many hold it switched."""

    def __init__(self, config: Any) -> None:
        self.config = weakref.ref(config)
        self.previous: str | None = None
        """None if the config was loaded with "spin"."""
        self.users = 0
        self.announced = False


_entries: dict[int, _Entry] = {}
_lock = threading.RLock()
"""Held while entries change; the garbage collector may drop a cache, and so come here, inside as well."""


def announce(config: Any) -> None:
    """Remember what `config` says, and log once that calls with a `SpinCache` use "spin" instead."""
    with _lock:
        entry = _entry(config)
        _remember(entry, config)
        announced, entry.announced = entry.announced or entry.previous is None, True
    if not announced:
        logger.info("attention implementation of %s: %r -> %r", type(config).__name__, entry.previous, NAME)


def acquire(config: Any) -> None:
    """Count one more holder of `config` and switch it to "spin"."""
    with _lock:
        entry = _entry(config)
        _remember(entry, config)
        entry.users += 1
        setattr(config, FIELD, NAME)


def release(config: Any) -> None:
    """Count one holder of `config` less; the last one puts the remembered implementation back."""
    with _lock:
        entry = _entries.get(id(config))
        if entry is None:
            return
        entry.users -= 1
        if entry.users == 0 and entry.previous is not None and config._attn_implementation == NAME:
            setattr(config, FIELD, entry.previous)


@contextmanager
def held(config: Any) -> Iterator[None]:
    """Switch `config` to "spin" inside."""
    acquire(config)
    try:
        yield
    finally:
        release(config)


def previous(config: Any) -> str | None:
    """The remembered implementation of `config`; None if it said "spin" from the start."""
    entry = _entries.get(id(config))
    return entry.previous if entry is not None else None


def check(config: Any) -> None:
    """Raise AttentionError where `config` names another implementation while a `SpinCache` is used."""
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
