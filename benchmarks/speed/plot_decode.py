"""Time per token over the context, drawn from the results of `decode.py`:
`python -m benchmarks.speed.plot_decode` (needs matplotlib).

Writes `benchmarks/results/decode-<shape>.svg` beside the results that it is given (`decode-llama-8b.json` unless said).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import figures
from benchmarks.common.record import newest

CURVES: dict[str, tuple[dict[str, str], str, str]] = {
    "SpinCache(model)": ({"cache": "default"}, "o-", "C0"),
    "selection at every length": ({"cache": "spin", "overlap": "replayed", "gpu_memory": "auto"}, "o-", "C9"),
    "dense attention in a CUDA graph": ({"cache": "dense graph"}, "s--", "C1"),
    "StaticCache, compiled": ({"cache": "static"}, "v--", "C2"),
    "DynamicCache": ({"cache": "dynamic"}, "^:", "C3"),
    "DynamicCache(offloading=True)": ({"cache": "offloaded"}, "d:", "C4"),
    "no attention at all": ({"cache": "floor"}, "-", "0.6"),
}
"""What to look for in the rows, and how to draw it."""


def draw(result: dict[str, Any], target: Path) -> None:
    """Draw time per token over the context, both axes logarithmic; what does not fit has no point."""
    figure, axes = figures.pyplot.subplots(figsize=(8.4, 3.8))
    ticks = sorted({row["tokens"] for row in result["rows"]})
    for label, (wanted, style, color) in CURVES.items():
        found = [(tokens, newest(result["rows"], tokens=tokens, **wanted)) for tokens in ticks]
        points = [(tokens, row["tpot_ms"]) for tokens, row in found if row is not None and row["tpot_ms"]]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, color=color, markersize=5)
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="ms per token")
    axes.set_xticks(ticks, [f"{tokens >> 10}K" for tokens in ticks])
    low, high = axes.get_ylim()
    marks = [mark for mark in (1 << power for power in range(11)) if low <= mark <= high]
    axes.set_yticks(marks, [str(mark) for mark in marks])
    axes.minorticks_off()
    axes.grid(axis="y", color="0.9")
    axes.set_title(figures.heading(result), fontsize=9)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figures.save(figure, target)


if __name__ == "__main__":
    figures.of_one_file(draw, __doc__, "decode-llama-8b.json")
