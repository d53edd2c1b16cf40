"""Tables of the rows of `prefixes.py`. Rows that were not measured, or failed, are left out."""

from __future__ import annotations

from typing import Any

from benchmarks.speed.batch_tables import head
from benchmarks.speed.decode_tables import row

Result = dict[str, Any]
Lines = list[str]

METHODS = {"fitted": "`fitted`", "bisection": "`bisection`", "shadowkv": '`shadowkv`, `gpu_memory="2GiB"`'}
FIRST_TOKEN = {
    "prefill, dynamic": "prefill, `DynamicCache`", "prefill, spin": "prefill, `SpinCache(model)`",
    "memory store, hit": "restored from memory",
} | {
    f"disk store, {method}, hit, {files}": f"restored from disk, {files}, {name}"
    for method, name in METHODS.items() for files in ("warm", "cold")
}  # fmt: skip
STORING = {"memory store, first call": "in memory"} | {
    f"disk store, {method}, first call": f"on disk, {name}" for method, name in METHODS.items()
}
READING = {
    f"disk store, {method}, {what}": f"{label}, {name}"
    for method, name in METHODS.items()
    for what, label in (
        ("plain reads, warm", "reading the files, warm"), ("plain reads, cold", "reading the files, cold"),
        ("from_pretrained, warm, verify=True", "`from_pretrained`, warm"),
        ("from_pretrained, warm, verify=False", "`from_pretrained(verify=False)`, warm"),
    )
}  # fmt: skip
QUESTIONS = {
    "forks": "a fork for each", "forks, all alive": "a fork for each, all alive until the end",
    "forks, one batch": "a fork of eight sequences, one call", "deepcopy": "`deepcopy` of `DynamicCache` for each",
    "prefills": "a prefill for each, `DynamicCache`",
}  # fmt: skip
COPIES = {
    "fork, first": "first fork", "fork, later": "later forks", "fork, deepcopy of DynamicCache": "`deepcopy` of `DynamicCache`",
}  # fmt: skip
AGENT = {"by hand": "`DynamicCache` kept by hand", "none kept": "none kept", "store": "`enable(model, store=...)`"}


def tables(result: Result) -> list[tuple[str, Lines]]:
    """All tables, with titles."""
    rows = {name: each for name, each in result["rows"].items() if "seconds" in each or "lookup_ms" in each}
    made: dict[str, Lines] = {
        "Time to the first token": head("prompt", "seconds", "restoring, s", "peak, GiB"),
        "First call of a store": head("store", "seconds", "of these storing", "then until stored", "GiB"),
        "Reading the files": head("", "seconds", "GB/s"),
        "Eight questions about one document": head(
            "", "seconds", "copies, s", "answers, s", "peak, GiB", "of one prefill"
        ),
        "Copies of a cache": head("", "ms", "GPU memory, MiB"),
        "Finding a prompt": head("index", "prefixes", "index alone, ms", "whole lookup, ms"),
        "An agent's turns": head("cache", "to the first tokens, s", "last turn, s"),
    }
    first, storing, reading, asked, copies, finding, agent = made.values()
    first += lines(rows, FIRST_TOKEN, ("seconds", ".3f"), ("restore_s", ".3f"), ("peak_gib", ".1f"))
    storing += lines(rows, STORING, ("seconds", ".2f"), ("keep_s", ".2f"), ("stored_s", ".2f"), ("disk_gib", ".1f"))
    reading += lines(rows, READING, ("seconds", ".2f"), ("gb_s", ".1f"))
    asked += lines(
        rows, {f"questions, {name}": label for name, label in QUESTIONS.items()},
        ("seconds", ".2f"), ("copies_s", ".3f"), ("answers_s", ".2f"), ("peak_gib", ".1f"), ("memory_ratio", ".2f"),
    )  # fmt: skip
    scaled = {
        name: {"ms": each["seconds"] * 1e3, "mib": each["gpu_bytes"] / 2**20}
        for name, each in rows.items()
        if "gpu_bytes" in each
    }
    copies += lines(scaled, COPIES, ("ms", ".2f"), ("mib", ",.2f"))
    places = {f"lookup, {where}": where for where in ("memory", "disk")}
    finding += lines(rows, places, ("prefixes", ","), ("find_ms", ".1f"), ("lookup_ms", ".1f"))
    turns = {f"agent loop, {name}": label for name, label in AGENT.items()}
    agent += lines(rows, turns, ("seconds", ".2f"), ("last_turn_s", ".2f"))
    return [(title, table) for title, table in made.items() if len(table) > 2]


def lines(rows: Result, names: dict[str, str], *columns: tuple[str, str]) -> Lines:
    """A line for each of `names` that was measured: its label, and columns by their keys and formats."""
    return [
        row(label, *(format(rows[name][key], form) if rows[name].get(key) is not None else "" for key, form in columns))
        for name, label in names.items()
        if name in rows
    ]
