"""Output tokens a second against the number of sequences: `python -m benchmarks.speed.throughput`.

    --tokens 131072 32768        contexts             --batches 14 12 ...    of SpinCache, for all contexts
    --method shadowkv            of SpinCache; another one into a file of its own: throughput-<shape>-<method>.json
    --host-memory 256            GiB of the machine, if it does not say what is available
    --gpu-memory 79              GiB to do with, as if the GPU had no more
    --seconds, --missing, --plan, --source, --output    as for `decode.py`

    spin           SpinCache(model), captured steps under `generate`, at the replayed overlap (`overlap.py`), buffer warm
    spin ragged    the same with padding: lengths from a quarter of the context to all of it, one row a context
    dense graph    flash decoding over all tokens in a CUDA graph captured by hand, the best of three numbers of splits
    dynamic        DynamicCache under `generate`

Batches of SpinCache go up to what host memory holds, which `spin_hf.plan` says before anything is allocated; what it refuses
becomes a row with its reason. Of those whose pages lie in host memory, the largest is filled and the smaller ones are selected
from it (`batch_rows.py`). Batches of rivals are the largest that GPU memory holds, its neighbours, half of it, and one.

TPOT is milliseconds per step, in which every sequence gets a token. `ratios` compares the best rate of SpinCache with a rival's
best, both of one run, with the target beside it. Writes `benchmarks/results/throughput-<shape>.json`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import spin_hf
from benchmarks.common import campaign, host
from benchmarks.common.campaign import Bench
from benchmarks.common.record import Record, newest
from benchmarks.common.shapes import SHAPES, head_dim
from benchmarks.common.timing import attempt, free, with_memory
from benchmarks.speed.batch_rows import EXTRA, METHOD, Filled, guess_spread
from benchmarks.speed.rivals import measure_rival
from spin_hf import MemoryPlan
from spin_hf.attention.methods.registry import METHODS

TOKENS = [131072, 32768]
BATCHES = {131072: (14, 12, 8, 6, 4, 2, 1), 32768: (56, 48, 32, 16, 8, 1)}
"""Of SpinCache, beside the largest that host memory holds."""
TARGETS = {
    131072: {"dense graph": 4.0, "dynamic": 20.0},
    32768: {"dense graph": 2.0, "dynamic": 10.0},
}
"""How many times a rival's best rate SpinCache's best is to be."""
RIVALS = ("dense graph", "dynamic")
PRESUMED_GPU_BYTES = int(79.1 * 2**30)
"""Of an H100, where there is none to ask."""
BESIDE_BYTES = int(16.5 * 2**30)
"""GPU memory of weights and activations beside a rival's keys and values."""


@dataclass(frozen=True)
class Task:
    """Batches of one cache at one context, the most important first.

    Attributes:
        name: "spin", "spin ragged", or a rival.
        fits: whether they presumably do; a row that says no takes no time.
    """

    tokens: int
    name: str
    batches: tuple[int, ...]
    fits: bool = True

    @property
    def label(self) -> str:
        """What to call it."""
        return f"{self.tokens >> 10}K {self.name} {', '.join(map(str, self.batches))}"

    @property
    def seconds(self) -> float:
        """About how long it takes with the Llama-3.1-8B shape on one H100: filling at 8 GiB a second, then the rows."""
        if not self.fits:
            return 2 * len(self.batches)
        share, most = self.tokens / 131072, max(self.batches)
        rows = sum(self._row(batch) for batch in self.batches)
        return rows + (6 + 2 * share * most if self.name.startswith("spin") else 0)

    @property
    def row_seconds(self) -> float:
        """The same of its longest row, filled."""
        return max(self._row(batch) for batch in self.batches) if self.fits else 1

    def _row(self, batch: int) -> float:
        share = self.tokens / 131072
        if self.name == "dense graph":
            return 7
        if self.name == "dynamic":
            return 5 + 72 * (0.08 + 0.014 * batch * share)
        return 5 + 0.4 * (8.5 + batch * (0.25 * share + 0.2)) * (2 if self.name == "spin ragged" else 1)

    def left(self, record: Record) -> Task | None:
        """Without the batches that some run has measured."""
        missing = tuple(
            batch
            for batch in self.batches
            if newest(record.rows, tokens=self.tokens, cache=self.name, batch=batch) is None
        )
        return replace(self, batches=missing) if missing else None


# --------------------------------------------------------------------------------------------------------------- the plan


def sequence_bytes(config: Any, tokens: int) -> int:
    """Keys and values of a sequence, bf16."""
    return tokens * config.num_hidden_layers * config.num_key_value_heads * 2 * head_dim(config) * 2


def largest_in(config: Any, tokens: int, num_bytes: int) -> int:
    """PageTable whose keys and values fit."""
    return num_bytes // sequence_bytes(config, tokens)


def limit_gpu_memory(given: float | None) -> dict[str, float]:
    """Let this process take no more of the GPU than so many GiB; what a file says of that."""
    if given is None:
        return {}
    if torch.cuda.is_available():
        total: float = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, given * 2**30 / total))
    return {"gpu_memory_gib": given}


