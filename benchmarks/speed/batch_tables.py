"""Tables of batches, reach and buffers: `python -m benchmarks.speed.batch_tables [folder of results]`.

From the results of `throughput.py`, `reach.py`, `buffers.py` and `traces.py`, as far as they are there. Rates and times are
those of the newest run that has them; ratios are of two rows of one run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.record import RESULTS, newest
from benchmarks.speed.decode_tables import NAMES, ms, row

CACHES = {
    "spin": "`SpinCache(model)`", "spin ragged": "the same, a quarter of the context to all of it",
    "dense graph": "dense attention in a CUDA graph", "dynamic": "`DynamicCache`",
}  # fmt: skip
"""Rows of `throughput.py`, in the order of the table."""


def latest(result: dict[str, Any], *names: str) -> list[dict[str, Any]]:
    """The newest row of each combination of these values, sorted by them; a task that failed as a whole has none of them."""
    keys = {
        tuple(entry[name] for name in names)
        for entry in result["rows"]
        if all(entry.get(name) is not None for name in names)
    }
    found = [newest(result["rows"], **dict(zip(names, key, strict=True))) for key in keys]
    known = [entry for entry in found if entry is not None]
    return sorted(known, key=lambda entry: tuple(entry[name] for name in names))


def head(*cells: str) -> list[str]:
    """The first two lines of a table."""
    return [row(*cells), "| --- " * len(cells) + "|"]


def throughput(result: dict[str, Any]) -> list[str]:
    """Rate, time per step, traffic and memory of every cache and batch."""
    lines = head(
        "context", "cache", "sequences", "tokens/s", "ms per step", "hits", "MiB loaded per token", "GPU", "host"
    )
    rows = latest(result, "tokens", "cache", "batch")
    for tokens in sorted({entry["tokens"] for entry in rows}, reverse=True):
        for cache, name in CACHES.items():
            for entry in (entry for entry in rows if (entry["tokens"], entry["cache"]) == (tokens, cache)):
                lines.append(row(f"{tokens >> 10}K", name, str(entry["batch"]), *_cells(entry)))
    return lines


def _cells(entry: dict[str, Any]) -> list[str]:
    """Of a row of `throughput`, behind its batch."""
    if not entry["tpot_ms"]:
        return [_why(entry), "", "", "", "", ""]
    paged = bool(entry.get("page_frames"))
    return [
        f"**{entry['tokens_per_s']:,.0f}**" if entry["cache"] == "spin" else f"{entry['tokens_per_s']:,.0f}",
        ms(entry["tpot_ms"]), f"{entry['hit_rate']:.1%}" if paged else "",
        f"{entry['loads_mib_per_token']:.1f}" if paged else "", f"{entry['peak_gpu_gib']:.1f} GiB",
        f"{entry['cpu_gib']:.0f} GiB" if paged else "",
    ]  # fmt: skip


def _why(entry: dict[str, Any]) -> str:
    """Why there is no rate, in two words: the whole reason stands in the file."""
    if entry["why"] == "out of GPU memory":
        return "out of GPU memory"
    return "host memory" if "cpu_memory" in entry["why"] else "refused"


def ratios(result: dict[str, Any]) -> list[str]:
    """SpinCache's best rate over each rival's, and the targets."""
    lines = head("context", "over", "best of SpinCache", "best of the other", "ratio", "target")
    for entry in result.get("ratios", []):
        ours, theirs = (f"{entry[f'{who}_tokens_per_s']:,.0f} ({entry[f'{who}_batch']})" for who in ("spin", "rival"))
        ratio, met = f"**{entry['ratio']:.1f}×**", "" if entry["met"] else ", missed"
        lines.append(
            row(f"{entry['tokens'] >> 10}K", CACHES[entry["rival"]], ours, theirs, ratio, f"{entry['target']:g}×{met}")
        )
    return lines


def reach(result: dict[str, Any]) -> list[str]:
    """Time per token and memory against the context, under one cap."""
    lines = head(
        "context", "`gpu_memory`", "ms per token", "hits", "host", "held beside the weights", "over the cap", "in all",
        "to get memory", "to fill",
    )  # fmt: skip
    for entry in latest(result, "tokens", "gpu_memory"):
        name = f"{entry['tokens'] >> 10}K" + (" (the longest)" if entry["longest"] else "")
        cap = f'`"{entry["gpu_memory"]}"`'
        if not entry["tpot_ms"]:
            lines.append(row(name, cap, _why(entry), *[""] * 7))
            continue
        lines.append(row(
            name, cap, f"**{ms(entry['tpot_ms'])}**", f"{entry['hit_rate']:.1%}", f"{entry['cpu_gib']:.0f} GiB",
            f"{entry['held_gib']:.2f} GiB", f"{entry['held_over_cap']:+.1%}", f"{entry['in_all_gib']:.1f} GiB",
            f"{entry['reserve_s']:.1f} s", f"{entry['fill_s']:.1f} s",
        ))  # fmt: skip
    return lines


def buffers(result: dict[str, Any], traces: dict[str, Any]) -> list[str]:
    """Hit rate and time against the number of buffer pages, beside the hit rates of a real model's traces.

    Args:
        traces: the results of `traces.py`; {} for none.
    """
    lines = head(
        "buffer pages / a step's",
        "frames",
        "`gpu_memory`",
        "hits",
        "MiB loaded per token",
        "ms per token",
        "of SmolLM2's traces",
    )
    for entry in latest(result, "tokens", "batch", "multiple"):
        found = [each["buffers"].get(f"{entry['multiple']:g}") for each in traces.get("rows", {}).values()]
        rates = [each["bucketed_lru"]["hit_rate_with_mandatory"] for each in found if each is not None]
        traced = f"{min(rates):.1f} to {max(rates):.1f} %" if rates else ""
        name = f"{entry['multiple']:g}" + (f", {entry['batch']} sequences" if entry["batch"] > 1 else "")
        if not entry["tpot_ms"]:
            lines.append(row(name, "", "", _why(entry), "", "", traced))
            continue
        lines.append(row(
            name, f"{entry['page_frames']:,}", f"{entry['gpu_memory'] / 2**30:.2f} GiB", f"{entry['hit_rate']:.1%}",
            f"{entry['loads_mib_per_token']:.1f}", f"**{ms(entry['tpot_ms'])}**", traced,
        ))  # fmt: skip
    return lines


def traced(traces: dict[str, Any]) -> list[str]:
    """Hit rates of a real model's traces against the number of buffer pages: bucketed LRU, and what is lost to exact LRU."""
    multiples = next(iter(traces["rows"].values()))["buffers"]
    lines = head("budget, text", *(f"buffer {multiple}" for multiple in multiples))
    for name, entry in traces["rows"].items():
        cells = [
            f"{each['bucketed_lru']['hit_rate']:.1f} % ({each['bucketed_minus_exact_points']:+.2f})"
            for each in entry["buffers"].values()
        ]
        lines.append(row(name, *cells))
    return lines


def sections(folder: Path) -> dict[str, list[str]]:
    """The tables of what there is, by title."""

    def read(name: str) -> dict[str, Any]:
        file = folder / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else {}

    traces, made = read("traces"), {}
    tables: dict[str, tuple[tuple[str, Callable[[dict[str, Any]], list[str]]], ...]] = {
        "throughput": (("tokens a second", throughput), ("ratios", ratios)),
        "reach": (("reach", reach),),
        "buffers": (("buffer pages", lambda result: buffers(result, traces)),),
    }
    for shape, name in NAMES.items():
        for script, parts in tables.items():
            result = read(f"{script}-{shape}")
            made |= {f"{name}: {title}": table(result) for title, table in parts if result}
    if traces:
        made["Hit rates of SmolLM2's traces"] = traced(traces)
    return made


def main() -> None:
    """Print all tables of the results that there are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    for title, lines in sections(parser.parse_args().folder).items():
        print(f"\n{title}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
