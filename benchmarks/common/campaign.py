"""What the long benchmarks on a GPU have in common: tasks by importance, a limit on time, rows written as they come.

tasks  --missing-->  what the file lacks  --seconds-->  what is run, in the order of importance
task   --rows-->     printed, and added to the file (`record.py`); a task is left when the time is over, between two rows
"""

from __future__ import annotations

import argparse
import logging
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import transformers

from benchmarks.common import host
from benchmarks.common.link import bursts, copies
from benchmarks.common.record import RESULTS, MixedError, Record, fingerprint
from benchmarks.common.shapes import SHAPES, build
from benchmarks.common.timing import failure, free

SETUP_SECONDS = 45
"""Imports, weights, the link, first compilation of the kernels."""
LATE_SECONDS = 20
"""Estimates are no promises."""


class Task(Protocol):
    """Rows that are measured together."""

    tokens: int

    @property
    def label(self) -> str:
        """What to call it."""

    @property
    def seconds(self) -> float:
        """About how long it takes with the Llama-3.1-8B shape on one H100."""

    @property
    def row_seconds(self) -> float:
        """The same of one of its rows."""

    def left(self, record: Record) -> Any:
        """What of it the file lacks; None for nothing."""


AnyTask = TypeVar("AnyTask", bound=Task)


@dataclass
class Bench:
    """What a task is measured with.

    Attributes:
        budget: tokens; 0 where each task has its own.
        weights: bytes of the model on the GPU.
        host_gib: as for `host.room`.
        method: of SpinCache, where the tasks do not say.
    """

    model: Any
    record: Record
    budget: int
    weights: int
    host_gib: float | None = None
    method: str = "shadowkv"

    def room(self) -> int:
        """Bytes of keys and values that host memory holds now: what is planned with."""
        return max(1, host.room(self.host_gib))

    def cpu_memory(self) -> int:
        """The cap in bytes of a cache that is made now."""
        return self.room() + host.SLACK_BYTES


