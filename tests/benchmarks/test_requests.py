"""Loads of requests: what is simulated, planned and compared, and whole rows of a tiny model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig

from benchmarks.common.campaign import Bench
from benchmarks.common.record import Record
from benchmarks.speed import request_loads, request_systems, request_tables, requests
from benchmarks.speed.request_loads import Arrival, DenseTimes, best_static, capacity, figures, load, simulate
from tests.support.tiny_llama import tiny_llama

LOADS = ("burst-32k", "poisson-95", "questions")
"""Of whole rows."""
DENSE = DenseTimes(step_s=1.0, step_token_s=0.0, prompt_token_s=0.1, prompt_pair_s=0.0, room_tokens=60)


def test_requests_that_join_and_leave() -> None:
    """The second is read beside the first, the third waits for room."""
    arrivals = [Arrival(0.0, 10, 4), Arrival(0.5, 20, 2), Arrival(0.5, 30, 2)]
    (first, end, _), (second, _, _), (third, last, _) = simulate(arrivals, DENSE)
    assert first == pytest.approx(1.0)
    assert second == pytest.approx(3.0)
    assert third == pytest.approx(7.0), "the second has ended"
    assert last == pytest.approx(8.0)
    assert end == pytest.approx(9.0)


def test_static_batches_wait_for_their_longest() -> None:
    arrivals = [Arrival(0.0, 10, 2), Arrival(0.0, 10, 5), Arrival(0.0, 10, 2)]
    times = simulate(arrivals, DENSE, 2)
    assert [round(first, 6) for first, _, _ in times] == [2.0, 2.0, 7.0]
    assert [round(end, 6) for _, end, _ in times] == [3.0, 6.0, 8.0]
    assert best_static(arrivals, DENSE) == 3
    made = figures(arrivals, times)
    assert made["tokens_per_s"] == pytest.approx(9 / 8, abs=0.06)
    assert made["ttft_p50_s"] == 2.0
    assert made["tpot_p50_ms"] == 1000.0


def test_loads() -> None:
    times = DenseTimes(0.007, 1e-8, 4e-5, 2e-10, 400_000)
    assert [each.prompt for each in load("burst-32k", 0.25, None, 1)] == [32768] * 16
    assert len(load("short", 0.1, None, 1)) == 20
    assert {each.shared for each in load("questions", 0.1, None, 1)} == {65536}
    half, twice = (len(load(name, 1, times, 500)) for name in ("poisson-50", "poisson-200"))
    assert twice == pytest.approx(4 * half, rel=0.2)
    assert capacity(times) > 0


def test_the_plan_measures_the_loop_and_dense_first() -> None:
    options = requests.parse(["--scale", "0.25"])
    tasks = requests.plan(options)
    assert [task.label for task in tasks[:3]] == [
        "burst-32k spin loop",
        "burst-32k dense static",
        "burst-32k dense joining",
    ]
    assert len({task.label for task in tasks}) == len(tasks)
    assert all(task.seconds <= options.part_seconds for task in tasks)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_loads, "MIXED", (40, 80))
    monkeypatch.setattr(request_loads, "MEAN_OUTPUT", 6)
    monkeypatch.setattr(request_loads, "MOST_OUTPUT", 10)

    def tiny(name: str, scale: float, dense: Any, seconds: float) -> list[Arrival]:
        lengths = [2, 5, 8, 3]
        if name == "questions":
            return [Arrival(0.0, 210, 3, 200) for _ in range(4)]
        gap = 0.01 if name in requests.POISSON else 0.0
        return [Arrival(gap * number, 60, length) for number, length in enumerate(lengths)]

    monkeypatch.setattr(requests, "load", tiny)
    sizes = ContinuousBatchingConfig(page_size=32, num_blocks=32, max_batch_tokens=128)
    monkeypatch.setattr(request_systems, "BATCHING", sizes)


def test_whole_rows_of_a_tiny_model(small: None, tmp_path: Path) -> None:
    options = requests.parse(["--method", "shadowkv", "--budget", "4096", "--max-rows", "3", "--loads", *LOADS])
    model = tiny_llama(max_position_embeddings=4096)
    model.generation_config.eos_token_id = None
    record = Record({"shape": "tiny"}, "python -m x", tmp_path / "in.json", tmp_path / "requests-tiny.json")
    bench = Bench(model, record, 4096, 0)
    dense = DenseTimes(0.01, 1e-7, 1e-5, 0.0, 1000)
    measured = requests.Measured(options, dense)
    began = time.perf_counter()
    for task in requests.plan(options):
        for row in measured.rows_of(task, bench):
            record.add({"tokens": task.tokens, **row})
            requests.write_targets(record)
            assert requests.line(row)
    assert time.perf_counter() - began < 60
    loop = [row for row in record.rows if row["cache"] == "spin loop"]
    assert {row["load"] for row in loop} == set(LOADS)
    assert all((row["cut_off"], row["requests"]) == (0, 4) for row in loop)
    assert {row["generated"] for row in loop} == {18, 12}
    (questions,) = [row for row in loop if row["load"] == "questions"]
    assert questions["reused_tokens"] >= 400
    assert {entry["load"] for entry in record.made["targets"]} == set(LOADS)
    others = [row for row in record.rows if row["cache"] == "transformers"]
    assert {row["attention"] for row in others} == {"sdpa"}
    assert all(row["requests"] == 4 for row in others)
    made = request_tables.tables({"rows": record.rows, **record.made})
    assert [title for title, _ in made] == [*(f"`{name}`" for name in LOADS), "Compared"]
    assert "transformers' `generate_batch`, sdpa" in "\n".join(made[0][1])


def test_the_rival_gets_what_this_process_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cap on this process is not seen by transformers, which looks at what the whole GPU has free."""
    monkeypatch.setattr(request_systems, "free", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (120, 140))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 16)
    for fraction, share in ((1.0, 0.9), (0.5, 0.9 * (70 - 16) / 120)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda fraction=fraction: fraction)
        assert request_systems.sized_by_free_memory().max_memory_percent == pytest.approx(share)
