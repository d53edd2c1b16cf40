"""The benchmark of models on several GPUs: what is compared, and all of it on the CPU with a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import rank_rows, several_gpus

ROOT = Path(several_gpus.__file__).parents[2]


def _row(way: str, name: str, tpot_ms: float | None, tokens: int = 32768) -> dict[str, Any]:
    return {"way": way, "row": name, "tokens": tokens, "tpot_ms": tpot_ms}


def test_ratios_compare_rows_of_one_context() -> None:
    rows = [
        _row("tp", "spin", 5.0), _row("tp", "dynamic", 50.0), _row("tp", "dense graph", 6.0), _row("one", "spin", 8.0),
        _row("one", "dynamic", None), _row("map", "spin", 9.0), _row("one", "spin", 10.0, tokens=131072),
    ]  # fmt: skip
    assert several_gpus.ratios(rows) == [
        {"way": "tp", "tokens": 32768, "dynamic / spin": 10.0, "dense graph / spin": 1.2, "of one GPU": 0.625},
        {"way": "one", "tokens": 32768},
        {"way": "map", "tokens": 32768, "of one GPU": 1.125},
        {"way": "one", "tokens": 131072},
    ]


def test_processes_get_the_same_options() -> None:
    given = several_gpus.parse(
        ["--gpus", "4", "--shape", "llama-70b", "--tokens", "32768", "--rows", "spin", "dense graph"]
    )
    again = several_gpus.parse([*several_gpus._same(given), "--worker", '{"way": "tp"}'])
    assert again.worker == {"way": "tp"}
    for name in ("gpus", "shape", "tokens", "rows", "budget", "device"):
        assert getattr(again, name) == getattr(given, name)


def test_what_cannot_be_measured_says_why() -> None:
    given = several_gpus.parse(["--shape", "tiny", "--device", "cpu"])
    bench = rank_rows.Bench(given, "one", 1)
    assert bench.batch_of(64) == 4
    assert "by hand" in bench.row("dense batch", 64)["why"]
    row = bench.row("spin", 64)
    assert row["tpot_ms"] is not None
    assert row["captured"] == 0


@pytest.mark.slow
def test_all_of_it_on_the_cpu(tmp_path: Path) -> None:
    if torch._C._get_accelerator().type != "cpu":
        pytest.skip("transformers places ranks on GPUs with this build of torch")
    output = tmp_path / "result.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.several_gpus",
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--tokens",
        "200",
    ]
    done = subprocess.run(
        [*command, "--seconds", "300", "--output", str(output)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads(output.read_text())
    assert [way["ended"] for way in made["ways"]] == ["in time"] * 3, done.stderr
    measured = {(row["way"], row["row"]) for row in made["rows"]}
    assert measured == {(way, name) for way in several_gpus.WAYS for name in rank_rows.ROWS}
    assert not [row for row in made["rows"] if "failed" in row]
