"""What buffer pages pay: time per token and hit rate against their number: `python -m benchmarks.memory.buffers`.

    --multiples 0 1 2 5 10     buffer pages, as multiples of the most pages of a step; these have page frames beside
    --tokens 131072            context            --batches 1          sequences
    --host-memory, --seconds, --missing, --plan, --source, --output    as for `throughput.py`

    page frames of each sequence and KV head = (1 + multiple) * most pages of a step
    gpu_memory = the least cap for which `spin_hf.plan` says so many page frames

Keys and values lie in host memory. SpinCache(model) decodes under `generate`, captured, at the overlap of a real model's
selections (`overlap.py`), with a warm buffer. `traces.py` gives the hit rates of the same multiples on a real model's traces,
which `batch_tables.py` prints beside these. Writes `benchmarks/results/buffers-<shape>.json`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import spin_hf
from benchmarks.common import campaign
from benchmarks.common.campaign import Bench
from benchmarks.common.record import Record, newest
from benchmarks.common.shapes import SHAPES
from benchmarks.common.timing import free
from benchmarks.speed.batch_rows import EXTRA, METHOD, Filled, guess_spread
from benchmarks.speed.throughput import planned, refused, sequence_bytes
from spin_hf import ShadowKV
from spin_hf.backends.zones import pages_of
from spin_hf.config import SpinOptions

MULTIPLES = [0, 1, 2, 5, 10]


@dataclass(frozen=True)
class Task:
    """One buffer.

    Attributes:
        tokens: of each sequence.
        multiple: buffer pages / most pages of a step.
    """

    tokens: int
    batch: int
    multiple: float

    @property
    def label(self) -> str:
        """What to call it."""
        return f"{self.tokens >> 10}K batch {self.batch} buffer {self.multiple:g}"

    @property
    def seconds(self) -> float:
        """About how long it takes with the Llama-3.1-8B shape on one H100."""
        share = self.tokens * self.batch / 131072
        return 5 + 2 * share + 0.4 * (9 + share * (1 + 3 / (1 + self.multiple)))

    row_seconds = seconds

    def left(self, record: Record) -> Task | None:
        """Itself, if no run has measured it."""
        found = newest(record.rows, tokens=self.tokens, batch=self.batch, multiple=self.multiple)
        return self if found is None else None


def step_pages(budget: int) -> int:
    """The most pages that a step reads of each KV head: sinks, recent window, and those that the budget buys."""
    options, page_size = SpinOptions(budget=budget), ShadowKV.page_size
    return (
        -(-budget // page_size)
        + pages_of(options.num_sink_tokens, page_size)
        + pages_of(options.recent_window, page_size)
    )


def cap_for(config_or_model: Any, tokens: int, batch: int, budget: int, frames: int) -> int:
    """The least `gpu_memory` in bytes with which a batch gets so many page frames a sequence and KV head.

    Raises:
        ValueError: it gets more with any cap that it can do with, or never so many, as all its pages are no more.
    """

    def frames_with(cap: int) -> int | None:
        """Page frames, or None where all pages fit."""
        made = spin_hf.plan(
            config_or_model, batch_size=batch, context_length=tokens + EXTRA, method=METHOD, budget=budget,
            gpu_memory=cap,
        )  # fmt: skip
        if not made.fits:
            return 0
        return made.page_frames or None

    config = getattr(config_or_model, "config", config_or_model)
    low, high = 0, 4 * batch * sequence_bytes(config, tokens + EXTRA)
    while high - low > 1:
        middle = (low + high) // 2
        found = frames_with(middle)
        low, high = (low, middle) if found is None or found >= frames else (middle, high)
    if frames_with(high) != frames:
        raise ValueError(f"expected a cap that gives {frames} page frames, the closest gives {frames_with(high)}")
    return high


def rows_of(task: Task, bench: Bench) -> Iterator[dict[str, Any]]:
    """The row of a buffer."""
    pages = step_pages(bench.budget)
    cap = cap_for(bench.model, task.tokens, task.batch, bench.budget, round((1 + task.multiple) * pages))
    made = planned(bench, task.tokens, task.batch, gpu_memory=cap)
    about = {"multiple": task.multiple, "step_pages": pages, "gpu_memory": cap}
    if not made.fits:
        yield {**refused("spin", task.batch, made), **about}
        return
    free()
    filled = Filled(
        bench.model, task.tokens, task.batch, budget=bench.budget, gpu_memory=cap, cpu_memory=bench.cpu_memory()
    )
    spread = filled.settle(guess_spread(bench.record, task.tokens))
    yield {"cache": "spin", "spread": spread, **filled.row(bench.weights), **about, "planned_frames": made.page_frames}


def line(row: dict[str, Any]) -> str:
    """What is printed of a row."""
    wanted = ("tpot_ms", "spread_ms", "overlap_at_1", "hit_rate", "loads_mib_per_token", "page_frames", "planned_frames",
              "step_pages", "gpu_memory", "gpu_gib", "cpu_gib", "peak_gpu_gib", "reserve_s", "fill_s", "first_call_s",
              "captured", "why", "failed")  # fmt: skip
    shown = [f"{row['tokens'] >> 10}K", f"batch={row.get('batch')}", f"buffer={row.get('multiple')}"]
    return " ".join(shown + [f"{key}={row[key]}" for key in wanted if key in row])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = campaign.parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--multiples", type=float, nargs="+", default=MULTIPLES)
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and write the results."""
    started, options = time.perf_counter(), parse()
    common = campaign.about(options.shape, options.budget, method=METHOD)
    record = campaign.open_record("memory.buffers", f"buffers-{options.shape}.json", common, options)
    tasks = [
        Task(tokens, batch, multiple)
        for tokens in options.tokens
        for batch in options.batches
        for multiple in options.multiples
    ]
    tasks = [left for task in tasks if (left := task.left(record)) is not None] if options.missing else tasks
    for task in tasks:  # a multiple that no cap gives is said before anything is measured
        cap_for(
            SHAPES[options.shape],
            task.tokens,
            task.batch,
            options.budget,
            round((1 + task.multiple) * step_pages(options.budget)),
        )
    campaign.run("memory.buffers", options, record, tasks, rows_of, line, started)


if __name__ == "__main__":
    main()
