"""The figure of the README from the results of `decode.py`: `python benchmarks/plot.py` (needs matplotlib).

Writes `benchmarks/results/decode-llama-8b.svg`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "spin_hf"  # the same file for the same figures
from matplotlib import pyplot  # noqa: E402

RESULTS = Path(__file__).parent / "results"
CURVES = {
    "spin": ("SpinCache(model)", "o-"),
    "dense graph": ("dense attention in a CUDA graph", "s--"),
    "dynamic": ("DynamicCache", "^:"),
    "floor": ("no attention at all", "-"),
}
"""Rows of the results, and how to draw them."""


def main() -> None:
    """Draw time per token over the context, both axes logarithmic."""
    result = json.loads((RESULTS / "decode-llama-8b.json").read_text())
    figure, axes = pyplot.subplots(figsize=(7, 3.6))
    for name, (label, style) in CURVES.items():
        best: dict[int, float] = {}
        for row in result["rows"]:
            if row["cache"] == name and row["tpot_ms"] and row.get("gpu_memory", "auto") == "auto":
                best[row["tokens"]] = max(row["tpot_ms"], best.get(row["tokens"], 0.0))  # the slower of two embeddings
        axes.plot(list(best), list(best.values()), style, label=label, color="0.6" if name == "floor" else None)
    ticks = sorted({row["tokens"] for row in result["rows"]})
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="ms per token")
    axes.set_xticks(ticks, [f"{tokens >> 10}K" for tokens in ticks])
    axes.set_yticks([8, 16, 32, 64, 128], ["8", "16", "32", "64", "128"])
    axes.minorticks_off()
    axes.set_title(
        f"{result['gpu']}, {result['shape']}, {result['dtype']}, budget {result['budget_tokens']} tokens", fontsize=9
    )
    axes.legend(fontsize=8)
    figure.tight_layout()
    metadata: dict[str, Any] = {"Date": None}
    figure.savefig(RESULTS / "decode-llama-8b.svg", metadata=metadata)


if __name__ == "__main__":
    main()
