"""Hook that reports kernel compilation. A higher layer sets the report, as kernels do not import transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

Report = Callable[[Sequence["Future[Any]"]], object]


def _silent(compiles: Sequence[Future[Any]]) -> None:
    """Report nothing."""


_report: Report = _silent


def report_by(report: Report) -> None:
    """Set the report. It is called with the running compiles, on the thread that waits for them."""
    global _report
    _report = report


def report(compiles: Sequence[Future[Any]]) -> None:
    """Report `compiles`, one future per kernel. May return before they are done."""
    _report(compiles)
