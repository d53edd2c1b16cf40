"""Time per output token (TPOT) against every cache that a user could take instead: `python -m benchmarks.speed.decode`.

    --methods bisection quest ...    other methods than ShadowKV, each into a file of its own: decode-<shape>-<method>.json
    --overlaps replayed              only these of the selections below
    --shape llama-8b | qwen3-0.6b    random weights, synthetic keys and values, bf16, one sequence
    --tokens 131072 8192 ...         contexts                         --rivals floor dynamic ...    see `rivals.py`
    --seconds 540                    starts nothing that would end later; most important rows first
    --missing                        only what the results file lacks, beside the rows of SpinCache that ratios need
    --plan                           says what would be measured, and about how long it takes

    spin     SpinCache(model), captured steps, under `generate`, selecting with the overlap of a real model (`replayed`),
             with the lowest and with the highest possible; see `overlap.py`. At every length, with `dense_below=0`
    rivals   see `rivals.py`;  kernels   see `step_profile.py`: at the end, when all times per token have been taken

TPOT is (time of `generate` with 72 new tokens - with 8) / 64, the median of three (of two, or with fewer tokens, for slow ones
and for the lowest and highest overlap); for `floor` and `dense graph`, of replays. Where pages are loaded, 144 tokens are
generated first, so that the buffer is warm. Rows are added to those of earlier runs of the same package sources, machine
and versions (`record.py`). Writes `benchmarks/results/decode-<shape>.json`; `decode_tables.py` and `plot_decode.py` show it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.common import campaign
from benchmarks.common.link import bursts, copies
from benchmarks.common.methods import method_of
from benchmarks.common.record import Record, newest
from benchmarks.common.shapes import build
from benchmarks.common.timing import attempt, failure, free, with_memory
from benchmarks.speed.rivals import FAST, ONLY_AT, OWN, SLOW, measure_rival
from benchmarks.speed.spin_rows import SELECTIONS, spin_rows
from benchmarks.speed.step_profile import kernel_row
from spin_hf.attention.methods.registry import METHODS

CAPS = {131072: "4GiB", 524288: "8GiB"}
"""Contexts at which the cache is measured with a cap on its GPU memory too."""
LARGER_CAPS = {"bisection": {131072: "8GiB"}}
"""Likewise of methods whose summaries alone take about as much."""
TOKENS = [131072, 8192, 524288, 32768, 4096]


@dataclass(frozen=True)
class Task:
    """Rows that are measured together.

    Attributes:
        name: "spin", a rival, or "kernels".
        method: of SpinCache; a rival stands in the file of the method that it is measured beside.
        gpu_memory: the cap of SpinCache; None for rivals.
        selections: the rows of "spin".
    """

    tokens: int
    name: str
    method: str = "shadowkv"
    gpu_memory: str | None = None
    selections: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return " ".join(
            [f"{self.tokens >> 10}K", self.name, self.method, *([self.gpu_memory] if self.gpu_memory else [])]
        )

    @property
    def seconds(self) -> float:
        """About how long it takes with the Llama-3.1-8B shape on one H100, from earlier runs."""
        share = self.tokens / 131072
        paged = self.gpu_memory is not None and (self.gpu_memory != "auto" or share > 2)
        fill = share * (5 if paged else 3)
        match self.name:
            case "spin":
                return 7 + fill + len(self.selections) * ((7 + 2 * share) if paged else 2.5)
            case "kernels":
                return 4 + fill + (4 if paged else 0)
            case "floor":
                return 2
            case "dense graph":
                return 5
            case "dynamic":
                return 9
            case "default":
                return 5 + fill
            case "offloaded":
                return 3 + 42 * share
            case "static":
                return 46 + 12 * share if share <= 1 else 8
            case _:
                return 7 + fill

    def is_in(self, record: Record) -> bool:
        """Whether some run has measured all of it."""
        rows = record.kernels if self.name == "kernels" else record.rows
        cache = "spin" if self.name == "kernels" else self.name
        wanted = [{"overlap": name} for name in self.selections] or [{}]
        return all(
            newest(rows, tokens=self.tokens, cache=cache, gpu_memory=self.gpu_memory, **row) is not None
            for row in wanted
        )


def plan(
    tokens: list[int], rivals: list[str], kernels: bool = True, method: str = "shadowkv",
    everything: tuple[str, ...] = tuple(SELECTIONS), capped: bool = True,
) -> list[Task]:  # fmt: skip
    """All tasks of a method, the most important ones first.

    Args:
        everything: the selections.
        capped: whether contexts are measured with caps on GPU memory too.
    """
    replayed = ("replayed",)
    of_method = LARGER_CAPS.get(method, CAPS)
    caps = {count: of_method[count] for count in tokens if capped and count in of_method}
    tasks = []
    for count in tokens:
        tasks.append(Task(count, "spin", method, "auto", everything))
        if count in caps:  # at 512K "auto" is a cap already
            tasks.append(Task(count, "spin", method, caps[count], everything if count <= 131072 else replayed))
        tasks += [Task(count, name, method) for name in (*FAST, *OWN) if name in rivals]
    if kernels:
        tasks += [Task(count, "kernels", method, "auto") for count in tokens]
        tasks += [Task(count, "kernels", method, caps[count]) for count in tokens if count in caps and count <= 131072]
    slow = [Task(count, name, method) for name in SLOW if name in rivals for count in tokens]
    return tasks + [task for task in slow if task.tokens in ONLY_AT.get(task.name, (task.tokens,))]


def left_to_do(tasks: list[Task], record: Record) -> list[Task]:
    """Without what the file has; a context whose rivals are missing is measured again with SpinCache, for their ratios."""
    missing = [task for task in tasks if not task.is_in(record)]
    spin = {task.tokens for task in missing if task.name == "spin" and task.gpu_memory == "auto"}
    for_ratios = dict.fromkeys(task.tokens for task in missing if task.name not in ("spin", "kernels"))
    return [
        Task(count, "spin", missing[0].method, "auto", ("replayed",)) for count in for_ratios if count not in spin
    ] + missing


def within(tasks: list[Task], seconds: float) -> list[Task]:
    """Those that fit, by priority; in the order in which they are run, the profiler's last."""
    chosen = campaign.within(tasks, seconds)
    return [task for task in chosen if task.name != "kernels"] + [task for task in chosen if task.name == "kernels"]


