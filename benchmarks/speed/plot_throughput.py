"""Tokens a second against the number of sequences, from the results of `throughput.py`:
`python -m benchmarks.speed.plot_throughput`.

Needs matplotlib. Writes `benchmarks/results/throughput-<shape>.svg` beside the results that it is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import figures
from benchmarks.speed.batch_tables import latest

CURVES = {
    "spin": ("SpinCache(model)", "o-", "C0"),
    "spin ragged": ("the same, of unequal lengths", "o", "C4"),
    "dense graph": ("dense attention in a CUDA graph", "s--", "C1"),
    "dynamic": ("DynamicCache", "^:", "C3"),
}
"""What to call the rows, and how to draw them."""


def draw(result: dict[str, Any], target: Path) -> None:
    """Draw rate over batch, a panel for each context, both axes logarithmic; what does not fit has no point."""
    rows = [row for row in latest(result, "tokens", "cache", "batch") if row["tpot_ms"]]
    contexts = sorted({row["tokens"] for row in rows}, reverse=True)
    figure, panels = figures.pyplot.subplots(
        1, len(contexts), figsize=(4.2 * len(contexts), 3.6), squeeze=False, sharey=True
    )
    for tokens, axes in zip(contexts, panels[0], strict=True):
        for cache, (label, style, color) in CURVES.items():
            points = [
                (row["batch"], row["tokens_per_s"]) for row in rows if (row["tokens"], row["cache"]) == (tokens, cache)
            ]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), style, label=label, color=color, markersize=5)
        batches = sorted({row["batch"] for row in rows if row["tokens"] == tokens})
        shown = [
            batch for i, batch in enumerate(batches) if i == 0 or batch >= 1.25 * batches[i - 1] or batch == batches[-1]
        ]
        axes.set(xscale="log", yscale="log", xlabel="sequences", title=f"{tokens >> 10}K tokens each")
        axes.set_xticks(shown, [str(batch) for batch in shown])
        axes.minorticks_off()
        axes.grid(axis="y", color="0.9")
    low, high = panels[0][0].get_ylim()
    marks = [mark for power in range(6) for mark in (10**power, 3 * 10**power) if low <= mark <= high]
    panels[0][0].set_yticks(marks, [f"{mark:,}" for mark in marks])
    panels[0][0].set_ylabel("tokens a second")
    panels[0][0].legend(fontsize=7, loc="upper left")
    figure.suptitle(figures.heading(result), fontsize=9)
    figure.tight_layout()
    figures.save(figure, target)


if __name__ == "__main__":
    figures.of_one_file(draw, __doc__, "throughput-llama-8b.json")
