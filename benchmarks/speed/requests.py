"""Many requests on one GPU: loads of requests by several systems: `python -m benchmarks.speed.requests`.

    --loads burst-32k short    which loads                   --scale 0.25         of the number of requests
    --arrivals 60              seconds of Poisson arrivals   --part-seconds 120   most for one load of one system
    --method fitted            of SpinCache                  --systems ...        which systems
    --max-slowdown 4           of the loop, while requests arrive (default: none, prompts are read first)
    --gpu-memory 79            GiB to do with, as if the GPU had no more
    --seconds, --missing, --plan, --source, --output    as for `decode.py`

    burst-32k, burst-128k    64 requests of 32K and 16 of 128K at once, exponential outputs of 256 tokens on average
    poisson-50 ... -200      mixed prompts of 8K to 64K, arriving at 50, 80, 95 and 200 % of what dense batching can do
    short                    200 requests of up to 2K tokens
    questions                100 questions on a document of 64K tokens

    spin loop       `RequestLoop`                                    transformers       its own continuous batching
    spin static     `SpinCache` in static batches: one is measured, end to end is computed from it
    dense static    flash decoding in a CUDA graph, largest static batch: computed from measured prompts and steps
    dense joining   the same with requests that join and leave: computed likewise

`targets` compares SpinCache's loop with the others. Writes `benchmarks/results/requests-<shape>.json`.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.common import campaign
from benchmarks.common.campaign import Bench
from benchmarks.common.record import Record, newest
from benchmarks.speed import request_systems
from benchmarks.speed.overlap import set_spread
from benchmarks.speed.request_loads import (
    DOCUMENT,
    LOADS,
    POISSON,
    DenseTimes,
    best_static,
    capacity,
    figures,
    load,
    simulate,
)
from benchmarks.speed.throughput import limit_gpu_memory

SYSTEMS = ("spin loop", "dense static", "dense joining", "spin static", "transformers")
SPREAD = 0.2
"""Of the queries, so that steps select about as alike as a real model's (`overlap.py`)."""
STATIC_ONLY = ("burst-32k", "burst-128k")
WITHOUT_TRANSFORMERS = ("questions",)
PROMPT_TOKENS = {"burst-32k": 32768, "burst-128k": 131072, "short": 2048, "questions": DOCUMENT}
TARGETS: dict[str, list[tuple[str, str, float]]] = {
    "burst-32k": [("dense static", "tokens_per_s", 3.0), ("spin static", "full_tokens_per_s", 0.85)],
    "burst-128k": [("dense static", "tokens_per_s", 4.0)],
    "poisson-95": [("dense joining", "ttft_p50_s", 5.0), ("dense joining", "ttft_p95_s", 5.0)],
    "short": [("transformers", "tokens_per_s", 0.9)],
    "questions": [("dense static", "tokens_per_s", 10.0)],
}
"""Load -> rival, figure, and how many times better the loop's is to be."""
EIGHT = 8
"""Questions at a time, of the rival that shares no document."""


@dataclass(frozen=True)
class Task:
    """One load of one system."""

    load: str
    system: str
    scale: float
    arrivals: float
    part_seconds: float

    @property
    def tokens(self) -> int:
        """Of a prompt, about."""
        return PROMPT_TOKENS.get(self.load, 32768)

    @property
    def label(self) -> str:
        """What to call it."""
        return f"{self.load} {self.system}"

    @property
    def seconds(self) -> float:
        """About how long it takes."""
        if self.system.startswith("dense"):
            return 2.0  # beside the first, which measures
        prompts = {"burst-32k": 64 * 1.5, "burst-128k": 16 * 12.0, "short": 12.0, "questions": 20.0}
        alone = self.arrivals * 1.3 + 5 if self.load in POISSON else 5 + 1.5 * self.scale * prompts[self.load]
        return min(self.part_seconds, alone if self.system != "transformers" else 2 * alone)

    @property
    def row_seconds(self) -> float:
        """The same: it has one row."""
        return self.seconds

    def left(self, record: Record) -> Task | None:
        """Itself, unless the file has its row."""
        return None if newest(record.rows, load=self.load, cache=self.system) else self


def plan(options: argparse.Namespace) -> list[Task]:
    """All tasks: the loop and dense systems of each load first, then the other rivals."""
    made = [
        Task(name, system, options.scale, options.arrivals, options.part_seconds)
        for system in SYSTEMS for name in options.loads if system in options.systems
    ]  # fmt: skip
    kept = [
        task for task in made
        if not (task.system == "spin static" and task.load not in STATIC_ONLY)
        and not (task.system == "dense static" and task.load in POISSON)
        and not (task.system == "transformers" and task.load in WITHOUT_TRANSFORMERS)
    ]  # fmt: skip
    first = [task for task in kept if task.system not in SYSTEMS[3:]]
    return sorted(first, key=lambda task: options.loads.index(task.load)) + kept[len(first) :]


