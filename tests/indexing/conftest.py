"""What tests of clustering have in common: short spans, poisoned memory, and keys and values of three sequences."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.cache_driver import RandomKV, poisoned_memory
from tests.support.clustered_pages import LENGTH, SHAPE
from tests.support.clustering_methods import little_slack


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory(), little_slack():
        yield


@pytest.fixture(scope="package")
def kv() -> RandomKV:
    return RandomKV.random(SHAPE, 3, LENGTH, seed=0)
