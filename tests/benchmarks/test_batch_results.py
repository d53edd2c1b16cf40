"""Tables and figure of throughput, reach, buffers and equal times from rows made up here, and the files that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.common.record import RESULTS
from benchmarks.memory import reach, traces
from benchmarks.speed import batch_tables, equal_time, throughput
from spin_hf import Quest

K = 1024
COMMON = {"shape": "llama-8b", "gpu": "H100", "dtype": "bfloat16", "budget_tokens": 2048}


def _kept(pattern: str) -> list[Path]:
    return sorted(RESULTS.rglob(pattern))


def _spin(tokens: int, batch: int, rate: float, frames: int, **more: Any) -> dict[str, Any]:
    return {
        "tokens": tokens, "cache": "spin", "batch": batch, "tokens_per_s": rate, "tpot_ms": batch / rate * 1e3,
        "page_frames": frames, "hit_rate": 0.98, "loads_mib_per_token": 4.5, "peak_gpu_gib": 51.2, "cpu_gib": 112.0, "run": "a",
        **more,
    }  # fmt: skip


def _throughput() -> dict[str, Any]:
    rows = [
        _spin(128 * K, 7, 620.0, 3000), _spin(128 * K, 1, 108.0, 0), _spin(128 * K, 7, 610.0, 3000, cache="spin ragged"),
        {"tokens": 128 * K, "cache": "spin", "batch": 14, "tpot_ms": None, "why": "needs 1 bytes, cpu_memory is 0", "run": "a"},
        {"tokens": 128 * K, "cache": "dense graph", "batch": 3, "tokens_per_s": 120.0, "tpot_ms": 25.0, "peak_gpu_gib": 49.0,
         "run": "a"},
        {"tokens": 128 * K, "cache": "dense graph", "batch": 4, "tpot_ms": None, "why": "out of GPU memory", "run": "a"},
        _spin(32 * K, 28, 1500.0, 900),
    ]  # fmt: skip
    return {**COMMON, "rows": rows, "ratios": throughput.ratios(rows)}


def test_table_of_rates() -> None:
    lines = batch_tables.throughput(_throughput())
    assert lines[2] == "| 128K | `SpinCache(model)` | 1 | **108** | 9.3 |  |  | 51.2 GiB |  |"
    assert lines[3] == "| 128K | `SpinCache(model)` | 7 | **620** | 11.3 | 98.0% | 4.5 | 51.2 GiB | 112 GiB |"
    assert lines[4] == "| 128K | `SpinCache(model)` | 14 | host memory |  |  |  |  |  |"
    assert lines[5].startswith("| 128K | the same, a quarter of the context to all of it | 7 | 610 |")
    assert lines[7] == "| 128K | dense attention in a CUDA graph | 4 | out of GPU memory |  |  |  |  |  |"
    assert lines[8].startswith("| 32K |")
    assert len({line.count("|") for line in lines}) == 1
    assert batch_tables.ratios(_throughput())[2:] == [
        "| 128K | dense attention in a CUDA graph | 620 (7) | 120 (3) | **5.2×** | 4× |"
    ]


def test_tables_of_reach_and_buffers() -> None:
    row = _spin(640 * K, 1, 92.0, 5000, gpu_memory="8GiB", longest=False, held_gib=7.9, held_over_cap=-0.012, in_all_gib=23.4,
                reserve_s=8.0, fill_s=5.0)  # fmt: skip
    lines = batch_tables.reach({**COMMON, "rows": [row]})
    assert lines[2] == (
        '| 640K | `"8GiB"` | **10.9** | 98.0% | 112 GiB | 7.90 GiB | -1.2% | 23.4 GiB | 8.0 s | 5.0 s |'
    )
    rows = [_spin(128 * K, 1, 100.0, 267 * (1 + m), multiple=m, gpu_memory=1 << 30) for m in (10, 0)]
    traced = {"rows": {
        "budget 128, play": {"buffers": {"0": {"bucketed_lru": {"hit_rate_with_mandatory": 81.0}}}},
        "budget 512, play": {"buffers": {"0": {"bucketed_lru": {"hit_rate_with_mandatory": 84.0}}}},
    }}  # fmt: skip
    lines = batch_tables.buffers({**COMMON, "rows": rows}, traced)
    assert lines[2] == "| 0 | 267 | 1.00 GiB | 98.0% | 4.5 | **10.0** | 81.0 to 84.0 % |"
    assert lines[3] == "| 10 | 2,937 | 1.00 GiB | 98.0% | 4.5 | **10.0** |  |"


def test_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.speed import plot_throughput

    plot_throughput.draw(_throughput(), tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 5000


def test_everything_that_is_kept_makes_tables() -> None:
    made = batch_tables.sections(RESULTS)
    assert all(len(lines) > 2 and len({line.count("|") for line in lines}) == 1 for lines in made.values())
    assert "Hit rates of SmolLM2's traces" in made


def test_equal_times_beside_what_is_lost(tmp_path: Path) -> None:
    def text(kl: float, mass: float | None) -> dict[str, float]:
        return {"kl": kl} | ({} if mass is None else {"of_oracle": mass})

    for kind, model, rows in (
        ("bisection", "smollm2", {"quest, 1/64, a": text(0.2, 0.8), "quest, 1/64, b": text(0.4, 0.9)}),
        ("budgets", "smollm2", {"quest, 1/64, a": text(9.0, 0.1), "quest, 1/4, a": text(0.1, 0.95)}),
        ("bisection", "qwen2.5-0.5b", {"quest, 1/64, a": text(0.5, 0.7)}), ("budgets", "qwen2.5-0.5b", {}),
    ):  # fmt: skip
        (tmp_path / f"quality-{kind}-{model}.json").write_text(json.dumps({"rows": rows}))
    shares = [equal_time.method_and_share(text) for text in ("quest:64", "quest:4")]
    tasks = equal_time.tasks_of(shares, [2048, 4096], "1GiB")
    assert [(task.tokens, task.share, task.gpu_memory) for task in tasks] == [
        (2048, 64, "auto"), (4096, 64, "auto"), (2048, 4, "auto"), (4096, 4, "auto"), (4096, 64, "1GiB"), (4096, 4, "1GiB"),
    ]  # fmt: skip
    measured = [
        (2048, 64, "auto", 3.0, 0.0, "1"), (4096, 64, "auto", 4.0, 0.0, "1"), (4096, 64, "1GiB", 5.0, 7.4, "1"),
        (4096, 64, "1GiB", 6.0, 8.4, "2"), (2048, 4, "auto", 9.0, 0.0, "1"),
    ]  # fmt: skip
    names = ("tokens", "share", "gpu_memory", "tpot_ms", "loads_mib_per_token", "run")
    made: list[dict[str, Any]] = [{"method": "quest", **dict(zip(names, row, strict=True))} for row in measured]
    assert equal_time.table(made, shares, "1GiB", tmp_path) == [
        "| method | share | 2K | 4K | 4K, 1GiB | MiB loaded | KL, mass, smollm2 | KL, mass, qwen2.5-0.5b |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| `quest` | 1/64 | 3.0 | 4.0 | 6.0 | 8 | 0.300, 85.0% | 0.500, 70.0% |",
        "| `quest` | 1/4 | 9.0 |  |  |  | 0.100, 95.0% |  |",
    ]


def test_budgets_are_shares_of_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(equal_time, "spin_rows", lambda *arguments: [asked.append(arguments) or {"tpot_ms": 1.0}])
    model = SimpleNamespace(config=None)
    bench = equal_time.Bench(model, record=None, budget=0, weights=7)
    (made,) = equal_time.rows_of(equal_time.Task(131072, "quest", 32, "8GiB"), bench)
    assert made == {"method": "quest", "share": 32, "budget": 4096, "tpot_ms": 1.0}
    assert asked == [(model, 131072, 4096, "8GiB", Quest(), ["replayed"], None, 7)]


@pytest.mark.parametrize("text", ["quest", "quest:", "quest:0", "quest:1/4", "best:64"])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SystemExit):
        equal_time.parse(["--shares", "quest:64", text])
    assert equal_time.parse(["--shares", "quest:64"]).shares == [("quest", 64)]


def test_the_kept_traces_have_the_buffers_that_are_measured() -> None:
    for row in json.loads((RESULTS / "traces.json").read_text())["rows"].values():
        assert [int(multiple) for multiple in row["buffers"]] == traces.BUFFERS
        assert [entry["frames"] for entry in row["buffers"].values()] == [
            (1 + m) * row["step_pages"] for m in traces.BUFFERS
        ]
        rates = [entry["exact_lru"]["hit_rate"] for entry in row["buffers"].values()]
        assert rates == sorted(rates)
        assert all(abs(entry["bucketed_minus_exact_points"]) < 1 for entry in row["buffers"].values())


def test_kept_rows_are_of_runs_that_are_kept() -> None:
    kinds = ("throughput", "reach", "buffers", "equal-time")
    for file in (file for kind in kinds for file in _kept(f"{kind}-*.json")):
        held = json.loads(file.read_text())
        assert held["rows"], file
        for row in held["rows"]:
            assert row["run"] in held["runs"], file
            assert row["tpot_ms"] or row["why"], file
            if row["cache"].startswith("spin") and row["tpot_ms"]:
                assert row["captured"] > 0, file  # replayed, not eager
                assert 0.7 < row["overlap_at_1"] < 0.8, file  # as `traces.json` says of a real model
            if "multiple" in row and row["tpot_ms"]:
                assert row["page_frames"] == (1 + row["multiple"]) * row["step_pages"], file
        if "ratios" in held:
            assert held["ratios"] == throughput.ratios(held["rows"]), file
        if "targets" in held:
            assert held["targets"] == reach.targets(held["rows"]), file
