"""What may silently go wrong between a measurement and the README: rows of unlike runs mixed, ratios of unlike runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.record import MixedError, Record, fingerprint, newest
from benchmarks.speed import decode, decode_tables

COMMON = {"shape": "llama-8b", "sources": "abc", "versions": {"torch": "1"}, "dtype": "bf16", "budget_tokens": 2048,
          "gpu": "none"}  # fmt: skip


def _record(file: Path, append: bool = False, **changed: Any) -> Record:
    return Record({**COMMON, **changed}, "command", file, file, append)


def _spin(tokens: int, ms: float, cap: str = "auto", overlap: str = "replayed") -> dict[str, Any]:
    return {
        "tokens": tokens, "cache": "spin", "overlap": overlap, "gpu_memory": cap, "tpot_ms": ms, "spread": 0.2,
        "overlap_at_1": 0.75, "cpu_gib": 0.0 if cap == "auto" else 16.0, "loads_mib_per_token": 80.0, "hit_rate": 0.7,
        "peak_gpu_gib": 17.0, "first_call_s": 0.3,
    }  # fmt: skip


def test_runs_of_the_same_sources_stand_side_by_side(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    first = _record(file)
    first.add(_spin(4096, 10.0))
    first.add(_spin(4096, 11.0))  # measured again by the same run
    second = _record(file, append=True)
    second.add(_spin(4096, 12.0))
    held = json.loads(file.read_text())
    assert [row["tpot_ms"] for row in held["rows"]] == [11.0, 12.0]
    assert set(held["runs"]) == {first.run, second.run}
    assert second.spread(4096) == 0.2
    assert second.spread(8192) is None
    assert newest(held["rows"], tokens=4096)["tpot_ms"] == 12.0


def test_other_sources_do_not_mix(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    _record(file).add(_spin(4096, 10.0))
    with pytest.raises(MixedError, match="sources: abc there, xyz now"):
        _record(file, append=True, sources="xyz")
    anew = _record(file, sources="xyz")
    assert anew.left_behind == ["sources"]
    assert not anew.rows


def test_the_fingerprint_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    seen = {fingerprint(tmp_path)}
    (tmp_path / "a.py").write_text("2")
    seen.add(fingerprint(tmp_path))
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    seen.add(fingerprint(tmp_path))
    assert len(seen) == 3


def test_a_factor_is_of_one_run(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    first = _record(file)
    first.add(_spin(131072, 10.0))
    first.add(_spin(131072, 13.0, "4GiB"))
    first.add({"tokens": 131072, "cache": "dynamic", "tpot_ms": 70.0})
    second = _record(file)
    second.add(_spin(131072, 8.0))
    second.add({"tokens": 131072, "cache": "default", "tpot_ms": 7.5})
    second.add({"tokens": 131072, "cache": "static", "tpot_ms": 80.0})
    second.add({"tokens": 131072, "cache": "dense graph", "tpot_ms": None, "why": "out of GPU memory"})
    lines = decode_tables.times([json.loads(file.read_text())])
    cells = [
        "Llama-3.1-8B shape, 128K",
        "**8.0 to 10.0**",
        "7.5",
        "",
        "70.0 (7.0×)",
        "",
        "80.0 (10.0×)",
        "does not fit",
        "",
    ]
    assert lines[2] == decode_tables.row(*cells)
    assert lines[3].startswith('| 128K, `gpu_memory="4GiB"` | **13.0** |')


def test_what_is_missing_is_measured_with_what_its_ratio_needs(tmp_path: Path) -> None:
    record = _record(tmp_path / "results.json")
    tasks = decode.plan([131072], ["floor", "static"])
    assert decode.left_to_do(tasks, record) == tasks
    for overlap in ("replayed", "lowest", "highest"):
        record.add(_spin(131072, 10.0, overlap=overlap))
        record.add(_spin(131072, 10.0, "4GiB", overlap))
    record.add({"tokens": 131072, "cache": "floor", "tpot_ms": 8.0})
    record.add({**_spin(131072, 10.0)}, kernels=True)
    left = [(task.name, task.gpu_memory, task.selections) for task in decode.left_to_do(tasks, record)]
    assert left == [("spin", "auto", ("replayed",)), ("kernels", "4GiB", ()), ("static", None, ())]


def test_the_profiler_runs_last_and_the_rest_by_priority() -> None:
    tasks = decode.plan(decode.TOKENS, ["floor", "static"])
    chosen = decode.within(tasks, 300.0)
    assert sum(task.seconds for task in chosen) <= 300
    assert chosen[0] == tasks[0]
    names = [task.name for task in chosen]
    assert "kernels" in names
    assert set(names[names.index("kernels") :]) == {"kernels"}


def test_tables_and_figure(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    record = _record(file)
    for tokens in (8192, 131072):
        for overlap in ("lowest", "replayed", "highest"):
            record.add(_spin(tokens, 10.0, overlap=overlap))
        record.add({"tokens": tokens, "cache": "floor", "tpot_ms": 8.0})
        record.add({"tokens": tokens, "cache": "dynamic", "tpot_ms": None, "why": "out of GPU memory"})
    record.add({
        "tokens": 131072, "cache": "spin", "gpu_memory": "auto", "us_per_layer": {"score_kernel": 10.0},
        "spin_us_per_layer": 10.0, "gb_s": {"score": 2500.0}, "bytes_per_layer": {"loaded": 0},
    }, kernels=True)  # fmt: skip
    result = json.loads(file.read_text())
    assert (
        decode_tables.overlaps([result])[2] == "| Llama-3.1-8B shape, 8K | 75%: 10.0 ms | 75%: 10.0 ms | 75%: 10.0 ms |"
    )
    assert decode_tables.kernels([result])[2] == "| Llama-3.1-8B shape, 128K | 10.0 | **10.0** | 2,500 |  | 0.00 |"
    assert len(decode_tables.memory([result])) == 4
    pytest.importorskip("matplotlib")
    from benchmarks.speed import plot_decode

    plot_decode.draw(result, tmp_path / "figure.svg")
    assert (
        "SpinCache(model)" in (tmp_path / "figure.svg").read_text() or (tmp_path / "figure.svg").stat().st_size > 5000
    )
