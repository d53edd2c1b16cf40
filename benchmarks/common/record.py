"""The results file of the long benchmarks on a GPU: rows of several runs side by side.

    file      what all rows have in common | runs {id: command, time, machine} | rows | kernels | what is made of the rows
    common    GPU, shape, dtype, budget, versions, and a hash of the package's sources: results of anything else do not mix
    row       `run` names the process that measured it; a ratio is only made of two rows of one run

Written after every row, so that a run that is cut off loses one.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2] / "spin_hf"
RESULTS = Path(__file__).resolve().parents[1] / "results"
_SAME_ROW = ("tokens", "load", "cache", "method", "share", "overlap", "gpu_memory", "batch", "multiple")


class MixedError(Exception):
    """Results of other sources, another machine or another task stand in the file."""


def fingerprint(package: Path = PACKAGE) -> str:
    """A hash of the package's sources, by their names and contents."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class Record:
    """The results of one file.

    Args:
        common: what all rows have in common.
        command: of this run.
        source: file whose rows are kept if they have the same in common; need not exist.
        output: file that is written.
        append: whether a `source` of something else is an error; if not, its rows are left behind.
    Raises:
        MixedError: it is one.
    """

    def __init__(self, common: dict[str, Any], command: str, source: Path, output: Path, append: bool = False) -> None:
        self.common, self.output = json.loads(json.dumps(common)), output
        held = json.loads(source.read_text()) if source.exists() else {}
        self.left_behind = [key for key, value in self.common.items() if held.get(key) != value] if held else []
        if self.left_behind and append:
            differences = "; ".join(f"{key}: {held.get(key)} there, {common[key]} now" for key in self.left_behind)
            raise MixedError(f"{source}: expected results of what is measured now, found others ({differences})")
        if self.left_behind:
            held = {}
        self.runs: dict[str, Any] = held.get("runs", {})
        self.rows: list[dict[str, Any]] = held.get("rows", [])
        self.kernels: list[dict[str, Any]] = held.get("kernels", [])
        self.run = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        while self.run in self.runs:
            self.run += "+"
        self.made: dict[str, Any] = {}
        """What is made of the rows, by name: written behind them, made anew by every run."""
        self.started = time.perf_counter()
        self.runs[self.run] = {"command": command, "seconds": 0.0}

    def about_run(self, **facts: Any) -> None:
        """Note something of this run."""
        self.runs[self.run] |= facts

    def add(self, row: dict[str, Any], kernels: bool = False) -> None:
        """Keep a row of this run and write the file; one of the same thing by the same run is replaced."""
        row = {**row, "run": self.run}
        rows = self.kernels if kernels else self.rows
        rows[:] = [old for old in rows if (old["run"], *identity(old)) != (self.run, *identity(row))] + [row]
        rows.sort(key=lambda row: (row["tokens"], row["run"]))
        self.write()

    def write(self) -> None:
        """Write the file; under another name first, so that it is always whole."""
        self.runs[self.run]["seconds"] = round(time.perf_counter() - self.started, 1)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        result = {**self.common, "runs": self.runs, "rows": self.rows, "kernels": self.kernels, **self.made}
        unfinished = self.output.with_suffix(".part")
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        unfinished.replace(self.output)

    def spread(self, tokens: int) -> float | None:
        """The spread that replays a real model's overlap at this context, if it has been found."""
        found = [row["spread"] for row in self.rows if row["tokens"] == tokens and row.get("overlap") == "replayed"]
        return found[-1] if found else None


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is about."""
    return tuple(row.get(key) for key in _SAME_ROW)


def newest(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
    """The row of the newest run that has these values."""
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return max(found, key=lambda row: row.get("run", ""), default=None)
