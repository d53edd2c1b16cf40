"""Caches with other sizes and intervals than users' caches have (`spin_hf.config.Tuning`).

tuned     caches made in a block
tune      caches made from here to the end of a test
retuned   a cache that exists
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from spin_hf import SpinCache
from spin_hf.config import SpinOptions, Tuning
from tests.support.inspection import state_of

_changed: dict[str, int] = {}
"""Fields of `Tuning` that differ from their defaults in caches made now."""
_parse = SpinOptions.parse


def _parse_and_tune(**options: Any) -> SpinOptions:
    return replace(_parse(**options), tuning=Tuning(**_changed))


SpinOptions.parse = _parse_and_tune  # type: ignore[method-assign]  # once, as blocks and tests may end in any order


@contextmanager
def tuned(**fields: int) -> Iterator[None]:
    """Caches made in this block have these fields of `Tuning`."""
    with pytest.MonkeyPatch.context() as patch:
        tune(patch, **fields)
        yield


def tune(monkeypatch: pytest.MonkeyPatch, **fields: int) -> None:
    """Caches made from here on have these fields of `Tuning`, until `monkeypatch` is undone."""
    for name, number in fields.items():
        monkeypatch.setitem(_changed, name, number)


def tuned_fields() -> dict[str, int]:
    """The fields that caches made now have other numbers of, for another process that makes caches of the same test."""
    return dict(_changed)


def grow_by_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays in GPU memory grow by one segment at a time, as the caches of tiny models are small."""
    tune(monkeypatch, gpu_chunk_bytes=1, min_chunk_segments=1)


@contextmanager
def retuned(cache: SpinCache, **fields: int) -> Iterator[None]:
    """A cache has these fields of `Tuning` in this block. Only what it reads anew at every use changes."""
    state = state_of(cache)
    before = state.options
    state.options = replace(before, tuning=replace(before.tuning, **fields))
    try:
        yield
    finally:
        state.options = before
