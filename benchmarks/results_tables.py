"""Tables of docs/results.md, made from the contents of results files.

    one_layer, lost, ...      a file -> lines of one table
    of_each, losses, ...      the files of a section -> all its tables, with titles

`results_sections.py` says which files each section shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.common.record import RESULTS, newest
from benchmarks.memory import metadata
from benchmarks.quality.quality_tables import kl_table, task_table
from benchmarks.speed import batch_tables, decode_tables, equal_time
from benchmarks.speed.decode_tables import ms

Result = dict[str, Any]
Lines = list[str]
Tables = Callable[[list[Result]], list[tuple[str, Lines]]]
"""From the files of a section to its tables; a title may be empty."""


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
    "dynamic, chunks of 2048": "`DynamicCache`, `prefill_chunk_size=2048`",
    "dynamic offloaded, chunks of 4096": "`DynamicCache(offloading=True)`, `prefill_chunk_size=4096`",
    "spin": "`SpinCache(model)`", "spin, chunks of 2048": "`SpinCache(model)`, `generate(prefill_chunk_size=2048)`",
    "spin, chunks of 4096": "`SpinCache(model, prefill_chunk_size=4096)`",
    "spin, whole": "`SpinCache(model, prefill_chunk_size=None)`",
    "shadowkv": '`SpinCache(model, "shadowkv")`', "shadowkv 2GiB": '`SpinCache(model, "shadowkv", gpu_memory="2GiB")`',
    **{f"spin, sparse, {share} % of blocks": f"`SpinCache(model, prefill=\"sparse\")`, {share} % of blocks"
       for share in (8, 15, 30)},
}  # fmt: skip
"""Rows of `benchmarks/speed/prefill.py`, and how the page calls them."""


def prompts(result: Result) -> Lines:
    """Seconds and memory of a prompt and its first new tokens, by prompt and cache."""
    lines = head("tokens", "new tokens", "cache", "seconds", "peak, GiB", "torch limited to, GiB")
    rows = [each for each in result["rows"].values() if "seconds" in each]
    for each in sorted(rows, key=lambda each: (each["tokens"], each["new_tokens"], list(PROMPTS).index(each["way"]))):
        lines.append(
            row(
                f"{each['tokens']:,}", str(each["new_tokens"]), PROMPTS[each["way"]], f"{each['seconds']:.2f}",
                f"{each['peak_gib']:.1f}", str(each.get("gpu_gib") or ""),
            )
        )  # fmt: skip
    return lines


def new_machine(result: Result) -> Lines:
    """Seconds of prompts and their first new tokens, with and without compiled kernels."""
    lines = head("sequences", "tokens", "new tokens", "no kernels compiled", "a new process", "a second answer")
    for each in result["rows"].values():
        took = (f"{each[when]['all_s']:.1f} s" for when in ("new", "again", "warm"))
        lines.append(row(str(each["batch"]), f"{each['tokens']:,}", str(each["new_tokens"]), *took))
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


# From the files of a section to its tables: (title, table)


def of_each(table: Callable[[Result], Lines]) -> Tables:
    """A table for each file, with GPU and shape as title where there are several."""

    def tables(results: list[Result]) -> list[tuple[str, Lines]]:
        several = len(results) > 1
        return [(result.get("gpu", result.get("model", "")) if several else "", table(result)) for result in results]

    return tables


def of_all(table: Callable[[list[Result]], Lines]) -> Tables:
    """One table of all files, without empty columns."""
    return lambda results: [("", without_empty_columns(table(results)))]


def losses(leave_out: str = "") -> Tables:
    """KL and mass, or answers: a table for each file. Rows of the method `leave_out` are left out."""
    return lambda results: [lost(result, leave_out) for result in results]


def at_equal_time(results: list[Result]) -> list[tuple[str, Lines]]:
    """Methods side by side, each with the share of the context that takes equal time."""
    rows = [entry for result in results for entry in result["rows"]]
    shares = sorted({(entry["method"], entry["share"]) for entry in rows}, key=lambda pair: (pair[0], -pair[1]))
    return [("", equal_time.table(rows, shares, "8GiB", RESULTS))]


def buffers(results: list[Result]) -> list[tuple[str, Lines]]:
    """Times by number of buffer pages, with the hit rates of traces. The files: buffers, traces."""
    return [("", batch_tables.buffers(results[0], results[1]))]


def throughput(results: list[Result]) -> list[tuple[str, Lines]]:
    """Tokens per second of batches, and their ratios to dense attention, for each file."""
    tables = []
    for result in results:
        title = f"{result['gpu']}" + (
            f", {result['gpu_memory_gib']:.0f} GiB of it" if "gpu_memory_gib" in result else ""
        )
        tables.append((title, without_empty_columns(batch_tables.throughput(result))))
        if result["ratios"]:
            tables.append(("", batch_tables.ratios(result)))
    return tables


def date_measured(result: Result) -> str:
    """The day of the first run, as a title."""
    return f"Measured {min(day(run) for run in result['runs'])}"