class Measured:
    """What is measured once for all tasks.

    Args:
        options: the command line.
        dense: times of dense attention; None to measure them when they are needed first.
        spread: what the model is set to before the first task, and then warmed up; None to leave it.
    """

    def __init__(
        self, options: argparse.Namespace, dense: DenseTimes | None = None, spread: float | None = None
    ) -> None:
        self.options, self._dense, self._spread = options, dense, spread

    def dense(self, bench: Bench) -> DenseTimes:
        """Times of dense attention."""
        if self._dense is None:
            self._dense = request_systems.dense_times(bench.model)
            bench.record.about_run(
                dense_times=asdict(self._dense), dense_requests_per_s=round(capacity(self._dense), 3)
            )
        return self._dense

    def rows_of(self, task: Task, bench: Bench) -> Iterator[dict[str, Any]]:
        """The row of a task."""
        options, model = self.options, bench.model
        if self._spread is not None:
            set_spread(model, self._spread)
            self._spread = None
            request_systems.warm_up(model, options.method, options.budget)
        needs_dense = task.load in POISSON or task.system.startswith("dense")
        dense = self.dense(bench) if needs_dense else None
        arrivals = load(task.load, task.scale, dense, task.arrivals)
        until = time.perf_counter() + task.part_seconds
        if task.system == "spin loop":
            slow = options.max_slowdown if task.load in POISSON else None
            row = request_systems.spin_loop(
                model, arrivals, options.method, options.budget, until, slow, max_rows=options.max_rows
            )
            row["max_slowdown"] = slow
        elif task.system == "transformers":
            row = request_systems.transformers_batching(model, arrivals, until)
        elif task.system == "spin static":
            batch = self._rows_of_the_loop(bench, task.load) or len(arrivals)
            row = request_systems.spin_static(model, arrivals, options.method, options.budget, batch)
            row |= figures(arrivals, simulate(arrivals, row.pop("times"), batch))
        else:
            assert dense is not None
            batch = best_static(arrivals, dense) if task.system == "dense static" else None
            batch = EIGHT if task.load == "questions" and batch else batch
            row = {
                "computed": True,
                **({"batch": batch} if batch else {}),
                **figures(arrivals, simulate(arrivals, dense, batch)),
            }
            if batch:
                row["full_tokens_per_s"] = round(batch / dense.step(batch * task.tokens), 1)
        yield {"load": task.load, "cache": task.system, "scale": task.scale, **row}

    @staticmethod
    def _rows_of_the_loop(bench: Bench, name: str) -> int | None:
        found = newest(bench.record.rows, load=name, cache="spin loop")
        return None if found is None else found.get("most_rows")


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times better the loop is than each rival with a target; both of one run, the newest that has both."""
    made = []
    for name, entries in TARGETS.items():
        for rival, figure, target in entries:
            for run in sorted({row["run"] for row in rows}, reverse=True):
                ours, theirs = (newest(rows, load=name, cache=system, run=run) for system in ("spin loop", rival))
                if ours is None or theirs is None or not ours.get(figure) or not theirs.get(figure):
                    continue
                ratio = ours[figure] / theirs[figure]
                ratio = round(1 / ratio if figure.startswith("ttft") else ratio, 2)
                made.append({
                    "load": name, "rival": rival, "figure": figure, "run": run, "ratio": ratio, "target": target,
                    "met": ratio >= target,
                })  # fmt: skip
                break
    return made


def write_targets(record: Record) -> None:
    """Bring the comparison in the file up to its rows."""
    record.made["targets"] = targets(record.rows)
    record.write()


def line(row: dict[str, Any]) -> str:
    """What is printed of a row."""
    left_out = {"load", "cache", "tokens", "run"}
    return " ".join([str(row.get("load")), row["cache"], *(f"{k}={v}" for k, v in row.items() if k not in left_out)])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = campaign.parser(__doc__)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of requests (default: 1)")
    parser.add_argument("--arrivals", type=float, default=60.0, help="seconds of Poisson arrivals")
    parser.add_argument("--part-seconds", type=float, default=150.0, help="most for one load of one system")
    parser.add_argument("--method", default="fitted", help="of SpinCache")
    parser.add_argument("--max-rows", type=int, default=64)
    parser.add_argument("--max-slowdown", type=float, help="of Poisson loads (default: none, prompts are read first)")
    parser.add_argument("--gpu-memory", type=float, help="GiB of the GPU to do with (default: all of it)")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and write the results, and print the comparison."""
    started, options = time.perf_counter(), parse()
    os.environ.setdefault(
        "PYTORCH_ALLOC_CONF", "expandable_segments:True"
    )  # else pages lie between activations: all systems
    limit = limit_gpu_memory(options.gpu_memory)
    common = campaign.about(options.shape, options.budget, method=options.method, scale=options.scale, **limit)
    record = campaign.open_record("speed.requests", f"requests-{options.shape}.json", common, options)
    tasks = plan(options)
    if options.missing:
        tasks = [left for task in tasks if (left := task.left(record)) is not None]
    measured = Measured(options, spread=SPREAD)
    campaign.run("speed.requests", options, record, tasks, measured.rows_of, line, started, write_targets)
    for entry in targets(record.rows):
        met = "met" if entry["met"] else "missed"
        print(
            f"{entry['load']} over {entry['rival']}, {entry['figure']}: {entry['ratio']} x, target {entry['target']:g} x: {met}"
        )


if __name__ == "__main__":
    main()
