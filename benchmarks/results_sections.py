"""The sections of docs/results.md: which results files each shows, and by which tables.

PARTS    heading -> sections; `results_page.py` writes them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.common.record import RESULTS, newest
from benchmarks.memory import metadata
from benchmarks.quality import passkey
from benchmarks.quality.quality_tables import kl_table, summary, task_table
from benchmarks.speed import batch_tables, decode_tables, equal_time
from benchmarks.speed.decode_tables import ms

Result = dict[str, Any]
Lines = list[str]


@dataclass(frozen=True)
class Section:
    """One heading of the page.

    Attributes:
        files: results files, relative to `benchmarks/results`.
        tables: from the contents of the files, in their order, to tables; a table may have a title.
        figure: a figure beside the results files; "" for none.
    """

    title: str
    caption: str
    files: tuple[str, ...]
    tables: Callable[[list[Result]], list[tuple[str, Lines]]]
    figure: str = ""


def head(*cells: str) -> Lines:
    """The first two lines of a table."""
    return batch_tables.head(*cells)


def row(*cells: str) -> str:
    """A line of a table."""
    return decode_tables.row(*cells)


def without_empty_columns(lines: Lines) -> Lines:
    """A table without the columns in which no row has anything."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    kept = [i for i in range(len(rows[0])) if i == 0 or any(cells[i] for cells in rows[2:])]
    return [row(*(cells[i] for i in kept)) for cells in rows]


def day(run: str) -> str:
    """The date in the name of a run."""
    return f"{run[:4]}-{run[4:6]}-{run[6:8]}"


# Tables of one file each, which no benchmark prints


PROMPTS = {
    "dynamic": "`DynamicCache`", "dynamic, chunks of 8192": "`DynamicCache`, `prefill_chunk_size=8192`",
    "spin": "`SpinCache(model)`", "spin, chunks of 2048": "`SpinCache(model)`, `generate(prefill_chunk_size=2048)`",
    "spin, chunks of 4096": "`SpinCache(model, prefill_chunk_size=4096)`",
    "spin, whole": "`SpinCache(model, prefill_chunk_size=None)`",
    "shadowkv": '`SpinCache(model, "shadowkv")`', "shadowkv 2GiB": '`SpinCache(model, "shadowkv", gpu_memory="2GiB")`',
}  # fmt: skip
"""Rows of `benchmarks/speed/prefill.py`, and how the page calls them."""


def prompts(result: Result) -> Lines:
    """Seconds and memory to the first token, by prompt and cache."""
    lines = head("tokens", "cache", "seconds", "peak, GiB")
    rows = [each for each in result["rows"].values() if each["new_tokens"] == 1 and "seconds" in each]
    for each in sorted(rows, key=lambda each: (each["tokens"], list(PROMPTS).index(each["way"]))):
        lines.append(
            row(f"{each['tokens']:,}", PROMPTS[each["way"]], f"{each['seconds']:.2f}", f"{each['peak_gib']:.1f}")
        )
    return lines


def by_method(results: list[Result]) -> Lines:
    """Time per token and time of a layer's sparse attention: a row for each method, budget and context."""
    lines = head("method", "budget", "context", "ms per token", "sparse attention of a layer, µs", "measured")
    for result in results:
        for tokens, cap in decode_tables.contexts(result["rows"]):
            entry = newest(result["rows"], tokens=tokens, cache="spin", overlap="replayed", gpu_memory=cap)
            kernels = newest(result["kernels"], tokens=tokens, gpu_memory=cap)
            if entry is not None and entry["tpot_ms"]:
                took = "" if kernels is None else f"{kernels['spin_us_per_layer']:.0f}"
                name = decode_tables.label(tokens, cap)
                lines.append(row(
                    f"`{result['method']}`", f"{result['budget_tokens']:,}", name, ms(entry["tpot_ms"]), took,
                    day(entry["run"]),
                ))  # fmt: skip
    return lines


def first_steps(result: Result) -> Lines:
    """Seconds of the first steps on a machine without compiled kernels."""
    lines = head("context", "first two steps", "first captured call")
    for entry in result["rows"]:
        lines.append(row(
            f"{entry['tokens'] >> 10}K", f"{entry['first_two_eager_steps_s']:.1f} s", f"{entry['first_call_s']:.1f} s"
        ))  # fmt: skip
    return lines


def one_layer(result: Result) -> Lines:
    """Microseconds of one layer's attention by itself."""
    lines = head("context", "budget", "same pages, µs", "new pages, µs", "MiB loaded for new pages")
    for entry in result["rows"]:
        name = decode_tables.label(entry["tokens"], entry["gpu_memory"])
        loaded = f"{entry['new_loads_mib']:.1f}" if entry["new_loads_mib"] else ""
        lines.append(
            row(name, f"{entry['budget_tokens']:,}", f"{entry['same_us']:.0f}", f"{entry['new_us']:.0f}", loaded)
        )
    return lines


