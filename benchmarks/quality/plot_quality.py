"""The figure of quality against budget: `python -m benchmarks.quality.plot_quality [results.json ...]` (needs matplotlib).

A panel for each results file of `quality.py` (KL, logarithmic) and `retrieval.py` (mean score of the answers, dense attention
as a line). A method has one colour in all of them; `bisection` is taken from the files of its own
runs, `quality-bisection-*.json` of the same model and number of tokens. Writes `benchmarks/results/quality.svg`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common import figures
from benchmarks.common.record import RESULTS
from benchmarks.quality.quality_tables import found_results, has_rivals, kl_lines, score_lines

STYLES = {
    "bisection": ("*-", "k"), "shadowkv": ("o-", "C0"), "quest": ("s-", "C1"), "oracle": ("-", "0.5"), "window": (":", "0.5"),
    "kvpress snapkv": ("v--", "C2"), "kvpress snapkv8": ("^--", "C3"), "kvpress tova": ("d--", "C4"),
    "kvpress knorm": ("x--", "C5"), "kvpress decoding tova": ("D-.", "C4"), "kvpress decoding knorm": ("x-.", "C5"),
    "kvpress snapkv unseen": ("v:", "C2"),
}  # fmt: skip
"""How to draw a method; others (`shadowkv:model`, kvpress's StreamingLLM) lie on one of these."""


def draw(results: list[dict[str, Any]], target: Path, beside: list[dict[str, Any]] | None = None) -> None:
    """Draw all panels into `target`, with `bisection` as in the results `beside` of the same model and number of tokens."""
    figure, panels = figures.pyplot.subplots(1, len(results), figsize=(3.6 * len(results) + 1.6, 3.6), squeeze=False)
    handles: dict[str, Any] = {}
    for axes, result in zip(panels[0], results, strict=True):
        answers = "new_tokens" in result
        lines = score_lines(result["rows"]) if answers else kl_lines(result["rows"])
        for other in beside or []:
            same = result["model"].lower().startswith(other["model"].lower()) and other["tokens"] == result["tokens"]
            if same and not answers:
                lines["bisection"] = kl_lines(other["rows"])["bisection"]
        for method, (style, color) in STYLES.items():
            points = sorted(lines.get(method, {}).items(), reverse=True)
            if points:
                xs, ys = [1 / share for share, _ in points], [value for _, value in points]
                (handles[method],) = axes.plot(xs, ys, style, color=color, markersize=4)
        if answers:
            handles["dense"] = axes.axhline(lines.pop("dense")[1], color="k", linewidth=0.8)
            axes.set(ylim=(-0.03, 1.03), ylabel="answered")
        else:
            axes.set(yscale="log", ylabel="KL from dense, nats")
        shares = sorted({share for values in lines.values() for share in values}, reverse=True)
        axes.set(xscale="log", xlabel="budget, share of the context")
        axes.set_xticks([1 / share for share in shares], [f"1/{share}" for share in shares])
        axes.minorticks_off()
        axes.grid(axis="y", color="0.9")
        axes.set_title(f"{result['model']}, {result['tokens']:,} tokens", fontsize=8)
    figure.legend(handles.values(), handles.keys(), fontsize=7, loc="center right")
    figure.tight_layout(rect=(0, 0, 1 - 1.6 / (3.6 * len(results) + 1.6), 1))
    figures.save(figure, target)


def main() -> None:
    """Draw the figure of all results files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*", help="default: all files with results of kvpress")
    results = [json.loads(file.read_text()) for file in parser.parse_args().results]
    found = found_results()
    own = [result for file, result in found.items() if file.name.startswith("quality-bisection-")]
    draw(results or [result for result in found.values() if has_rivals(result)], RESULTS / "quality.svg", own)


if __name__ == "__main__":
    main()
