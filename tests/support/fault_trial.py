"""One injected failure: what must hold after it, after a second one at the same place, and when the cache continues.

error       CapacityError for memory of the cache, torch.OutOfMemoryError for memory of a forward
state       tokens, contents and integrity as before the call
memory      all new memory is free again, except small tables of the cache; all of it when the cache is gone
retry       the same call and those after it equal a cache's that saw no failure, bit for bit
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spin_hf.errors import CapacityError
from tests.support.fault_scenarios import Rehearsal, Run
from tests.support.faults import Faults, SlabFaults
from tests.support.inspection import state_of
from tests.support.refusals import refusal_of

KEPT_BYTES = 40_000
"""Small tables that a failed call may leave in a cache that holds tokens: buffers of steps, tables of page frames."""


@dataclass(kw_only=True)
class Trials(Rehearsal):
    """Failures of one scenario, each on a fresh copy of the cache."""

    faults: Faults
    slabs: SlabFaults | None = None

    def copy(self) -> Run:
        return super().copy() if self.base.at else self.fresh()

    @cached_property
    def expected(self) -> tuple[Any, Any]:
        """Results of the call and of those after it where nothing fails; counts the points meanwhile."""
        run = self.copy()
        with self.faults.armed(None):
            called = self.scenario.call(run)
        self.points = self.faults.count
        self.faults.made.clear()
        run.cache.check_integrity()
        return called, self.scenario.after(run)

    def fail(self, point: int, lasting: bool) -> str:
        """Let one point fail; returns its place in the code, or "" where the call has fewer points."""
        called, after = self.expected
        run = self.copy()
        before, held = snapshot(run), run.at
        kept: list[int] = []
        place = ""
        for _ in range(3 if lasting else 1):
            error = self._try(run, point, lasting)
            if self.faults.failed and not place:
                place = self.faults.failed[0]
            if error is None:
                got = self.last
                break
            check_error(error, place)
            error = None
            if not self.from_model:
                run.cache.roll_back()  # it is not told how a forward ended
            counted = self.scenario.forward and run.cache.get_seq_length() > held
            if (
                counted and self.scenario.family == "gemma3_text"
            ):  # whose windows cannot be cropped: go on behind the tokens
                run.at, got = run.cache.get_seq_length(), called
                break
            if counted:
                self._counted(run, held)
            else:
                now = snapshot(run)
                assert_same(now[:4] + before[4:] if self.scenario.recodes else now, before, place)
            run.at = held
            run.cache.check_integrity()
            kept.append(self.faults.held())
            anew = frame_bytes(run)  # what may have been made anew
            anew += recoded_bytes(run) if self.scenario.recodes else 0
            most = KEPT_BYTES + anew if held else 0
            assert counted or kept[0] <= most, f"{kept} bytes are left after {place}"  # a crop keeps room
        else:
            got = self.scenario.call(run)
        grown = len(kept) == 3 and kept[2] > max(kept[1], kept[0] + anew)  # a layer more with each try
        assert not grown or counted, f"{kept} bytes are left, more each time, after {place}"
        if not place:
            return ""
        assert_close(got, called, self.tolerance, f"the retry after {place}")
        run.cache.check_integrity()
        assert_close(self.scenario.after(run), after, self.tolerance, f"tokens after {place}")
        run.cache.check_integrity()
        del run, got
        self.last = None
        gc.collect()
        assert not self.faults.held(), f"{self.faults.held()} bytes outlive the cache after {place}"
        return place

    def _try(self, run: Run, point: int, lasting: bool) -> BaseException | None:
        def call() -> None:
            self.last = self.scenario.call(run)

        with self.faults.armed(point, lasting):
            return refusal_of(call)

    def _counted(self, run: Run, held: int) -> None:
        """The forward failed behind its last layer: a cache that was made from a config cannot see that."""
        assert not self.from_model
        run.cache.check_integrity()
        run.cache.crop(held - run.cache.get_seq_length())


def frame_bytes(run: Run) -> int:
    """Bytes of page frames, their tables, and tables that layers share: a step may make them before it fails."""
    frames = [layer.store.frames for layer in run.cache.paged_layers if layer.store is not None]
    sequences = state_of(run.cache).sequences
    common = sum(sequences.metadata.values()) + sum(rows.nbytes for rows in sequences._rows.values())
    return common + sum(f.frames.nbytes + sum(f.metadata.values()) for f in frames if f is not None)


def recoded_bytes(run: Run) -> int:
    """Bytes of pages that replace those of the other layout."""
    homes = [layer.store.backing for layer in run.cache.paged_layers if layer.store is not None]
    return sum(home.num_rows * home.row_bytes for home in homes)


def snapshot(run: Run) -> list[Any]:
    """What a user sees of a cache."""
    cache = run.cache
    stats = cache.stats()
    layers = [(layer.get_seq_length(), layer.keys, layer.values) for layer in cache.layers if hasattr(layer, "keys")]
    return [cache.get_seq_length(), stats.tokens, stats.sequences, stats.pages, layers]


def assert_same(now: list[Any], before: list[Any], place: str) -> None:
    assert now[:4] == before[:4], f"tokens, sequences or pages are not as before {place}"
    for layer, (ours, theirs) in enumerate(zip(now[4], before[4], strict=True)):
        assert ours[0] == theirs[0], f"layer {layer} holds {ours[0]} tokens after {place}, not {theirs[0]}"
        for mine, old in zip(ours[1:], theirs[1:], strict=True):
            assert (mine is None) == (old is None), place
            assert mine is None or torch.equal(mine, old), f"contents of layer {layer} after {place}"


def assert_close(ours: Any, theirs: Any, tolerance: float, what: str) -> None:
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, msg=lambda text: f"{what}: {text}")


def check_error(error: BaseException, place: str) -> None:
    """The right type; a CapacityError says bytes and a remedy."""
    if isinstance(error, CapacityError):
        text = str(error)
        assert "bytes" in text, f"{text} after {place}"
        assert ";" in text, f"no remedy in {text} after {place}"
    else:
        assert type(error) is torch.OutOfMemoryError, f"{error!r} after {place}"
