"""Modes that transformers itself cannot run: every limit that the zoo lists is tested, so that the list stays true."""

from __future__ import annotations

import pytest

from tests.support.all_modes import MODES
from tests.support.families import FAMILIES
from tests.support.subjects import DenseSubject, StaticSubject

LIMITS = [
    pytest.param(family, mode, id=f"{family}-{mode}") for family, entry in FAMILIES.items() for mode in entry.limits()
]


@pytest.mark.parametrize(("family", "mode"), LIMITS)
def test_transformers_own_cache_fails(family: str, mode: str) -> None:
    subject = StaticSubject(family) if mode == "compiled" else DenseSubject(family)
    with pytest.raises((ValueError, TypeError, AttributeError, RuntimeError)):
        MODES[mode](subject)


@pytest.mark.parametrize("family", FAMILIES)
def test_limits_name_modes(family: str) -> None:
    assert FAMILIES[family].cannot.keys() <= MODES.keys()
