"""Ctrl-C at any line of the package, in operations on a cache and in forwards: all of a call has happened or nothing.

The lines depend on SEED alone, which a failing test prints. SPIN_HF_INTERRUPTIONS is the number of lines of each scenario;
"all" takes every line, the first and the last time that it runs.
"""

from __future__ import annotations

import logging
import os
import random
import zlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from spin_hf import Bisection, CacheStateError, Fitted, RetroInfer
from tests.support.clustering_methods import clustering_often, little_slack
from tests.support.fault_scenarios import SCENARIOS, Rehearsal, Run, Scenario, Step, feed, on_cache, padded, then
from tests.support.inspection import state_of
from tests.support.interruption_trial import Interruptions, contents, same
from tests.support.interruptions import every_place, interrupted, lines_of, some_places
from tests.support.tuning import tuned

SEED = int(os.environ.get("SPIN_HF_INTERRUPTIONS_SEED", "20261"))
LINES = os.environ.get("SPIN_HF_INTERRUPTIONS", "")
IN_OPERATIONS, IN_FORWARDS, IN_FORKS = 12, 4, 4
"""Lines of a scenario, unless it is said otherwise."""

_PAGED = {"gpu_memory": "200kB"}
_BISECTS = {"method": clustering_often(Bisection, 64, 24)(2)}
_FITS = {"method": clustering_often(Fitted, 64, 24)()}
_CLUSTERS = {"method": clustering_often(RetroInfer, 64, 24)()}


def _reset(run: Run) -> None:
    run.cache.reset()
    run.at, run.rows = 0, [0, 1]


def _copy(run: Run) -> None:
    run.kept = deepcopy(run.cache)  # type: ignore[attr-defined]


def _fork(run: Run) -> None:
    run.kept = run.cache.fork()  # type: ignore[attr-defined]


_REPEAT: Step = on_cache("batch_repeat_interleave", 2, rows=[0, 0, 1, 1])
_CROP: Step = on_cache("crop", -70, removes=70)

OPERATIONS = {name: scenario for name, scenario in SCENARIOS.items() if not scenario.forward} | {
    name: replace(scenario, forward=False)
    for name, scenario in {
        "reset": Scenario(_reset, before=feed(60, 1), after=feed(30, 1, 1)),
        "reset, padded": Scenario(_reset, before=padded(60, slice(0, 9)), after=feed(30, 1, 1)),
        "reset, paged": Scenario(_reset, before=feed(270, 1), after=feed(30, 1, 1), options=_PAGED),
        "reset, clusters": Scenario(_reset, before=feed(160, 1), after=feed(100, 1, 1), options=_CLUSTERS),
        "windows, reset": Scenario(_reset, before=feed(40, 1), after=feed(30, 1), family="gemma3_text"),
        "linear attention, reset": Scenario(_reset, before=feed(40, 1), after=feed(30, 1), family="qwen3_next"),
        "linear attention, repeat": Scenario(_REPEAT, before=feed(40, 1), family="qwen3_next"),
        "bisection, cropped": Scenario(_CROP, before=feed(160, 1, 1), options=_BISECTS),
        "bisection, repeated": Scenario(_REPEAT, before=feed(160, 1, 1), options=_BISECTS),
        "fitted, cropped": Scenario(_CROP, before=feed(160, 1, 1), options=_FITS),
        "fitted, repeated": Scenario(_REPEAT, before=feed(160, 1, 1), options=_FITS),
        "clusters, cropped, paged": Scenario(_CROP, before=feed(270, 1, 1), options={**_CLUSTERS, **_PAGED}),
        "release of memory": Scenario(on_cache("release_gpu_memory"), before=feed(270, 1), options=_PAGED),
        "copy": Scenario(_copy, before=feed(270, 1), options=_PAGED),
        "fork": Scenario(_fork, before=feed(270, 1)),
        "fork, paged": Scenario(_fork, before=feed(270, 1), options=_PAGED),
        "fork, clusters": Scenario(_fork, before=feed(160, 1, 1), options=_CLUSTERS),
        "fork, linear attention": Scenario(_fork, before=feed(40, 1), family="qwen3_next"),
        "fork of a fork": Scenario(_fork, before=then(feed(270, 1), _fork, feed(1))),
    }.items()
}
FORKED = {
    "token": Scenario(feed(1), before=feed(270, 1)),
    "token, paged": Scenario(feed(1), before=feed(270, 1), options=_PAGED),
    "crop into clusters": Scenario(_CROP, before=feed(160, 1, 1), options=_CLUSTERS),
    "crop into clusters, paged": Scenario(_CROP, before=feed(270, 1, 1), options={**_CLUSTERS, **_PAGED}),
    "repeat": Scenario(_REPEAT, before=feed(270, 1)),
    "reset": Scenario(_reset, before=feed(270, 1)),
    "release of memory": Scenario(on_cache("release_gpu_memory"), before=feed(270, 1)),
    "second fork": Scenario(_fork, before=feed(270, 1)),
    "clustering": Scenario(feed(1), before=feed(100, 1, 60, 1), options=_CLUSTERS),
    "linear attention": Scenario(feed(1), before=feed(40, 1), family="qwen3_next"),
}
FORWARDS = {name: scenario for name, scenario in SCENARIOS.items() if scenario.forward} | {
    "linear attention, prompt": Scenario(feed(50), family="qwen3_next"),
}


