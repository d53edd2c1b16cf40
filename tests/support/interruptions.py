"""Ctrl-C at any line: raises KeyboardInterrupt as a chosen line of the package is about to run.

    lines_of(call)         the lines of the package that a call runs, in order, as (file, line)
    interrupted(call, n)   the call, with KeyboardInterrupt before its n-th line; whether it got there

Lines of kernels that Triton interprets do not count: on a GPU Python does not run them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import spin_hf

PACKAGE = str(Path(spin_hf.__file__).parent) + "/"
Line = tuple[str, int]


def _counts(frame: FrameType) -> bool:
    name = frame.f_code.co_filename
    return name.startswith(PACKAGE) and not frame.f_code.co_name.endswith("_kernel")


class _Tracer:
    """Counts lines, and raises before one of them."""

    def __init__(self, stop_at: int | None) -> None:
        self.stop_at, self.lines = stop_at, list[Line]()
        self.raised = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if event == "call" and not self.raised and _counts(frame) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and not self.raised:
            self.lines.append((frame.f_code.co_filename.removeprefix(PACKAGE), frame.f_lineno))
            if len(self.lines) - 1 == self.stop_at:
                self.raised = True
                raise KeyboardInterrupt
        return self._line


def _traced(call: Callable[[], Any], tracer: _Tracer) -> Any:
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        return call()
    finally:
        sys.settrace(before)


def lines_of(call: Callable[[], Any]) -> list[Line]:
    """The lines that `call` runs."""
    tracer = _Tracer(None)
    _traced(call, tracer)
    return tracer.lines


def interrupted(call: Callable[[], Any], number: int) -> Line | None:
    """Run `call` and interrupt it before its line `number`; returns that line, or None where it runs fewer."""
    tracer = _Tracer(number)
    try:
        _traced(call, tracer)
    except KeyboardInterrupt as error:
        error.__traceback__ = None
    return tracer.lines[-1] if tracer.raised else None


def every_place(lines: list[Line]) -> list[int]:
    """Numbers of the first and the last time that each line runs."""
    first: dict[Line, int] = {}
    last: dict[Line, int] = {}
    for number, line in enumerate(lines):
        first.setdefault(line, number)
        last[line] = number
    return sorted({*first.values(), *last.values()})


def some_places(lines: list[Line], count: int, generator: random.Random) -> list[int]:
    """`count` numbers of lines at random: a line as likely as another, however often it runs."""
    held: dict[Line, list[int]] = {}
    for number, line in enumerate(lines):
        held.setdefault(line, []).append(number)
    return [generator.choice(held[line]) for line in generator.choices(sorted(held), k=count)]
