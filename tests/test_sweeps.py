"""The part of a sweep that `make test` runs has every value, or every pair of values, of the full sweep."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.sweeps import keep_part, mark_slow, quick


@pytest.mark.parametrize("strength", [1, 2])
def test_everything_is_had_by_few(strength: int) -> None:
    sets = [
        set(itertools.combinations(enumerate(values), strength))
        for values in itertools.product(range(4), range(3), range(3))
    ]
    chosen = quick(sets)
    assert set().union(*(sets[i] for i in chosen)) == set().union(*sets)
    assert len(chosen) <= (4 if strength == 1 else 14) < len(sets)
    assert quick([]) == []


class Item:
    """As far as `mark_slow` looks at an item."""

    def __init__(self, name: str, marks: list[Any], **values: Any) -> None:
        self.nodeid, self.marks = f"{name}[{values}]", {mark.name: mark for mark in marks}
        self.callspec = SimpleNamespace(params=values, indices=dict.fromkeys(values, str(values)))

    def get_closest_marker(self, name: str) -> Any:
        return self.marks.get(name)

    def add_marker(self, mark: Any) -> None:
        self.marks[mark.name] = mark

    @property
    def slow(self) -> bool:
        return "slow" in self.marks


@pytest.mark.parametrize(
    ("mark", "kept"), [(pytest.mark.sweep, 4), (pytest.mark.sweep(1), 4), (pytest.mark.sweep(2), 12)]
)
def test_the_rest_is_slow(mark: Any, kept: int) -> None:
    """`True` is not 1; a test without parameters to choose from, and one without the mark, are left alone."""
    product = list(itertools.product([1, 2, 3, True], "xyz"))
    swept = [Item("some", [mark], a=a, b=b) for a, b in product]
    others = [Item("other", [], a=a, b=b) for a, b in product] + [Item("alone", [mark], a=1)]
    mark_slow([*swept, *others])  # type: ignore[list-item]
    assert sum(not item.slow for item in swept) == kept
    assert not any(item.slow for item in others)


def test_what_has_no_hash_is_told_apart_by_its_place() -> None:
    swept = [Item("some", [pytest.mark.sweep], a=a) for a in ([], [1], {})]
    mark_slow(swept)  # type: ignore[arg-type]
    assert not any(item.slow for item in swept)


def test_what_is_kept_by_place_and_what_is_named_alone() -> None:
    swept = [Item("some", [pytest.mark.sweep(keep=[0, 2])], a=a) for a in range(4)]
    mark_slow(swept)  # type: ignore[arg-type]
    assert [item.slow for item in swept] == [False, True, False, True]
    alone = Item("some", [pytest.mark.sweep(keep=[0, 2])], a=3)
    mark_slow([alone])  # type: ignore[list-item]
    assert not alone.slow


def test_parts_are_all_there_is() -> None:
    names = [f"test[{number}]" for number in range(50)]
    parts = []
    for part in ("1/3", "2/3", "3/3"):
        items: list[Any] = [SimpleNamespace(nodeid=name) for name in names]
        keep_part(items, part)
        parts.append([item.nodeid for item in items])
    assert sorted(itertools.chain(*parts)) == sorted(names)
    assert all(len(part) >= 9 for part in parts)
    with pytest.raises(pytest.UsageError, match="4/3"):
        keep_part([], "4/3")