def rows_of(task: Task, model: Any, record: Record, budget: int, weights: int) -> Iterator[dict[str, Any]]:
    """The rows of a task, each as soon as it is there; what fails becomes a row that says why."""
    try:
        method = method_of(task.method, model.config)
        if task.name == "spin":
            assert task.gpu_memory is not None
            yield from spin_rows(
                model,
                task.tokens,
                budget,
                task.gpu_memory,
                method,
                list(task.selections),
                record.spread(task.tokens),
                weights,
            )
        elif task.name == "kernels":
            spread = record.spread(task.tokens)
            if spread is None:
                raise RuntimeError("expected a replayed row of this context before its kernels")
            yield attempt(lambda: kernel_row(model, task.tokens, budget, str(task.gpu_memory), method, spread))
        else:
            measured = attempt(
                lambda: with_memory(lambda: measure_rival(model, task.name, task.tokens, budget), weights)
            )
            yield {"cache": task.name, **measured}
    except Exception as error:
        yield {"cache": task.name, "tpot_ms": None, **failure(error)}
    free()


def line(task: Task, row: dict[str, Any]) -> str:
    """What is printed of a row."""
    shown = [task.label, row.get("overlap", "")]
    wanted = ("tpot_ms", "spread_ms", "overlap_at_1", "overlap_at_16", "hit_rate", "loads_mib_per_token", "first_call_s",
              "peak_gpu_gib", "splits", "us_per_layer", "spin_us_per_layer", "others_us_per_layer", "step_ms", "gb_s",
              "why", "failed")  # fmt: skip
    return " ".join([part for part in shown if part] + [f"{key}={row[key]}" for key in wanted if key in row])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = campaign.parser(__doc__, host_memory=False)
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=["shadowkv"])
    parser.add_argument("--overlaps", nargs="+", choices=SELECTIONS, default=list(SELECTIONS))
    parser.add_argument("--no-caps", action="store_true", help="leave out contexts under a cap on GPU memory")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rivals", nargs="*", choices=[*FAST, *OWN, *SLOW], default=[*FAST, *OWN, *SLOW])
    parser.add_argument("--no-kernels", action="store_true", help="leave the profiler out")
    options = parser.parse_args(arguments)
    options.output = options.output or options.source
    return options


def file_name(shape: str, method: str) -> str:
    """Of the results of a method; ShadowKV's have none of it in their name."""
    return f"decode-{shape}{'' if method == 'shadowkv' else '-' + method}.json"


def main() -> None:
    """Measure and write the results."""
    started, options = time.perf_counter(), parse()
    tasks, records = [], {}
    for method in options.methods:
        name = file_name(options.shape, method)
        common = campaign.about(options.shape, options.budget, batch=1, method=method)
        records[method] = record = campaign.open_record("speed.decode", name, common, options)
        own = plan(
            options.tokens, options.rivals, not options.no_kernels, method, tuple(options.overlaps), not options.no_caps
        )
        tasks += left_to_do(own, record) if options.missing else own
    chosen = within(tasks, options.seconds - campaign.SETUP_SECONDS)
    if not campaign.begins("speed.decode", tasks, chosen, options.plan):
        return
    link = {**copies(), "burst_gb_s": bursts()}
    model = build(options.shape)
    weights = torch.cuda.memory_allocated()
    for record in records.values():
        record.about_run(**link, weights_gib=round(weights / 2**30, 2))
    print(link, flush=True)
    for task in chosen:
        if time.perf_counter() - started + task.seconds > options.seconds + campaign.LATE_SECONDS:
            print(f"no time left for {task.label}", flush=True)
            continue
        record = records[task.method]
        for row in rows_of(task, model, record, options.budget, weights):
            row = {"tokens": task.tokens, **row}
            print(f"{time.perf_counter() - started:4.0f} s {line(task, row)}", flush=True)
            if "failed" not in row:
                record.add(row, kernels=task.name == "kernels")
        torch.cuda.synchronize()  # raises where a kernel has broken the process


if __name__ == "__main__":
    main()
