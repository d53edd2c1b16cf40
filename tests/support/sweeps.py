"""Long sweeps: which of a test's parameter sets are quick, and which are `slow`.

    @pytest.mark.sweep          every value of every parameter has a quick test; the other sets are slow
    @pytest.mark.sweep(2)       the same for every pair of values of two parameters
    @pytest.mark.sweep(keep=[0, 3])    these sets are quick, counted in the order in which they run

A test that is named alone on the command line is quick.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any

import pytest


def _tokens(item: pytest.Item, strength: int) -> set[Hashable]:
    """Values, or groups of `strength` values, of the parameters of `item`, of which the quick tests must have all."""
    call: Any = item.callspec  # type: ignore[attr-defined]
    values: list[Hashable] = []
    for name, value in call.params.items():
        key = value if isinstance(value, Hashable) else call.indices[name]
        values.append((name, type(value), key))
    return set(combinations(values, min(strength, len(values))))


def quick(wanted: Sequence[set[Hashable]]) -> list[int]:
    """Indices of a few sets whose union is that of all: each time the one with the most missing elements."""
    missing = set().union(*wanted)
    chosen = []
    while missing:
        best = max(range(len(wanted)), key=lambda i: (len(wanted[i] & missing), -i))
        chosen.append(best)
        missing -= wanted[best]
    return sorted(chosen)


def mark_slow(items: list[pytest.Item]) -> None:
    """Mark what `sweep` does not keep as slow."""
    sweeps: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sweep") is not None and item.get_closest_marker("slow") is None:
            sweeps[item.nodeid.partition("[")[0]].append(item)
    for swept in sweeps.values():
        marker = swept[0].get_closest_marker("sweep")
        assert marker is not None
        if len(swept) == 1:  # named alone
            continue
        if "keep" in marker.kwargs:
            kept = set(marker.kwargs["keep"])
        else:
            strength = marker.args[0] if marker.args else 1
            kept = set(quick([_tokens(item, strength) for item in swept]))
        for index, item in enumerate(swept):
            if index not in kept:
                item.add_marker(pytest.mark.slow)


def keep_part(items: list[pytest.Item], part: str) -> None:
    """Keep one part of several, as "2/3" says: a third of the tests, always the same. In place."""
    number, _, of = part.partition("/")
    if not 1 <= int(number) <= int(of):
        raise pytest.UsageError(f"SPIN_HF_PART={part}: expected a part of several, such as 2/3")
    items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % int(of) == int(number) - 1]
