"""Memory that runs out at any place: failures in random order, after which the cache continues as if there had been none.

Each is one point of one call (`tests/support/fault_scenarios.py`), and is checked as in `tests/support/fault_trial.py`. The
points depend on SEED alone, which a failing test prints. SPIN_HF_FAULTS is their number.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from spin_hf.storage import pinned_slab
from tests.support.clustering_methods import little_slack
from tests.support.fault_scenarios import SCENARIOS
from tests.support.fault_trial import Trials
from tests.support.faults import Faults, SlabFaults, chunks_in_slabs
from tests.support.tuning import tuned

SEED = int(os.environ.get("SPIN_HF_FAULTS_SEED", "20260"))
FAILURES = int(os.environ.get("SPIN_HF_FAULTS", "220"))
FEW = 60
"""In the quick test: two or three of each scenario."""
IN_SLABS = (
    "prompt",
    "prompt, paged",
    "token that takes a segment",
    "token that moves pages to the cpu tier",
    "repeat, paged",
)
"""Scenarios whose chunks are slabs: what the system and the driver refuse is among their points."""


@pytest.fixture(autouse=True)
def _small_chunks() -> Iterator[None]:
    """Two segments a chunk, so that every new segment of a batch needs one; tokens are clustered early."""
    gc.collect()
    gc.freeze()  # what was there before need not be looked through after each failure
    with tuned(min_chunk_segments=2, max_chunk_segments=2), little_slack():
        yield
    gc.unfreeze()


def _draw(names: list[str], points: dict[str, int], count: int) -> list[tuple[str, int, bool]]:
    """Failures in random order: scenario, point, and whether memory stays out until the call ends."""
    generator = random.Random(SEED)
    everywhere = [
        (name, point, lasting) for name in names for point in range(points[name]) for lasting in (False, True)
    ]
    share = max(1, count // len(names))
    drawn = [
        one
        for name in names
        for one in generator.sample([other for other in everywhere if other[0] == name], min(share, 2 * points[name]))
    ]
    rest = [one for one in everywhere if one not in set(drawn)]
    drawn += generator.sample(rest, min(len(rest), max(0, count - len(drawn))))
    generator.shuffle(drawn)
    return drawn


def _run(trials: dict[str, Trials], count: int) -> set[tuple[str, int, bool]]:
    """Failures of some scenarios; returns those that really failed."""
    for each in trials.values():
        each.expected  # noqa: B018  (counts the points)
    failed = set()
    for name, point, lasting in _draw(list(trials), {name: each.points for name, each in trials.items()}, count):
        try:
            if trials[name].fail(point, lasting):
                failed.add((name, point, lasting))
        except BaseException as error:
            error.add_note(
                f"scenario {name!r}, point {point}, lasting={lasting}, SPIN_HF_FAULTS_SEED={SEED}"
            ) if hasattr(error, "add_note") else print(
                f"scenario {name!r}, point {point}, lasting={lasting}, SPIN_HF_FAULTS_SEED={SEED}"
            )
            raise
    return failed


@pytest.mark.parametrize("count", [FEW, pytest.param(FAILURES, marks=pytest.mark.slow)])
def test_failures_anywhere(count: int) -> None:
    faults = Faults()
    failed = _run({name: Trials(scenario=scenario, faults=faults) for name, scenario in SCENARIOS.items()}, count)
    assert len(failed) >= 0.9 * count


@pytest.mark.skipif(sys.platform != "linux", reason="slabs are populated by Linux")
def test_failures_of_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request to the system and to the driver is refused once, among others. In the end all memory is free."""
    faults = Faults()
    slabs = chunks_in_slabs(faults, monkeypatch)
    trials = {name: Trials(scenario=SCENARIOS[name], faults=faults, slabs=slabs) for name in IN_SLABS}
    refused = 0
    for each in trials.values():
        each.expected  # noqa: B018
        for point in _questions(each):
            place = each.fail(point, lasting=bool(point % 2))
            refused += place.startswith(("mmap", "touch", "register"))  # a spare that was made in time is not asked for
    assert refused >= 20
    trials.clear()
    del each
    gc.collect()
    _assert_given_back(slabs)


def _questions(trials: Trials) -> list[int]:
    """The points of a call at which the system or the driver is called."""
    run, faults = trials.copy(), trials.faults
    asked: list[int] = []
    reach = faults.reach

    def noted(what: str) -> bool:
        if what in ("mmap", "touch", "register"):
            asked.append(faults.count)
        return reach(what)

    faults.reach = noted  # type: ignore[method-assign]
    try:
        with faults.armed(None):
            trials.scenario.call(run)
    finally:
        faults.reach = reach  # type: ignore[method-assign]
    faults.made.clear()
    return asked


def _assert_given_back(slabs: SlabFaults) -> None:
    spare: Any = pinned_slab.HostSlab(
        pinned_slab.PAGE, slabs
    )  # gives back what the reserve's thread was the last to hold
    del spare
    gc.collect()
    assert not slabs.registered
    assert not slabs.open_bytes