def link(result: Result) -> Lines:
    """Rates of the host link and of page-locking."""
    lines = head("what", "measured")
    lines.append(row("copy over the link", f"{result['link_gb_s']:.1f} GB/s"))
    for burst, rate in result["burst_gb_s"].items():
        size = burst.removesuffix("_gb_s").replace("_mib", " MiB")
        lines.append(row(f"kernel that reads host memory, {size}", f"{rate:.1f} GB/s"))
    lines.append(row("page-locking 16 GiB", f"{result['page_locking']['slab_16_gib_s']:.1f} s"))
    return lines


def index_cost(result: Result) -> Lines:
    """What indexing adds to a prefill."""
    lines = head("method", "prefill, ms", "clustering and summaries behind it, ms", "added to the dense prefill")
    for name, entry in result["rows"].items():
        behind = f"{entry['cluster_ms']:.1f}" if "cluster_ms" in entry else ""
        added = f"{entry['share']:.1%}" if "share" in entry else ""
        lines.append(row(name if name == "dense" else f"`{name}`", f"{entry['prefill_ms']:,.0f}", behind, added))
    return lines


def compared(result: Result) -> Lines:
    """Times of two versions of the package."""
    lines = head(
        "method", "context", f"sources `{result['sources_before']}`, ms", f"`{result['sources']}`, ms", "ratio"
    )
    for entry in result["rows"]:
        label = decode_tables.label(entry["tokens"], "auto")
        lines.append(row(
            f"`{entry['method']}`", label, f"{entry['before_ms']:.2f}", f"{entry['after_ms']:.2f}", f"{entry['ratio']:.3f}"
        ))  # fmt: skip
    return lines


def gates(result: Result) -> Lines:
    """KL of gate scores on text that was held out."""
    settings, kl = result["settings"], result["held_out"]
    lines = head("steps", "tokens of a step", "KL before, nats", "KL after, nats")
    return [*lines, row(str(settings["steps"]), f"{settings['tokens']:,}", f"{kl['before']:.2f}", f"{kl['after']:.2f}")]


def tables_of(result: Result) -> Lines:
    """Bytes of page tables at 1, 8 and 64 sequences."""
    return metadata.lines([entry for entry in result["rows"].values() if entry["sequences"] in (1, 8, 64)])


def without(method: str, rows: dict[str, Any]) -> dict[str, Any]:
    """Rows of a file of `quality.py` or `retrieval.py` without those of a method."""
    if any("dense" in entry for entry in rows.values()):
        return {
            name: {cell: value for cell, value in cells.items() if not cell.startswith(f"{method},")}
            for name, cells in rows.items()
        }
    return {name: entry for name, entry in rows.items() if not name.startswith(f"{method},")}


def lost(result: Result, leave_out: str = "") -> tuple[str, Lines]:
    """KL and mass, or answers, of one file, with its model as title."""
    rows = without(leave_out, result["rows"]) if leave_out else result["rows"]
    answers = "new_tokens" in result
    what = f"{len(rows)} questions" if answers else f"{result['steps']} steps of each text"
    title = f"{result['model']}, {result['tokens']:,} tokens, {result['dtype']}, {what}"
    return title, (task_table if answers else kl_table)(rows)


# The page


def _one(table: Callable[[Result], Lines]) -> Callable[[list[Result]], list[tuple[str, Lines]]]:
    """A table for each file, with GPU and shape as title where there are several."""

    def tables(results: list[Result]) -> list[tuple[str, Lines]]:
        several = len(results) > 1
        return [(result.get("gpu", result.get("model", "")) if several else "", table(result)) for result in results]

    return tables


def _all(table: Callable[[list[Result]], Lines]) -> Callable[[list[Result]], list[tuple[str, Lines]]]:
    return lambda results: [("", without_empty_columns(table(results)))]


def _lost(leave_out: str = "") -> Callable[[list[Result]], list[tuple[str, Lines]]]:
    return lambda results: [lost(result, leave_out) for result in results]


def _equal_time(results: list[Result]) -> list[tuple[str, Lines]]:
    rows = [entry for result in results for entry in result["rows"]]
    shares = sorted({(entry["method"], entry["share"]) for entry in rows}, key=lambda pair: (pair[0], -pair[1]))
    return [("", equal_time.table(rows, shares, "8GiB", RESULTS))]


def _buffers(results: list[Result]) -> list[tuple[str, Lines]]:
    return [("", batch_tables.buffers(results[0], results[1]))]


