"""The results file of `quality.py`, `retrieval.py` and `answer_prompts.py`: named rows of one task. They are kept when a run
stops, and used by the next.

    file    what all rows have in common ("about") | commands that measured them | rows {name: row}, one a line

A row measured for something else (another model, length, version, or package source) never mixes with those of now: if what is
in common differs, the file is begun anew. Written after every row, under another name first, so that it is always whole.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Rows:
    """Rows by name.

    Args:
        output: the file; need not exist.
        about: what all rows have in common.
        command: what measures those that are missing.
        again: whether to measure them all.
    """

    def __init__(self, output: Path, about: dict[str, Any], command: str, again: bool = False) -> None:
        self.output, self.about, self.command = output, json.loads(json.dumps(about)), command
        held = json.loads(output.read_text()) if output.exists() and not again else {}
        same = {key: held.get(key) for key in self.about} == self.about
        self.commands: list[str] = held["commands"] if same and held else []
        self.rows: dict[str, Any] = held["rows"] if same and held else {}

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def __getitem__(self, name: str) -> dict[str, Any]:
        row: dict[str, Any] = self.rows[name]
        return row

    def put(self, name: str, row: dict[str, Any], order: Sequence[str] = ()) -> None:
        """Keep a row and write the file, with rows in this order, and others behind them as they came."""
        self.rows[name] = row
        self.rows = {name: self.rows[name] for name in dict.fromkeys([*order, *self.rows]) if name in self.rows}
        if self.command not in self.commands:
            self.commands.append(self.command)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({**self.about, "commands": self.commands}, indent=1).removesuffix("\n}")
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in self.rows.items())
        unfinished = self.output.with_suffix(".part")
        unfinished.write_text(f'{head},\n "rows": {{\n{lines}\n }}\n}}\n')
        unfinished.replace(self.output)


def command_line(module: str, *paths: str | None) -> str:
    """How `benchmarks.<module>` was called, with names instead of these paths, which are of this machine."""
    words = [Path(word).name if word in paths else word for word in sys.argv[1:]]
    return " ".join(["python -m", f"benchmarks.{module}", *(f'"{word}"' if " " in word else word for word in words)])