def gpu_bytes() -> int:
    """GPU memory of the machine that this process may take, or of an H100."""
    if not torch.cuda.is_available():
        return PRESUMED_GPU_BYTES
    return int(torch.cuda.get_device_properties(0).total_memory * torch.cuda.get_per_process_memory_fraction())


def batches_of_spin(config: Any, tokens: int, room: int, given: list[int] | None) -> tuple[int, ...]:
    """The batches of SpinCache, the largest first, with the largest that host memory holds among them."""
    wanted = set(given or BATCHES.get(tokens) or (8, 4, 2, 1))
    most = largest_in(config, tokens + EXTRA, room)
    return tuple(sorted(wanted | ({most} if 0 < most < max(wanted) else set()), reverse=True))


def batches_of_rivals(config: Any, tokens: int) -> tuple[int, ...]:
    """The largest that GPU memory holds, one less, one more (which shows that it does not), half of it, and one."""
    most = max(1, largest_in(config, tokens, gpu_bytes() - BESIDE_BYTES))
    return tuple(dict.fromkeys(batch for batch in (most, most - 1, most + 1, most // 2, 1) if batch > 0))


def plan(
    config: Any, contexts: list[int], room: int, given: list[int] | None = None, rivals: tuple[str, ...] = RIVALS,
    ragged: bool = True,
) -> list[Task]:  # fmt: skip
    """All tasks, the most important ones first.

    Args:
        room: bytes of keys and values that host memory holds.
        given: batches of SpinCache, if not the usual ones.
    """
    first, last, padded, after = [], [], [], []
    for tokens in contexts:
        batches, in_gpu = batches_of_spin(config, tokens, room, given), int(0.78 * (gpu_bytes() - BESIDE_BYTES))
        small = tuple(b for b in batches if sequence_bytes(config, tokens) * b < in_gpu)
        most = largest_in(config, tokens + EXTRA, room)
        large = tuple(batch for batch in batches if batch not in small and batch <= most)
        too_large = tuple(batch for batch in batches if batch not in small and batch > most)
        theirs = batches_of_rivals(config, tokens)
        first += [Task(tokens, "spin", large)] if large else []
        last += [Task(tokens, "spin", too_large, False)] if too_large else []
        for name in (name for name in RIVALS if name in rivals):
            first.append(Task(tokens, name, theirs[:2]))
            last.append(Task(tokens, name, theirs[2:3], False))
            after += [Task(tokens, name, theirs[3:])] if theirs[3:] else []
        after += [Task(tokens, "spin", small)] if small else []
        if ragged and large:
            padded.append(Task(tokens, "spin ragged", (max(large),)))
    return first + last + padded + after


def left_to_do(tasks: list[Task], record: Record) -> list[Task]:
    """Without what the file has; where rivals are missing, SpinCache's best batch is measured again, for the ratios."""
    missing = [left for task in tasks if (left := task.left(record)) is not None]
    again = []
    for tokens in dict.fromkeys(task.tokens for task in missing if task.name in RIVALS):
        found = best(record.rows, tokens, "spin")
        if found is not None and not any(task.name == "spin" and task.tokens == tokens for task in missing):
            again.append(Task(tokens, "spin", (found["batch"],)))
    return again + missing


# --------------------------------------------------------------------------------------------------------------- the rows


def rows_of(task: Task, bench: Bench) -> Iterator[dict[str, Any]]:
    """The rows of a task, each as soon as it is there."""
    if task.name in RIVALS:
        for batch in task.batches:
            yield rival_row(task, batch, bench)
        return
    ragged = task.name == "spin ragged"
    wanted, in_host, in_gpu = sorted(task.batches), [], []
    while wanted:
        batch = wanted.pop()
        made = planned(bench, task.tokens, batch)
        if not made.fits:
            yield refused(task.name, batch, made)
            instead = made.largest_batch_size or 0
            if task.fits and instead > max(wanted, default=0):  # host memory has become less since the plan
                wanted.append(instead)
        else:
            (in_host if made.page_frames else in_gpu).append(batch)
    if in_host:
        yield from spin_rows(task, in_host, bench, ragged)
    for batch in in_gpu:
        yield from spin_rows(task, [batch], bench, ragged)


def planned(bench: Bench, tokens: int, batch: int, **options: Any) -> MemoryPlan:
    """What `spin_hf.plan` says of a batch with all that it will generate; `options` are SpinCache's, but for the method."""
    free()
    return spin_hf.plan(
        bench.model, batch_size=batch, context_length=tokens + EXTRA, method=bench.method, budget=bench.budget,
        cpu_memory=bench.room(), **options,
    )  # fmt: skip


def refused(name: str, batch: int, made: MemoryPlan) -> dict[str, Any]:
    """The row of a batch that does not fit."""
    return {
        "cache": name, "batch": batch, "tpot_ms": None, "why": made.reason,
        "largest_batch_size": made.largest_batch_size, "smallest_gpu_memory_gib": round(made.smallest_gpu_memory / 2**30, 2),
    }  # fmt: skip


def lengths(tokens: int, batch: int) -> torch.Tensor:
    """Tokens of each sequence of a ragged batch: evenly from a quarter of the context to all of it; [batch], int64."""
    return torch.linspace(tokens / 4, tokens, batch).round().long().flip(0)


def spin_rows(task: Task, batches: list[int], bench: Bench, ragged: bool) -> Iterator[dict[str, Any]]:
    """Rows of SpinCache: the first and largest batch is filled, the others are selected from it."""
    padding = task.tokens - lengths(task.tokens, batches[0]) if ragged else None
    filled = Filled(
        bench.model, task.tokens, batches[0], padding, bench.method, budget=bench.budget, cpu_memory=bench.cpu_memory()
    )
    spread = filled.settle(guess_spread(bench.record, task.tokens))
    for batch in batches:
        filled.shrink(batch)
        row = {"cache": task.name, "gpu_memory": "auto", "spread": spread, **filled.row(bench.weights)}
        if ragged:
            held = lengths(task.tokens, batches[0])[:batch]
            row |= {"shortest_tokens": int(held.min()), "mean_tokens": round(float(held.float().mean()))}
        yield row


def rival_row(task: Task, batch: int, bench: Bench) -> dict[str, Any]:
    """The row of a rival."""

    def measured() -> dict[str, Any]:
        return with_memory(
            lambda: measure_rival(bench.model, task.name, task.tokens, bench.budget, batch), bench.weights
        )

    row = {"cache": task.name, "batch": batch, **attempt(measured)}
    if row["tpot_ms"]:
        row["tokens_per_s"] = round(batch / row["tpot_ms"] * 1e3, 1)
    return row


# ------------------------------------------------------------------------------------------------------------- the ratios


def best(rows: list[dict[str, Any]], tokens: int, cache: str, run: str | None = None) -> dict[str, Any] | None:
    """The row with the highest rate, of one run or of all."""
    found = [
        row for row in rows
        if (row["tokens"], row["cache"]) == (tokens, cache) and row.get("tokens_per_s") and run in (None, row["run"])
    ]  # fmt: skip
    return max(found, key=lambda row: row["tokens_per_s"], default=None)


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """SpinCache's best rate over each rival's best, at contexts with a target; both of one run, the newest that has both."""
    made = []
    for tokens, targets in TARGETS.items():
        for rival, target in targets.items():
            for run in sorted({row["run"] for row in rows}, reverse=True):
                ours, theirs = best(rows, tokens, "spin", run), best(rows, tokens, rival, run)
                if ours is None or theirs is None:
                    continue
                ratio = round(ours["tokens_per_s"] / theirs["tokens_per_s"], 2)
                made.append({
                    "tokens": tokens, "rival": rival, "run": run, "ratio": ratio, "target": target, "met": ratio >= target,
                    "spin_batch": ours["batch"], "spin_tokens_per_s": ours["tokens_per_s"],
                    "rival_batch": theirs["batch"], "rival_tokens_per_s": theirs["tokens_per_s"],
                })  # fmt: skip
                break
    return made


def write_ratios(record: Record) -> None:
    """Bring the ratios in the file up to its rows."""
    record.made["ratios"] = ratios(record.rows)
    record.write()


def line(row: dict[str, Any]) -> str:
    """What is printed of a row."""
    wanted = ("tokens_per_s", "tpot_ms", "spread_ms", "overlap_at_1", "hit_rate", "loads_mib_per_token", "page_frames",
              "gpu_gib", "cpu_gib", "peak_gpu_gib", "rss_gib", "reserve_s", "fill_s", "first_call_s", "captured", "splits",
              "why", "failed")  # fmt: skip
    shown = [f"{row['tokens'] >> 10}K", row["cache"], f"batch={row.get('batch')}"]
    return " ".join(shown + [f"{key}={row[key]}" for key in wanted if key in row])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = campaign.parser(__doc__)
    parser.add_argument("--gpu-memory", type=float, help="GiB of the GPU to do with (default: all of it)")
    parser.add_argument("--method", choices=METHODS, default=METHOD, help="of SpinCache; each has a file of its own")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--batches", type=int, nargs="+", help="of SpinCache (default: by context)")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--no-ragged", action="store_true", help="leave padded batches out")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and write the results, and print the ratios."""
    started, options = time.perf_counter(), parse()
    limit = limit_gpu_memory(options.gpu_memory)
    common = campaign.about(options.shape, options.budget, method=options.method, **limit)
    name = f"throughput-{options.shape}{'' if options.method == METHOD else '-' + options.method}.json"
    record = campaign.open_record("speed.throughput", name, common, options)
    tasks = plan(
        SHAPES[options.shape], options.tokens, host.room(options.host_memory), options.batches, tuple(options.rivals),
        not options.no_ragged,
    )  # fmt: skip
    tasks = left_to_do(tasks, record) if options.missing else tasks
    campaign.run("speed.throughput", options, record, tasks, rows_of, line, started, write_ratios)
    for entry in ratios(record.rows):
        met = "met" if entry["met"] else "missed"
        print(
            f"{entry['tokens'] >> 10}K over {entry['rival']}: {entry['ratio']} x, target {entry['target']:g} x: {met}"
        )


if __name__ == "__main__":
    main()
