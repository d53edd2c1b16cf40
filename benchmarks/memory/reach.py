"""How long a context one GPU serves under a cap on its memory: `python -m benchmarks.memory.reach`.

    --tokens 655360 524288 ...    contexts of one sequence, in the order of importance; 0 is the longest that host memory holds
    --gpu-memory 8GiB             cap of SpinCache, the same for all contexts
    --host-memory, --seconds, --missing, --plan, --source, --output    as for `throughput.py`

Keys and values lie in host memory, random ones; SpinCache(model) decodes under `generate`, captured, at the replayed overlap,
with a warm buffer. Beside its time per token, each row says what the allocator of torch saw:

    held     bytes allocated beside the weights between two calls of `generate`: pages frames, summaries, tables, scratch
    peak     the most beside the weights while tokens were generated, with the model's activations and ids
    in all   the most with the weights, from before the cache was made; `reserved` what torch took from the driver for it

`reserve_s` is what page-locking the host memory, with page frames and summaries, took, `fill_s` what writing the tokens took.
`targets` in the file compares the newest figures with the targets. Writes `benchmarks/results/reach-<shape>.json`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import campaign, host
from benchmarks.common.campaign import Bench
from benchmarks.common.record import Record, newest
from benchmarks.common.shapes import SHAPES
from benchmarks.speed.batch_rows import EXTRA, METHOD, Filled, guess_spread
from benchmarks.speed.throughput import planned, refused, sequence_bytes
from spin_hf.config import parse_bytes

LONGEST = 0
TOKENS = [655360, LONGEST, 524288, 262144, 131072]
MOST_TOKENS = (1 << 20) - EXTRA
"""The longest context that the shapes allow."""
STEP_TOKENS = 32768
TARGET_TOKENS, TARGET_TPOT_MS, TARGET_IN_ALL_GIB, TARGET_OVER_CAP = 655360, 12.0, 30.0, 0.02
PROCESS_BYTES = 4 << 30
"""Host memory that the process will hold beside keys and values."""


@dataclass(frozen=True)
class Task:
    """One context.

    Attributes:
        tokens: of it, estimated if it is the longest.
        longest: whether it is to be as long as host memory allows.
    """

    tokens: int
    gpu_memory: str
    longest: bool = False

    @property
    def label(self) -> str:
        """What to call it."""
        return f"{self.tokens >> 10}K {self.gpu_memory}" + (" (the longest)" if self.longest else "")

    @property
    def seconds(self) -> float:
        """About how long it takes with the Llama-3.1-8B shape on one H100: memory at 4 GiB a second, then 400 steps."""
        return 11 + 0.25 * self.tokens / 8192

    row_seconds = seconds

    def left(self, record: Record) -> Task | None:
        """Itself, if no run has measured it."""
        wanted = {"longest": True} if self.longest else {"tokens": self.tokens}
        return self if newest(record.rows, gpu_memory=self.gpu_memory, **wanted) is None else None


def longest_in(config: Any, room: int) -> int:
    """Tokens of one sequence that so many bytes hold, in whole steps."""
    most = min(room // sequence_bytes(config, 1) - EXTRA, MOST_TOKENS)
    return max(0, most // STEP_TOKENS * STEP_TOKENS)


def plan(config: Any, contexts: list[int], gpu_memory: str, room: int) -> list[Task]:
    """All tasks, the most important ones first.

    Args:
        room: bytes of keys and values that host memory holds.
    """
    tasks = []
    for tokens in contexts:
        found = longest_in(config, room - PROCESS_BYTES) if tokens == LONGEST else tokens
        if found:
            tasks.append(Task(found, gpu_memory, tokens == LONGEST))
    return tasks


def rows_of(task: Task, bench: Bench) -> Iterator[dict[str, Any]]:
    """The row of a context."""
    tokens = task.tokens
    if task.longest:
        tokens = min(tokens, longest_in(bench.model.config, bench.room()))
    about = {"tokens": tokens, "gpu_memory": task.gpu_memory, "longest": task.longest}
    made = planned(bench, tokens, 1, gpu_memory=task.gpu_memory)
    if not made.fits:
        yield {**about, **refused("spin", 1, made)}
        return
    cap = parse_bytes("gpu_memory", task.gpu_memory)
    assert cap is not None
    allocated = Allocated(bench.weights)
    filled = Filled(
        bench.model, tokens, 1, budget=bench.budget, gpu_memory=task.gpu_memory, cpu_memory=bench.cpu_memory()
    )
    spread = filled.settle(guess_spread(bench.record, tokens))
    allocated.note("fill")
    row = filled.row(bench.weights)
    allocated.note("generate")
    yield {"cache": "spin", **about, "spread": spread, **row, **allocated.row(cap)}


class Allocated:
    """What torch's allocator saw from here on.

    Args:
        weights: bytes of the model.
    """

    def __init__(self, weights: int) -> None:
        self.weights, self.most = weights, {"fill": 0, "generate": 0}
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.reserved = 0

    def note(self, name: str) -> None:
        """Keep the peak of a part, and begin the next one."""
        self.most[name] = torch.cuda.max_memory_allocated()
        self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def row(self, cap: int) -> dict[str, float]:
        """GiB held beside the weights now, at most, and in all, and by what share that is over the cap."""
        held, peak = torch.cuda.memory_allocated() - self.weights, self.most["generate"] - self.weights
        return {
            "cap_gib": round(cap / 2**30, 3), "held_gib": round(held / 2**30, 3), "peak_gib": round(peak / 2**30, 3),
            "fill_peak_gib": round((self.most["fill"] - self.weights) / 2**30, 3),
            "held_over_cap": round(held / cap - 1, 4), "peak_over_cap": round(peak / cap - 1, 4),
            "in_all_gib": round(max(self.most.values()) / 2**30, 2), "reserved_gib": round(self.reserved / 2**30, 2),
        }  # fmt: skip


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest figures beside their targets."""
    made = []
    row = newest(rows, tokens=TARGET_TOKENS, longest=False)
    if row is not None and row["tpot_ms"]:
        for name, target in (("tpot_ms", TARGET_TPOT_MS), ("in_all_gib", TARGET_IN_ALL_GIB)):
            made.append({"tokens": row["tokens"], "name": name, "value": row[name], "target": target})
    for tokens in sorted({row["tokens"] for row in rows}):
        row = newest(rows, tokens=tokens)
        if row is not None and row["tpot_ms"]:
            made.append(
                {"tokens": tokens, "name": "held_over_cap", "value": row["held_over_cap"], "target": TARGET_OVER_CAP}
            )
    return [{**entry, "met": entry["value"] <= entry["target"]} for entry in made]


