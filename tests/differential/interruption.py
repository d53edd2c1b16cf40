"""Ctrl-C at any line of the package.

    with Interruption(at=1234) as interruption:     KeyboardInterrupt where the 1,234th line of spin_hf would run
        call()
    interruption.place                              "layer.py:87 append", or "" where the block has fewer lines

Python runs a signal's handler between two bytecodes, so a line's beginning stands for all of them. What the garbage collector
runs at any time is kept out, so that the same seed stops at the same line.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import spin_hf

PACKAGE = str(Path(spin_hf.__file__).parent)


class Interruption:
    """See the module's head. Without `at` lines are counted only."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.lines = 0
        self.place = ""

    def __enter__(self) -> Interruption:
        gc.disable()
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.settrace(self._before)
        gc.enable()

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                code = frame.f_code
                self.place = f"{Path(code.co_filename).relative_to(PACKAGE)}:{frame.f_lineno} {code.co_name}"
                raise KeyboardInterrupt(self.place)
        return self._line
