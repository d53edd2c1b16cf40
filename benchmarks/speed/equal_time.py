"""Which method is nearer to dense attention in the same time: `python -m benchmarks.speed.equal_time`.

    --shares bisection:64 shadowkv:4 ...    methods, each with a budget of a 64th, a quarter ... of the context
    --tokens 131072 32768                   contexts;   --cap 8GiB    the longest of them with this cap on GPU memory too
    --host-memory, --seconds, --missing, --plan, --source, --output    as for `throughput.py`
    --table                                 prints what has been measured beside KL and mass at these shares, and stops

A method that looks at every page twice is slower at the same budget than one that reads it once, and leaves less: so both get
budgets at which they take about as long. SpinCache(model) decodes one sequence under `generate`, captured, at the overlap of a
real model's selections (`overlap.py`), all in one process. Writes `benchmarks/results/equal-time-<shape>.json`; what is lost is
known of real models and shorter contexts at the same shares, from `quality-bisection-*` and `quality-budgets-*`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.common import campaign
from benchmarks.common.campaign import Bench
from benchmarks.common.methods import method_of
from benchmarks.common.record import RESULTS, Record, newest
from benchmarks.quality.quality_tables import of_texts
from benchmarks.speed.decode_tables import row as table_row
from benchmarks.speed.spin_rows import spin_rows
from spin_hf.attention.methods.registry import METHODS

SHARES = [
    "bisection:64", "shadowkv:4", "bisection:32", "shadowkv:2", "shadowkv:8", "bisection:16", "shadowkv:64",
]  # fmt: skip
QUALITY = ("smollm2", "qwen2.5-0.5b")


@dataclass(frozen=True)
class Task:
    """One method, budget, context and cap.

    Attributes:
        share: the budget is a `share`-th of the context.
        gpu_memory: the cap, or "auto".
    """

    tokens: int
    method: str
    share: int
    gpu_memory: str

    @property
    def label(self) -> str:
        """What to call it."""
        return f"{self.tokens >> 10}K {self.method} 1/{self.share} {self.gpu_memory}"

    @property
    def seconds(self) -> float:
        """About how long it takes with the Llama-3.1-8B shape on one H200."""
        return 3 + self.tokens / 131072 * (7 if self.gpu_memory == "auto" else 17)

    row_seconds = seconds

    def left(self, record: Record) -> Task | None:
        """Itself, if no run has measured it."""
        return self if found(record.rows, self) is None else None


def found(rows: list[dict[str, Any]], task: Task) -> dict[str, Any] | None:
    """The newest row of a task."""
    return newest(rows, tokens=task.tokens, method=task.method, share=task.share, gpu_memory=task.gpu_memory)


def tasks_of(shares: list[tuple[str, int]], contexts: list[int], cap: str | None) -> list[Task]:
    """All tasks, the most important first: without a cap, then with it."""
    made = [Task(tokens, *share, "auto") for share in shares for tokens in contexts]
    return made + [Task(max(contexts), *share, cap) for share in shares if cap]


def rows_of(task: Task, bench: Bench) -> Iterator[dict[str, Any]]:
    """The row of a task."""
    budget, method = task.tokens // task.share, method_of(task.method, bench.model.config)
    about = {"method": task.method, "share": task.share, "budget": budget}
    for made in spin_rows(bench.model, task.tokens, budget, task.gpu_memory, method, ["replayed"], None, bench.weights):
        yield {**about, **made}


def line(row: dict[str, Any]) -> str:
    """What is printed of a row."""
    wanted = ("tpot_ms", "spread_ms", "overlap_at_1", "hit_rate", "loads_mib_per_token", "attended_tokens", "gpu_gib",
              "peak_gpu_gib", "why", "failed")  # fmt: skip
    shown = [f"{row['tokens'] >> 10}K", f"{row.get('method')} 1/{row.get('share')}", str(row.get("gpu_memory"))]
    return " ".join(shown + [f"{key}={row[key]}" for key in wanted if key in row])


def quality(folder: Path, model: str, method: str, share: int) -> str:
    """KL and mass of a method at a share of the context, a mean over texts; "" where no file has it."""
    for kind in ("bisection", "budgets"):
        rows = json.loads((folder / f"quality-{kind}-{model}.json").read_text())["rows"]
        kl, mass = (of_texts(rows, value).get((method, share), {}) for value in ("kl", "of_oracle"))
        if kl:
            return f"{fmean(kl.values()):.3f}, {fmean(mass.values()):.1%}"
    return ""


def table(rows: list[dict[str, Any]], shares: list[tuple[str, int]], cap: str | None, results: Path) -> list[str]:
    """Milliseconds per token of each method and share, by context and cap, beside what it leaves."""
    contexts = sorted({entry["tokens"] for entry in rows})
    places = [(tokens, "auto") for tokens in contexts] + [(max(contexts), cap)] * (cap is not None)
    heads = [f"{tokens >> 10}K{'' if memory == 'auto' else ', ' + str(memory)}" for tokens, memory in places]
    lines = [table_row("method", "share", *heads, "MiB loaded", *(f"KL, mass, {model}" for model in QUALITY))]
    lines.append("| --- " * (len(places) + 3 + len(QUALITY)) + "|")
    for method, share in shares:
        made = [found(rows, Task(tokens, method, share, str(memory))) for tokens, memory in places]
        lines.append(table_row(
            f"`{method}`", f"1/{share}", *("" if entry is None else f"{entry['tpot_ms']:.1f}" for entry in made),
            "" if made[-1] is None else f"{made[-1]['loads_mib_per_token']:.0f}",
            *(quality(results, model, method, share) for model in QUALITY),
        ))  # fmt: skip
    return lines


def method_and_share(text: str) -> tuple[str, int]:
    """`bisection:64` as a method and a share."""
    method, _, share = text.partition(":")
    if method not in METHODS or not share.isdecimal() or int(share) < 1:
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(sorted(METHODS))}, and a share as in {SHARES[0]}, got {text}"
        )
    return method, int(share)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = campaign.parser(__doc__, budget=False)
    parser.add_argument(
        "--shares", type=method_and_share, nargs="+", default=[method_and_share(text) for text in SHARES]
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072, 32768])
    parser.add_argument("--cap", default="8GiB")
    parser.add_argument("--table", action="store_true", help="print the table of what has been measured")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and write the results."""
    started, options = time.perf_counter(), parse()
    name = f"equal-time-{options.shape}.json"
    if options.table:
        rows = json.loads((options.source / name).read_text())["rows"]
        print("\n".join(table(rows, options.shares, options.cap, RESULTS)))
        return
    record = campaign.open_record("speed.equal_time", name, campaign.about(options.shape, options.budget), options)
    tasks = tasks_of(options.shares, options.tokens, options.cap)
    tasks = [left for task in tasks if (left := task.left(record)) is not None] if options.missing else tasks
    campaign.run("speed.equal_time", options, record, tasks, rows_of, line, started)


if __name__ == "__main__":
    main()
