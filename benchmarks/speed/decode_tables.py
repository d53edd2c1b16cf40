"""Tables of the results of `decode.py`: `python -m benchmarks.speed.decode_tables [results.json ...]`.

A time of SpinCache is that of every run which has it, from the fastest to the slowest; another cache's is of the newest run
which has it, and the factor behind it compares it with SpinCache of the same run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.common.record import RESULTS, newest

RIVALS = {
    "default": "`SpinCache(model)`",
    "spin eager": "`shadowkv`, eager",
    "dynamic": "`DynamicCache`",
    "offloaded": "`DynamicCache(offloading=True)`",
    "static": "`StaticCache`, compiled",
    "dense graph": "dense attention in a CUDA graph",
    "floor": "no attention at all",
}
"""Other rows of the results, and what to call them beside the rows of `SpinCache`, which selects at every length there."""
NAMES = {"llama-8b": "Llama-3.1-8B shape", "qwen3-0.6b": "Qwen3-0.6B shape"}


def row(*cells: str) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def ms(value: float) -> str:
    """Milliseconds with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def contexts(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """Contexts and caps that SpinCache was measured at, in order."""
    found = {(row["tokens"], row["gpu_memory"]) for row in rows if row.get("overlap") == "replayed"}
    return sorted(found, key=lambda pair: (pair[0], pair[1] != "auto", pair[1]))


def label(tokens: int, gpu_memory: str) -> str:
    """`128K`, or `128K, gpu_memory="4GiB"`."""
    return f"{tokens >> 10}K" + ("" if gpu_memory == "auto" else f', `gpu_memory="{gpu_memory}"`')


def rival_cell(rows: list[dict[str, Any]], tokens: int, name: str) -> str:
    """A rival's time, and how many times that of SpinCache in the same run it is."""
    found = newest(rows, tokens=tokens, cache=name)
    if found is None:
        return ""
    if not found["tpot_ms"]:
        return "does not fit"
    ours = newest(rows, tokens=tokens, cache="spin", overlap="replayed", gpu_memory="auto", run=found["run"])
    compared = ours is not None and ours["tpot_ms"] and not name.startswith(("spin", "default"))
    factor = f" ({found['tpot_ms'] / ours['tpot_ms']:.1f}×)" if ours is not None and compared else ""
    return ms(found["tpot_ms"]) + factor


def times(results: list[dict[str, Any]]) -> list[str]:
    """Milliseconds per token of every cache, at every context."""
    lines = [
        row("model, context", "`SpinCache(model, dense_below=0)`", *RIVALS.values()),
        "| --- " * (len(RIVALS) + 2) + "|",
    ]
    for result in results:
        rows, title = result["rows"], NAMES[result["shape"]] + ", "
        for tokens, cap in contexts(rows):
            wanted = {"tokens": tokens, "cache": "spin", "overlap": "replayed", "gpu_memory": cap}
            ours = sorted(r["tpot_ms"] for r in rows if r["tpot_ms"] and all(r.get(k) == v for k, v in wanted.items()))
            rivals = [rival_cell(rows, tokens, name) if cap == "auto" else "" for name in RIVALS]
            own = f"**{' to '.join(dict.fromkeys(map(ms, (ours[0], ours[-1]))))}**" if ours else "does not fit"
            lines.append(row(title + label(tokens, cap), own, *rivals))
            title = ""
    return lines


def overlaps(results: list[dict[str, Any]]) -> list[str]:
    """SpinCache at the lowest, the replayed and the highest overlap: time, loads and hit rate."""
    kinds = ("lowest", "replayed", "highest")
    lines = [row("model, context", *kinds), "| --- " * 4 + "|"]
    for result in results:
        title = NAMES[result["shape"]] + ", "
        for tokens, cap in contexts(result["rows"]):
            cells = []
            for kind in kinds:
                found = newest(result["rows"], tokens=tokens, cache="spin", overlap=kind, gpu_memory=cap)
                if found is None or not found["tpot_ms"]:
                    cells.append("")
                    continue
                cell = f"{found['overlap_at_1']:.0%}: {ms(found['tpot_ms'])} ms"
                if found["cpu_gib"]:
                    cell += f", {found['loads_mib_per_token']:.0f} MiB loaded, {found['hit_rate']:.1%} hits"
                cells.append(cell)
            lines.append(row(title + label(tokens, cap), *cells))
            title = ""
    return lines


def kernels(results: list[dict[str, Any]]) -> list[str]:
    """Microseconds a layer of each kernel, and the rates that they reach."""
    found = [(result, entry) for result in results for entry in result.get("kernels", [])]
    latest = [
        (result, entry) for result, entry in found
        if entry is newest(result["kernels"], tokens=entry["tokens"], gpu_memory=entry["gpu_memory"])
    ]  # fmt: skip
    names = sorted({name for _, entry in latest for name in entry["us_per_layer"]})
    heads = [name.removesuffix("_kernel") for name in names]
    lines = [row("model, context", *heads, "sum, µs", "summaries, GB/s", "attended, GB/s", "loaded, MiB a layer")]
    lines.append("| --- " * (len(names) + 5) + "|")
    for result, entry in latest:
        took, rate = entry["us_per_layer"], entry["gb_s"]
        lines.append(row(
            f"{NAMES[result['shape']]}, {label(entry['tokens'], entry['gpu_memory'])}",
            *(f"{took[name]:.1f}" if name in took else "" for name in names), f"**{entry['spin_us_per_layer']:.1f}**",
            *(f"{rate[kind]:,.0f}" if kind in rate else "" for kind in ("score", "attend")),
            f"{entry['bytes_per_layer']['loaded'] / 2**20:.2f}",
        ))  # fmt: skip
    return lines


def memory(results: list[dict[str, Any]]) -> list[str]:
    """GiB of GPU memory beside the weights at most, host memory, and seconds of the first call."""
    lines = [row("model, context", "cache", "GPU at most", "host", "first call"), "| --- " * 5 + "|"]
    for result in results:
        seen = {(entry["tokens"], entry["cache"], entry.get("gpu_memory") or "auto") for entry in result["rows"]}
        for tokens, cache, cap in sorted(seen):
            wanted = {"overlap": "replayed", "gpu_memory": cap} if cache == "spin" else {}
            entry = newest(result["rows"], tokens=tokens, cache=cache, **wanted)
            if entry is None or "peak_gpu_gib" not in entry:
                continue
            host = entry["cpu_gib"] if cache == "spin" else entry["torch_pinned_gib"]
            first = f"{entry['first_call_s']:.1f} s" if "first_call_s" in entry else ""
            name = f"{NAMES[result['shape']]}, {label(tokens, cap)}"
            lines.append(row(name, cache, f"{entry['peak_gpu_gib']:.1f} GiB", f"{host:.1f} GiB", first))
    return lines


def main() -> None:
    """Print all tables of the results that there are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, nargs="*", default=[RESULTS / f"decode-{shape}.json" for shape in NAMES])
    results = [json.loads(file.read_text()) for file in parser.parse_args().results if file.exists()]
    for title, table in (
        ("Milliseconds per token", times), ("Overlap of selections from step to step", overlaps),
        ("Kernels, µs per layer", kernels), ("Memory and first call", memory),
    ):  # fmt: skip
        print(f"\n{title}\n\n" + "\n".join(table(results)))


if __name__ == "__main__":
    main()
