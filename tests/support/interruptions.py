"""Ctrl-C at any line of the package: raises KeyboardInterrupt as a chosen line is about to run.

    with Interruption(at=1234) as interruption:     raises before line number 1,234 that runs in the block, counted from 0
        call()
    interruption.lines                              the lines that ran, in order, as (file, line)
    interruption.place                              the line that was interrupted; None where the block has fewer lines

    lines_of(call)         the lines that a call runs
    interrupted(call, n)   the call, interrupted before its line number n

Python runs a signal's handler between two bytecodes, so the beginning of a line stands for all of them. The garbage collector
is off meanwhile: it would run finalizers at any line, and the same number would not be the same line again. Lines of kernels
that Triton interprets do not count: on a GPU Python does not run them. Nor does the end of a `with` block: Python handles no
signal there before `__exit__` is called, and a lock would be held for ever.
"""

from __future__ import annotations

import dis
import functools
import gc
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

import spin_hf

PACKAGE = str(Path(spin_hf.__file__).parent) + "/"
Line = tuple[str, int]


class Interruption:
    """See the module's head. Without `at` lines are recorded only."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.lines = at, list[Line]()
        self.place: Line | None = None

    def __enter__(self) -> Interruption:
        self._collects, self._before = gc.isenabled(), sys.gettrace()
        gc.disable()
        sys.settrace(self._call)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.settrace(self._before)
        if self._collects:
            gc.enable()

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        counts = code.co_filename.startswith(PACKAGE) and not code.co_name.endswith("_kernel")
        return self._line if counts and self.place is None else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and self.place is None and frame.f_lasti not in _ends_of_with(frame.f_code):
            line = frame.f_code.co_filename.removeprefix(PACKAGE), frame.f_lineno
            self.lines.append(line)
            if len(self.lines) - 1 == self.at:
                self.place = line
                raise KeyboardInterrupt
        return self._line


@functools.cache
def _ends_of_with(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions with which `with` blocks begin to end, with an exception or without."""
    found, names = list(dis.get_instructions(code)), {"POP_BLOCK", "PUSH_EXC_INFO"}
    ends = set[int]()
    for number, each in enumerate(found):
        following = found[number + (each.opname in names) : number + 4]
        plain = [one.opname for one in following[:3]] in (["LOAD_CONST"] * 3, ["LOAD_CONST", "DUP_TOP", "DUP_TOP"])
        calls_exit = plain and all(one.argval is None for one in following if one.opname == "LOAD_CONST")
        if calls_exit or (following and following[0].opname == "WITH_EXCEPT_START"):
            ends.add(each.offset)
    return frozenset(ends)


def lines_of(call: Callable[[], Any]) -> list[Line]:
    """The lines that `call` runs."""
    with Interruption() as recorded:
        call()
    return recorded.lines


def interrupted(call: Callable[[], Any], number: int) -> Line | None:
    """Run `call` and interrupt it before its line `number`; returns that line, or None where it runs fewer."""
    with Interruption(number) as interruption:
        try:
            call()
        except KeyboardInterrupt as error:
            error.__traceback__ = None
    return interruption.place


def every_place(lines: list[Line]) -> list[int]:
    """Numbers of the first and the last time that each line runs."""
    first: dict[Line, int] = {}
    last: dict[Line, int] = {}
    for number, line in enumerate(lines):
        first.setdefault(line, number)
        last[line] = number
    return sorted({*first.values(), *last.values()})


def some_places(lines: list[Line], count: int, generator: random.Random) -> list[int]:
    """`count` numbers of lines at random: all lines are equally likely, however often they run."""
    held: dict[Line, list[int]] = {}
    for number, line in enumerate(lines):
        held.setdefault(line, []).append(number)
    return [generator.choice(held[line]) for line in generator.choices(sorted(held), k=count)]