def parser(description: str | None, host_memory: bool = True, budget: bool = True) -> argparse.ArgumentParser:
    """The options that all have; not all ask what the host's memory holds, nor have one budget: then it is 0."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", choices=SHAPES, default="llama-8b")
    made.set_defaults(budget=0)
    if budget:
        made.add_argument("--budget", type=int, default=2048, help="tokens")
    if host_memory:
        made.add_argument("--host-memory", type=float, help="GiB of the machine (default: what is available now)")
    made.add_argument("--seconds", type=float, default=540, help="for all of it, from the start of the process")
    made.add_argument("--missing", action="store_true", help="only what the results file lacks")
    made.add_argument("--append", action="store_true", help="refuse to begin a new file where results do not mix")
    made.add_argument("--plan", action="store_true", help="print the tasks and measure nothing")
    made.add_argument("--source", type=Path, default=RESULTS, help="folder of the results to add to")
    made.add_argument("--output", type=Path, help="folder to write to (default: the source)")
    return made


def about(shape: str, budget: int, **more: Any) -> dict[str, Any]:
    """What all rows of a file have in common; a budget of 0 is none."""
    return {
        "shape": shape, "dtype": "bfloat16", **({"budget_tokens": budget} if budget else {}), **more,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none", "sources": fingerprint(),
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "triton": version("triton"),
            "transformers": transformers.__version__,
        },
    }  # fmt: skip


def command(module: str) -> str:
    """The command line as it would be in any folder, quoted."""
    files, arguments = ("--output", "--source"), sys.argv[1:]
    kept = [
        shlex.quote(given)
        for before, given in zip(["", *arguments], arguments, strict=False)
        if given not in files and before not in files
    ]
    return " ".join([f"python -m benchmarks.{module}", *kept])


def within(tasks: list[AnyTask], seconds: float) -> list[AnyTask]:
    """Those that fit, by priority."""
    chosen = []
    for task in tasks:
        if task.seconds <= seconds:
            chosen.append(task)
            seconds -= task.seconds
    return chosen


def open_record(module: str, name: str, common: dict[str, Any], options: argparse.Namespace) -> Record:
    """The file `name` of the folder that is written to, with the rows of the source that mix."""
    try:
        record = Record(
            common, command(module), options.source / name, (options.output or options.source) / name, options.append
        )
    except MixedError as error:
        raise SystemExit(f"benchmarks.{module}: {error}; leave --append out to begin anew") from None
    if record.left_behind:
        print(f"begins anew: {name} differs in {', '.join(record.left_behind)}")
    return record


def begins(module: str, tasks: list[AnyTask], chosen: list[AnyTask], plan: bool) -> bool:
    """Print what is measured and what is left. False if that is all that was wanted (`plan`); exits without a GPU."""
    later = [task.label for task in tasks if task not in chosen]
    total = sum(task.seconds for task in chosen) + SETUP_SECONDS
    print(f"{len(chosen)} tasks, about {total:.0f} s; left for another run: {', '.join(later) or 'none'}", flush=True)
    if plan:
        for task in chosen:
            print(f"{task.seconds:6.0f} s  {task.label}")
        return False
    if not torch.cuda.is_available():
        raise SystemExit(f"benchmarks.{module}: expected a CUDA GPU, found none; run it on a machine with one")
    logging.getLogger("spin_hf").setLevel(logging.WARNING)
    return True


def run(
    module: str, options: argparse.Namespace, record: Record, tasks: list[AnyTask],
    rows_of: Callable[[AnyTask, Bench], Iterator[dict[str, Any]]], line: Callable[[dict[str, Any]], str],
    started: float, after: Callable[[Record], None] = lambda record: None,
) -> None:  # fmt: skip
    """Measure the tasks that fit into the time, or print them.

    Args:
        rows_of: the rows of a task, each as soon as it is there.
        line: what is printed of a row.
        started: `time.perf_counter()` of the start.
        after: called behind every row that was added, to write what is made of the rows.
    """
    chosen = within(tasks, options.seconds - SETUP_SECONDS)
    if not begins(module, tasks, chosen, options.plan):
        return
    link = {**copies(), "burst_gb_s": bursts()}
    free()
    model = build(options.shape)
    free()
    method = getattr(options, "method", Bench.method)
    bench = Bench(model, record, options.budget, torch.cuda.memory_allocated(), options.host_memory, method)
    facts = {**link, "weights_gib": round(bench.weights / 2**30, 2), "host_room_gib": round(bench.room() / 2**30, 1)}
    record.about_run(**facts)
    print(f"{time.perf_counter() - started:4.0f} s {facts}", flush=True)
    measure(options, chosen, rows_of, line, started, bench, after)


def measure(
    options: argparse.Namespace, tasks: list[AnyTask], rows_of: Callable[[AnyTask, Bench], Iterator[dict[str, Any]]],
    line: Callable[[dict[str, Any]], str], started: float, bench: Bench, after: Callable[[Record], None],
) -> None:  # fmt: skip
    """Measure tasks, one after the other, until the time is over."""

    def time_left(needed: float) -> bool:
        return time.perf_counter() - started + needed <= options.seconds + LATE_SECONDS

    for task in tasks:
        if not time_left(task.seconds):
            print(f"no time left for {task.label}", flush=True)
            continue
        rows = guarded(rows_of(task, bench), task)
        for row in rows:
            row = {"tokens": task.tokens, **row}
            print(f"{time.perf_counter() - started:4.0f} s {line(row)}", flush=True)
            if "failed" not in row:
                bench.record.add(row)
                after(bench.record)
            if not time_left(task.row_seconds):
                print(f"no time left for the rest of {task.label}", flush=True)
                break
        rows.close()  # type: ignore[attr-defined]
        free()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises where a kernel has broken the process


def guarded(rows: Iterator[dict[str, Any]], task: Task) -> Iterator[dict[str, Any]]:
    """Rows, and one that says why where a task fails."""
    failed = None
    try:
        yield from rows
    except Exception as error:
        failed = {"cache": task.label, "tpot_ms": None, **failure(error)}
    if failed is not None:
        yield failed
