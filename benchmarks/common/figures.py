"""What the figures have in common (needs matplotlib): SVG that is the same for the same results, its heading, its command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.common.record import RESULTS

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "spin_hf"  # the same file for the same figures
from matplotlib import pyplot  # noqa: E402

__all__ = ["heading", "of_one_file", "pyplot", "save"]


def heading(result: dict[str, Any]) -> str:
    """Of a figure of one results file."""
    return f"{result['gpu']}, {result['shape']}, {result['dtype']}, budget {result['budget_tokens']} tokens"


def save(figure: Any, target: Path) -> None:
    """Write a figure without the date, and let go of it."""
    metadata: dict[str, Any] = {"Date": None}
    figure.savefig(target, metadata=metadata)
    pyplot.close(figure)


def of_one_file(draw: Callable[[dict[str, Any], Path], None], description: str | None, default: str) -> None:
    """The command line of a figure of one results file, which is drawn beside it."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS / default)
    source: Path = parser.parse_args().results
    draw(json.loads(source.read_text()), source.with_suffix(".svg"))
