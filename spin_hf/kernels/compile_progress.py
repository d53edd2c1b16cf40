"""Who reports that kernels are being compiled. The report itself is set from above: kernels do not import transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

Report = Callable[[Sequence["Future[Any]"]], object]


def _silent(compiles: Sequence[Future[Any]]) -> None:
    """Report nothing."""


_report: Report = _silent


def report_by(report: Report) -> None:
    """Have `report` called with the compiles that are under way, on the thread that waits for them."""
    global _report
    _report = report


def report(compiles: Sequence[Future[Any]]) -> None:
    """Report `compiles`, one future a kernel. May return before they are done."""
    _report(compiles)
