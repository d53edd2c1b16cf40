"""The figure of RULER's tasks: `python -m benchmarks.quality.plot_ruler [results.json ...]` (needs matplotlib).

A panel for each results file, a row for each task and their mean, a mark for each method and budget. Writes
`benchmarks/results/ruler.svg`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import figures
from benchmarks.common.record import RESULTS
from benchmarks.quality.quality_tables import task_means

STYLES = {
    "dense": ("|", "k", 13), "fitted, 1/16": ("o", "C0", 6), "fitted, 1/64": ("o", "C9", 4),
    "bisection, 1/64": ("*", "C2", 6), "shadowkv, 1/64": ("x", "C1", 5), "oracle, 1/64": (".", "0.5", 5),
}  # fmt: skip
"""Marker, colour and size of the cells that are drawn."""


def draw(results: list[dict[str, Any]], target: Path) -> None:
    """Draw all panels into `target`."""
    width = 3.2 * len(results) + 2.6
    figure, panels = figures.pyplot.subplots(1, len(results), figsize=(width, 3.8), squeeze=False, sharey=True)
    handles: dict[str, Any] = {}
    for axes, result in zip(panels[0], results, strict=True):
        means = task_means(result["rows"])
        tasks = list(means["dense"])
        for cell, (marker, color, size) in STYLES.items():
            if cell in means:
                values = [100 * means[cell][task] for task in tasks]
                (handles[cell],) = axes.plot(
                    values, range(len(tasks)), marker, color=color, markersize=size, clip_on=False, linestyle=""
                )
        axes.set_yticks(range(len(tasks)), tasks, fontsize=8)
        axes.set(xlim=(0, 100), ylim=(len(tasks) - 0.5, -0.5), xlabel="score")
        axes.grid(color="0.92")
        axes.set_title(f"{result['model']}, {result['tokens'] >> 10}K tokens", fontsize=9)
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="center right")
    figure.tight_layout(rect=(0, 0, 1 - 1.4 / width, 1))
    figures.save(figure, target)


def main() -> None:
    """Draw the figure of all results files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*", help="default: all of RULER")
    files = parser.parse_args().results or sorted(RESULTS.rglob("ruler-*.json"))
    draw([json.loads(file.read_text()) for file in files], RESULTS / "ruler.svg")


if __name__ == "__main__":
    main()
