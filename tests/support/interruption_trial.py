"""One Ctrl-C in the middle of a call: what must hold after it.

state      all of the call has happened or nothing: tokens, sequences, contents; integrity
retry      the call again (if nothing happened) and those after it equal a cache's that saw no interruption
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tests.support.fault_scenarios import Rehearsal, Run
from tests.support.interruptions import Line, interrupted, lines_of


class Interruptions(Rehearsal):
    """Interruptions of one scenario, each on a fresh copy of the cache."""

    @cached_property
    def lines(self) -> list[Line]:
        """The lines that the call runs."""
        run = self.copy()
        lines = lines_of(lambda: self.scenario.call(run))
        self.after_call = run
        self.at, self.rows = run.at, list(run.rows)
        self.ended = contents(run)
        self.expected = self.scenario.after(run)
        return lines

    def at_line(self, number: int, again: int | None = None) -> Line | None:
        """Interrupt the call before its line `number`; with `again`, also the next call before its line `again`."""
        assert self.lines
        run = self.copy()
        began = contents(run)
        place = interrupted(lambda: self.scenario.call(run), number)
        if place is None:
            return None
        what = f"{place[0]}:{place[1]}"
        if again is not None:
            second = interrupted(run.cache.check_integrity, again)
            what += " and then " + ("nothing" if second is None else f"{second[0]}:{second[1]}")
        if not self.from_model and self.scenario.forward:
            run.cache.roll_back()  # it is not told how a forward ended
        run.cache.check_integrity()
        length = run.cache.get_seq_length()
        run.cache.check_integrity()
        now = contents(run)
        assert now[0] == length, f"says {length} tokens, then {now[0]}, after {what}"
        if self.scenario.recodes and now[:3] == began[:3]:  # pages that are int8 stay so
            now = began
        if same(now, self.ended):
            run.at, run.rows = self.at, list(self.rows)
        else:
            assert same(now, began), f"neither before nor after the call, interrupted before {what}"
            run.at, run.rows = self.base.at, list(self.base.rows)
            self.scenario.call(run)
        run.cache.check_integrity()
        after = self.scenario.after(run)
        if isinstance(after, Tensor):
            torch.testing.assert_close(
                after, self.expected, rtol=0, atol=self.tolerance, msg=lambda text: f"tokens after {what}: {text}"
            )
        run.cache.check_integrity()
        return place


def contents(run: Run) -> list[Any]:
    """What a user sees of a cache. Copies: later forwards write into the states of linear attention."""
    cache = run.cache
    length, stats = cache.get_seq_length(), cache.stats()
    found: list[Any] = [length, stats.tokens, stats.sequences]
    for layer in cache.layers:
        for name in ("keys", "values", "conv_states", "recurrent_states"):
            held = getattr(layer, name, None)
            found += list(held.values()) if isinstance(held, dict) else [held]
    return [each.clone() if isinstance(each, Tensor) else each for each in found]


def same(ours: list[Any], theirs: list[Any]) -> bool:
    """Whether two caches look the same."""
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(ours, theirs, strict=True)
    )