@pytest.fixture(autouse=True)
def _small_chunks() -> Iterator[None]:
    """Two segments a chunk, so that every new segment of a batch needs one; tokens are clustered early."""
    logging.disable(logging.WARNING)
    with tuned(min_chunk_segments=2, max_chunk_segments=2), little_slack():
        yield
    logging.disable(logging.NOTSET)


def _check(name: str, scenario: Scenario, count: int, **options: Any) -> None:
    trials = Interruptions(scenario=scenario, **options)
    generator = random.Random(SEED ^ zlib.crc32(name.encode()))
    if LINES == "all":
        numbers = every_place(trials.lines)
    else:
        numbers = some_places(trials.lines, int(LINES or count), generator)
    for number in numbers:
        try:
            trials.at_line(number)
        except BaseException:
            print(f"scenario {name!r}, line number {number}, SPIN_HF_INTERRUPTIONS_SEED={SEED}")
            raise


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    _check(name, OPERATIONS[name], IN_OPERATIONS)


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards(name: str) -> None:
    _check(name, FORWARDS[name], IN_FORWARDS)


@pytest.mark.parametrize("name", FORKED)
def test_forks_of_what_is_interrupted(name: str) -> None:
    """The other side is as before, whatever happens to this one, and both go on."""
    scenario, generator = FORKED[name], random.Random(SEED ^ zlib.crc32(name.encode()))
    rehearsal = Rehearsal(scenario=scenario)

    def forked() -> tuple[Run, Run]:
        run = rehearsal.copy()
        return run, Run(run.model, run.cache.fork(), run.at, list(run.rows))

    run, other = forked()
    lines = lines_of(lambda: scenario.call(run))
    for number in every_place(lines) if LINES == "all" else some_places(lines, int(LINES or IN_FORKS), generator):
        run, other = forked()
        mirror = Run(other.model, deepcopy(other.cache), other.at, list(other.rows))
        began = contents(other)
        place = interrupted(lambda run=run: scenario.call(run), number)  # type: ignore[misc]
        for turn in range(2):
            run.cache.check_integrity()
            other.cache.check_integrity()
            assert same(contents(other), began) or turn, f"the fork has changed, interrupted before {place}"
            assert torch.equal(other.decode(), mirror.decode()), f"interrupted before {place}"
            run.at, run.rows = run.cache.get_seq_length(), list(range(run.cache.stats().sequences or 2))
            run.feed(1)


@pytest.mark.parametrize("name", ["crop, paged", "repeat, paged", "reset, paged", "windows, reorder", "token, paged"])
def test_a_second_interruption(name: str) -> None:
    """Ctrl-C while what was interrupted is put right: that is done before the cache is used again."""
    scenario = (OPERATIONS | FORWARDS)[name]
    trials, generator = Interruptions(scenario=scenario), random.Random(SEED)
    for number in some_places(trials.lines, 6, generator):
        trials.at_line(number, again=generator.randrange(60))


@pytest.mark.parametrize("again", range(0, 40, 4))
def test_unfinished_work_comes_first(again: int) -> None:
    """Interrupted while it is undone, a crop is undone by whatever looks at the cache next."""
    trials = Interruptions(scenario=SCENARIOS["crop, paged"])
    run = trials.copy()
    began, state = contents(run), state_of(run.cache)
    settle = state.settle

    def interrupted_too(_: Any) -> None:
        if state.unfinished is not None and interrupted(settle, again) is not None:
            raise KeyboardInterrupt

    number = trials.lines.index(next(line for line in trials.lines if line[0] == "storage/page_frames.py"))
    with patch.object(type(state), "settle", interrupted_too):
        assert interrupted(lambda: trials.scenario.call(run), number) is not None
    if state.unfinished is None:
        return  # it has fewer lines than that
    assert run.cache.get_seq_length() == began[0]
    assert same(contents(run), began)
    run.cache.check_integrity()


def test_the_lines_are_really_interrupted() -> None:
    trials = Interruptions(scenario=SCENARIOS["crop"])
    files = {(trials.at_line(number) or ("nothing",))[0] for number in every_place(trials.lines)[::5]}
    assert {"cache.py", "transaction.py", "storage/page_table.py"} <= files
    assert trials.at_line(len(trials.lines)) is None


def test_a_reset_is_finished() -> None:
    """Where a reset is interrupted it is done all the same."""
    trials = Interruptions(scenario=OPERATIONS["reset"])
    run = trials.copy()
    with (
        patch.object(type(state_of(run.cache).sequences), "clear", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        run.cache.reset()
    assert run.cache.get_seq_length() == 0
    run.cache.check_integrity()
    run.at = 0
    assert torch.isfinite(run.feed(5)).all()
    with pytest.raises(CacheStateError, match="cache's own method"):
        run.cache.layers[0].reset()


def test_between_the_reservation_and_the_tables() -> None:
    """Room that was reserved for a new segment is freed, and reserved again by the next step."""
    trials = Interruptions(scenario=FORWARDS["token that moves pages to the cpu tier"])
    files = [file for file, _ in trials.lines]
    returns = [i for i in range(1, len(files)) if files[i - 1 : i + 1] == ["storage/page_table.py", "forward_pass.py"]]
    assert returns, "PageTable.begin returns to ForwardPass.begin"
    for number in (number for end in returns for number in range(end - 6, end)):
        trials.at_line(number)