def write_targets(record: Record) -> None:
    """Bring the targets in the file up to its rows."""
    record.made["targets"] = targets(record.rows)
    record.write()


def line(row: dict[str, Any]) -> str:
    """What is printed of a row."""
    wanted = ("tpot_ms", "spread_ms", "overlap_at_1", "hit_rate", "loads_mib_per_token", "page_frames", "cpu_gib", "held_gib",
              "held_over_cap", "peak_gib", "peak_over_cap", "fill_peak_gib", "in_all_gib", "reserved_gib", "rss_gib",
              "reserve_s", "fill_s", "first_call_s", "captured", "why", "failed")  # fmt: skip
    shown = [f"{row['tokens'] >> 10}K", str(row.get("gpu_memory", "")), "longest" if row.get("longest") else ""]
    return " ".join([part for part in shown if part] + [f"{key}={row[key]}" for key in wanted if key in row])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = campaign.parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="0: the longest that host memory holds")
    parser.add_argument("--gpu-memory", default="8GiB")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and write the results, and print the targets."""
    started, options = time.perf_counter(), parse()
    common = campaign.about(options.shape, options.budget, method=METHOD, batch=1)
    record = campaign.open_record("memory.reach", f"reach-{options.shape}.json", common, options)
    tasks = plan(SHAPES[options.shape], options.tokens, options.gpu_memory, host.room(options.host_memory))
    tasks = [left for task in tasks if (left := task.left(record)) is not None] if options.missing else tasks
    campaign.run("memory.reach", options, record, tasks, rows_of, line, started, write_targets)
    for entry in targets(record.rows):
        met = "met" if entry["met"] else "missed"
        print(f"{entry['tokens'] >> 10}K {entry['name']}: {entry['value']:g}, target {entry['target']:g}: {met}")


if __name__ == "__main__":
    main()
