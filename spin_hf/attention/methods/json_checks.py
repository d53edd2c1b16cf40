"""Checks of JSON that may be hostile. They are used for files of gates and for saved caches."""

from __future__ import annotations

from typing import Any


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these names and values, for `object_pairs_hook`. Raises ValueError for duplicate names."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("two values of one name")
    return found


def is_no_deeper(value: Any, depth: int) -> bool:
    """Whether objects and arrays are nested at most `depth` times."""
    if not isinstance(value, (dict, list)):
        return True
    return depth > 0 and all(is_no_deeper(v, depth - 1) for v in (value.values() if isinstance(value, dict) else value))
