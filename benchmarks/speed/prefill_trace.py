"""Where the time of a long prompt goes: `python -m benchmarks.speed.prefill_trace`.

    --shape llama-8b      random weights, bf16, one sequence, `generate`
    --tokens 131072       the prompt
    --ways spin ...       rows of `prefill.WAYS`
    --output FILE         default: benchmarks/results/h200/prefill-trace-<shape>.json

    compute stream   | k k k k   k k k k k  k |        busy: time under kernels and copies; idle: the gaps between them
    copy stream        | load | load |                 busy; hidden: the part beside a busy compute stream

A gap is named by the operations before and behind it, and by the call of the CUDA runtime that fills most of it, if one does.
The profiler itself costs the host time, so gaps are upper bounds; `prefill.py` measures the time of a prompt.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.record import RESULTS
from benchmarks.common.rows_file import Rows, command_line
from benchmarks.common.shapes import SHAPES, build
from benchmarks.common.timing import free
from benchmarks.speed.prefill import WAYS, about, once, prompt

TOP = 16
"""Kernels, gaps and host calls listed."""
LONG_GAP = 20_000
"""Nanoseconds from which a gap is listed by name."""
NEARBY = 2000
"""Calls of the host that are looked at for one gap."""

Span = tuple[int, int, str]
"""Start and stop in nanoseconds, and name."""


def joined(spans: list[Span]) -> list[tuple[int, int]]:
    """The union of spans, as disjoint ranges in order."""
    ranges: list[tuple[int, int]] = []
    for start, stop, _ in sorted(spans):
        if ranges and start <= ranges[-1][1]:
            ranges[-1] = ranges[-1][0], max(stop, ranges[-1][1])
        else:
            ranges.append((start, stop))
    return ranges


def length(ranges: list[tuple[int, int]]) -> int:
    """Nanoseconds of disjoint ranges."""
    return sum(stop - start for start, stop in ranges)


def common(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> int:
    """Nanoseconds in both of two lists of disjoint ranges in order."""
    total = i = j = 0
    while i < len(one) and j < len(other):
        total += max(0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return total


def gaps(spans: list[Span], host: list[Span]) -> dict[str, tuple[int, int]]:
    """Gaps longer than LONG_GAP: names before and behind, and of a call on the host -> how many, and nanoseconds in all."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    calls, at = sorted(host), 0
    stop, before = None, ""
    for first, last, name in sorted(spans):
        if stop is not None and first - stop > LONG_GAP:
            while at < len(calls) and calls[at][1] < stop:
                at += 1
            beside = [call for call in calls[at : at + NEARBY] if call[0] < first]
            call = max(beside, key=lambda each: min(each[1], first) - max(each[0], stop), default=(0, 0, ""))
            fills = min(call[1], first) - max(call[0], stop) > (first - stop) // 2
            entry = found[f"{before} -> {name}" + (f" ({call[2]})" if fills else "")]
            entry[0] += 1
            entry[1] += first - stop
        if stop is None or last > stop:
            stop, before = last, name
    return {name: (count, total) for name, (count, total) in found.items()}


def sums(spans: list[Span]) -> dict[str, tuple[int, int]]:
    """Name -> how many, and nanoseconds in all."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for start, stop, name in spans:
        found[name][0] += 1
        found[name][1] += stop - start
    return {name: (count, total) for name, (count, total) in found.items()}


def largest(found: dict[str, tuple[int, int]]) -> dict[str, list[float]]:
    """The TOP entries: name -> [how many, milliseconds in all]."""
    most = sorted(found.items(), key=lambda each: -each[1][1])[:TOP]
    return {name: [count, round(total / 1e6, 2)] for name, (count, total) in most}


def summary(streams: dict[int, list[Span]], host: list[Span]) -> dict[str, Any]:
    """Busy, idle and hidden time of a trace.

    Args:
        streams: operations of each stream.
        host: calls of the CUDA runtime.
    """
    compute = max(streams, key=lambda each: len(streams[each]))
    busy = joined(streams[compute])
    other = joined([span for stream, spans in streams.items() if stream != compute for span in spans])
    return {
        "span_ms": round((busy[-1][1] - busy[0][0]) / 1e6, 1),
        "compute_busy_ms": round(length(busy) / 1e6, 1),
        "copies_busy_ms": round(length(other) / 1e6, 1),
        "copies_hidden_ms": round(common(busy, other) / 1e6, 1),
        "kernels": largest(sums(streams[compute])),
        "copies": largest(sums([s for stream, spans in streams.items() if stream != compute for s in spans])),
        "gaps": largest(gaps(streams[compute], host)),
        "host_calls": largest(sums(host)),
    }


def trace(model: Any, num_tokens: int, way: str) -> dict[str, Any]:
    """One row of the results."""
    ids = prompt(model, num_tokens)
    free()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        seconds = once(model, ids, way, 1)
    streams: dict[int, list[Span]] = defaultdict(list)
    host: list[Span] = []
    for event in profiled.profiler.kineto_results.events():
        span = event.start_ns(), event.start_ns() + event.duration_ns(), event.name()[:60]
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            streams[event.device_resource_id()].append(span)
        elif event.name().startswith("cu"):
            host.append(span)
    return {"tokens": num_tokens, "way": way, "seconds": round(seconds, 3), **summary(streams, host)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["spin", "shadowkv 2GiB"])
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    output = given.output or RESULTS / "h200" / f"prefill-trace-{given.shape}.json"
    command = command_line("speed.prefill_trace", None).replace(f" --output {given.output}", "")
    rows = Rows(output, about(given.shape), command)
    model = build(given.shape)
    for way in given.ways:
        once(model, prompt(model, 20000), way, 2)
        for tokens in given.tokens:
            row = trace(model, tokens, way)
            rows.put(f"{way}, {tokens}", row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