def _throughput(results: list[Result]) -> list[tuple[str, Lines]]:
    tables = []
    for result in results:
        title = f"{result['gpu']}" + (
            f", {result['gpu_memory_gib']:.0f} GiB of it" if "gpu_memory_gib" in result else ""
        )
        tables.append((title, without_empty_columns(batch_tables.throughput(result))))
        if result["ratios"]:
            tables.append(("", batch_tables.ratios(result)))
    return tables


def _date(result: Result) -> str:
    return f"Measured {min(day(run) for run in result['runs'])}"


H200 = "h200/decode-llama-8b"
PARTS: dict[str, list[Section]] = {
    "Speed": [
        Section(
            "Time per token, `bisection` (the default method)",
            "Milliseconds per generated token of one sequence, budget 2,048 tokens, random weights. "
            "A factor compares with `SpinCache(model)` of the same run.",
            (f"{H200}-bisection.json", f"{H200}-bisection-again.json"),
            lambda results: [(_date(result), without_empty_columns(decode_tables.times([result]))) for result in results],
            "h200/decode-llama-8b-bisection.svg",
        ),
        Section(
            "Time per token, `shadowkv`",
            "The same with `method=\"shadowkv\"` on an H100.",
            ("decode-llama-8b.json", "decode-qwen3-0.6b.json"),
            _all(decode_tables.times),
            "decode-llama-8b.svg",
        ),
        Section(
            "Time per token by method and budget",
            "One H200, Llama-3.1-8B shape. Gate queries of `seer` count as the model's, not as sparse attention.",
            (f"{H200}.json", f"{H200}-bisection.json", f"{H200}-retroinfer.json", f"{H200}-quest.json",
             f"{H200}-seer-again.json", f"{H200}-seer.json", f"{H200}-budget-16384.json", f"{H200}-budget-32768.json"),
            _all(by_method),
        ),
        Section(
            "Kernels of a layer",
            "Microseconds per layer of a captured step, one H200. Columns are kernels, as these sources named them: "
            "`rate` makes one score of a page from those of the query heads, `closer` and `rate_closer` rerank, "
            "`choose` selects.",
            (f"{H200}-bisection.json", f"{H200}.json"),
            lambda results: [(f"`{result['method']}`", decode_tables.kernels([result])) for result in results],
        ),
        Section(
            "Overlap of selected pages",
            "How many of a step's selected pages were selected by the step before, and the time per token. "
            "*Replayed* is the overlap of a real model; `shadowkv`, H100.",
            ("decode-llama-8b.json", "decode-qwen3-0.6b.json"),
            _all(decode_tables.overlaps),
        ),
        Section(
            "Same time instead of same budget",
            "Milliseconds per token when each method gets a share of the context as its budget. "
            "`gpu_memory` is \"8GiB\" in the last column of times; *MiB loaded* are its loads for one token. "
            "KL and mass (see [quality](#bisection-and-shadowkv)) are those of the same shares of 4,000 tokens.",
            ("h200/equal-time-llama-8b.json", "h200/equal-time-llama-8b-again.json"),
            _equal_time,
        ),
        Section(
            "First steps on a new machine",
            "Kernels are compiled once for each machine, in the first two steps.",
            (f"{H200}-bisection-fresh.json",),
            _one(first_steps),
        ),
        Section(
            "Before and after the modules moved",
            "Two versions of the package, before and after its modules moved to other folders, "
            "one after the other on one machine.",
            ("h200/compare-sources.json",),
            _one(compared),
        ),
        Section(
            "Prompts",
            "Time to the first token of one prompt under `generate`, and the most GPU memory beside the weights. Llama-3.1-8B "
            "shape, bfloat16, one H200, each measured once behind a shorter prompt. Keys and values of 131,072 tokens take "
            "16 GiB, summaries of `bisection` 4.1 GiB.",
            ("h200/prefill-llama-8b.json",),
            _one(prompts),
        ),
        Section(
            "Indexing a prompt",
            "Prefill of 32,768 tokens, Llama-3.1-8B shape.",
            ("index-cost.json",),
            _one(index_cost),
        ),
        Section(
            "One layer by itself",
            "Attention of one layer in a CUDA graph, with other memory written before each replay. "
            "*New pages* are pages that the step before did not select.",
            ("layer.json",),
            lambda results: [("", one_layer(results[0])), ("", link(results[0]))],
        ),
    ],
    "Batches and memory": [
        Section(
            "Tokens per second",
            "`shadowkv`, budget 2,048 tokens, 128 GiB of host memory. "
            "A dense cache is measured up to the largest batch that fits. *GPU* is the most memory beside the weights. "
            "*Hits* are pages that were on the GPU already. *Host memory* for a rate: the batch needs more of it.",
            ("h200/throughput-llama-8b.json", "throughput-llama-8b.json"),
            _throughput,
            "throughput-llama-8b.svg",
        ),
        Section(
            "Padded batch",
            "16 sequences of 8K to 32K tokens, beside 16 of 32K without padding.",
            ("h200/throughput-ragged-llama-8b.json",),
            lambda results: [("", without_empty_columns(batch_tables.throughput(results[0])))],
        ),
        Section(
            "Longest context under a cap",
            "One sequence, `shadowkv`, `gpu_memory=\"8GiB\"`. *In all* includes the weights. *To get memory* "
            "includes page-locking, *to fill* is writing the keys and values.",
            ("reach-llama-8b.json",),
            _one(batch_tables.reach),
        ),
        Section(
            "Buffer pages",
            "128K tokens in host memory, `shadowkv`, H200: page frames beside those that one step needs. "
            "The last column has the hit rates of the next section.",
            ("h200/buffers-llama-8b.json", "traces.json"),
            _buffers,
        ),
        Section(
            "Hit rates of a real model",
            "SmolLM2 reads a play, or answers (*greedy*). *Buffer n*: page frames for n times the pages of a step. "
            "Hit rate of bucketed LRU, and in brackets its difference from exact LRU in points.",
            ("traces.json",),
            _one(batch_tables.traced),
        ),
        Section(
            "Page tables",
            "Bytes that say where pages are, for sequences of 32,768 tokens of an 8B model. "
            "*Flat* is one entry for each page of the longest context.",
            ("metadata.json",),
            _one(tables_of),
        ),
    ],
    "Quality": [
        Section(
            "`bisection` and `shadowkv`",
            "KL divergence of the next token from dense attention (nats, lower is better), and attention mass read as a "
            "fraction of what the best tokens hold. Estimates do not count in the mass. The questions are about a number "
            "hidden in a play (*passkey*), one of six such numbers, three numbers, one found by way of two names (*chain*), "
            "or a place.",
            ("quality-bisection-smollm2.json", "quality-bisection-qwen2.5-0.5b.json", "retrieval-bisection-qwen2.5-0.5b.json"),
            _lost(),
        ),
        Section(
            "`retroinfer`, `shadowkv` and the best tokens",
            "*Oracle* attends to the best tokens of each KV head, which only dense attention knows.",
            ("quality-methods-smollm2.json", "quality-methods-qwen2.5-0.5b.json", "retrieval-methods-qwen2.5-0.5b.json"),
            _lost("bisection"),
        ),
        Section(
            "Beside kvpress, the best tokens and a window",
            "Every row attends to as many tokens as `shadowkv` does; `quest` attends to more, because of its dense layers. "
            "kvpress drops tokens for good: its presses saw the question, except *unseen*. *window* reads sinks and recent "
            "tokens alone, `shadowkv:model` keeps summaries in the model's dtype, and `snapkv8` observes 8 tokens "
            "instead of 64.",
            ("quality-SmolLM2-135M-Instruct.json", "quality-qwen2.5-0.5b.json", "retrieval-qwen2.5-0.5b.json"),
            lambda results: [("", summary(results))],
            "quality.svg",
        ),
        Section(
            "More budgets",
            "Those of [the comparison at equal times](#same-time-instead-of-same-budget) that are not above.",
            ("quality-budgets-smollm2.json", "quality-budgets-qwen2.5-0.5b.json"),
            _lost(),
        ),
        Section(
            "Longer contexts",
            "One play each.",
            ("quality-16k-qwen2.5-0.5b.json", "quality-32k-qwen2.5-0.5b.json"),
            _lost(),
        ),
        Section(
            "A model with sliding windows",
            "15 of the 18 layers of Gemma 3 270M have a window; two of the others are dense under `quest`.",
            ("quality-bisection-gemma3-270m.json", "quality-gemma3-270m.json"),
            _lost(),
        ),
        Section(
            "SeerAttention's gates",
            "Gates of SmolLM2, before (`seer-untrained`) and after training with `python -m spin_hf.distill`.",
            ("quality-seer-smollm2.json",),
            _lost(),
        ),
        Section(
            "Training these gates",
            "KL of the gates' scores from the model's own attention, on text that was held out.",
            ("distill-smollm2.json",),
            _one(gates),
        ),
        Section(
            "`retroinfer` at larger budgets",
            "One play each.",
            ("quality-retroinfer-smollm2.json", "quality-retroinfer-qwen2.5-0.5b.json"),
            _lost(),
        ),
        Section(
            "Pages in int8",
            "`+int8pages` is `cpu_dtype=\"int8\"` with all pages in host memory. At 1/1 every token is attended to.",
            ("quality-int8-pages-smollm2.json", "quality-int8-pages-qwen2.5-0.5b.json"),
            _lost(),
        ),
        Section(
            "Passkey",
            "A sentence hidden at six depths of a play; `shadowkv`.",
            ("passkey.json",),
            _one(passkey.table),
        ),
    ],
}  # fmt: skip
