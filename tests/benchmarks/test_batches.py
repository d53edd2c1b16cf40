"""Throughput, reach and buffers: what is planned and compared, and whole rows of a tiny model with interpreted kernels."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import spin_hf.kernels
import spin_hf.memory.plan
from benchmarks.common import campaign, host, shapes, timing
from benchmarks.common.campaign import Bench
from benchmarks.common.record import Record, newest
from benchmarks.memory import buffers, reach
from benchmarks.speed import batch_rows, dense_graph, equal_time, spin_rows, throughput
from spin_hf import SpinCache
from spin_hf.memory import watermarks
from tests.support.fake_gpu import bytes_of
from tests.support.inspection import state_of
from tests.support.since import Since
from tests.support.tuning import tune

LLAMA = shapes.SHAPES["llama-8b"]
K = 1024
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="interprets kernels on the CPU")


def _record(file: Path) -> Record:
    return Record({"sources": "abc"}, "command", file, file)


def _row(tokens: int, cache: str, batch: int, rate: float | None, **more: Any) -> dict[str, Any]:
    known = {} if rate is None else {"tokens_per_s": rate}
    return {"tokens": tokens, "cache": cache, "batch": batch, "tpot_ms": rate and batch / rate * 1e3, **known, **more}


# --------------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(("gib", "first", "too_large"), [(232, (14, 12, 8, 6, 4), ()), (112, (6, 4), (14, 12, 8))])
def test_the_plan_begins_with_the_largest_batches_that_fit(gib: int, first: tuple[int, ...], too_large: Any) -> None:
    tasks = throughput.plan(LLAMA, [128 * K, 32 * K], gib << 30)
    assert tasks[0] == throughput.Task(128 * K, "spin", first)
    assert [task.name for task in tasks[:3]] == ["spin", "dense graph", "dynamic"]
    assert [task.tokens for task in tasks[:6]] == [128 * K] * 3 + [32 * K] * 3
    refused = [task for task in tasks if task.name == "spin" and not task.fits and task.tokens == 128 * K]
    assert [task.batches for task in refused] == ([too_large] if too_large else [])
    assert [task.batches for task in tasks if task.name == "spin ragged"] == [(first[0],), (max(tasks[3].batches),)]
    every = {(task.tokens, task.name, batch) for task in tasks for batch in task.batches}
    assert {(128 * K, name, batch) for name in throughput.RIVALS for batch in (4, 3, 2, 1)} <= every  # 3 fit 80 GB
    assert {(32 * K, name, batch) for name in throughput.RIVALS for batch in (16, 15, 14, 7, 1)} <= every
    assert len(every) == sum(len(task.batches) for task in tasks)


def test_the_whole_plan_takes_less_than_ten_minutes() -> None:
    for gib in (112, 232):
        tasks = throughput.plan(LLAMA, throughput.TOKENS, gib << 30)
        assert sum(task.seconds for task in tasks[:6]) + campaign.SETUP_SECONDS < 330  # what targets are about
        assert sum(task.seconds for task in tasks) + campaign.SETUP_SECONDS < 560
    assert sum(task.seconds for task in reach.plan(LLAMA, reach.TOKENS, "8GiB", 112 << 30)) < 150
    assert sum(buffers.Task(128 * K, 1, multiple).seconds for multiple in buffers.MULTIPLES) < 90


def test_what_is_missing_is_measured_with_what_its_ratio_needs(tmp_path: Path) -> None:
    record = _record(tmp_path / "rows.json")
    tasks = throughput.plan(LLAMA, [128 * K], 120 << 30, ragged=False)
    assert throughput.left_to_do(tasks, record) == tasks
    for batch, rate in ((14, None), (12, None), (8, None), (7, 600.0), (6, 620.0), (4, 400.0), (2, 200.0), (1, 100.0)):
        record.add(_row(128 * K, "spin", batch, rate))
    record.add(_row(128 * K, "dense graph", 3, 120.0))
    left = throughput.left_to_do(tasks, record)
    assert left[0] == throughput.Task(128 * K, "spin", (6,))  # the best, again
    assert left[1] == throughput.Task(128 * K, "dense graph", (2,))
    assert not [task for task in left[1:] if task.name == "spin"]
    assert throughput.left_to_do([tasks[0]], record) == []


def test_a_ratio_is_of_the_best_rows_of_one_run(tmp_path: Path) -> None:
    first, second = _record(tmp_path / "rows.json"), None
    for cache, batch, rate in (("spin", 14, 900.0), ("spin", 12, 930.0), ("spin ragged", 14, 2000.0), ("dense graph", 3, 100.0),
                               ("dense graph", 4, None), ("dynamic", 3, 31.0), ("dynamic", 2, 25.0)):  # fmt: skip
        first.add(_row(128 * K, cache, batch, rate))
        throughput.write_ratios(first)
    second = _record(tmp_path / "rows.json")
    second.add(_row(128 * K, "spin", 12, 300.0))
    second.add(_row(128 * K, "dense graph", 3, 110.0))
    throughput.write_ratios(second)
    held = json.loads((tmp_path / "rows.json").read_text())
    assert len(held["rows"]) == 9
    dense, dynamic = held["ratios"]
    assert (dense["ratio"], dense["met"], dense["run"]) == (2.73, False, second.run)
    assert (dynamic["ratio"], dynamic["met"], dynamic["run"]) == (30.0, True, first.run)
    assert (dynamic["spin_batch"], dynamic["rival_batch"]) == (12, 3)


def test_ragged_lengths() -> None:
    found = throughput.lengths(128 * K, 14)
    assert (int(found[0]), int(found[-1]), len(found)) == (128 * K, 32 * K, 14)
    assert (found.diff() < 0).all()


def test_host_memory_is_what_is_available_or_what_the_group_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  2000 kB\nMemAvailable:    1000 kB\nHugePages: 3\n")
    assert host.available(tmp_path) == 1000 << 10
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert host.available(tmp_path) == 1000 << 10
    (group / "memory.max").write_text("600000\n")
    (group / "memory.current").write_text("500000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 300000\n")
    assert host.available(tmp_path) == 400_000
    monkeypatch.setattr(host, "resident_bytes", lambda: 2 << 30)
    assert host.room(128) == (128 - 2 - 8) << 30
    assert host.room(1) == 0


def test_the_longest_context_leaves_room_for_what_is_generated() -> None:
    assert reach.longest_in(LLAMA, 100 << 30) == 24 * 32 * K  # 800K are 100 GiB, without a token more
    assert reach.longest_in(LLAMA, 400 << 30) < 1 << 20
    tasks = reach.plan(LLAMA, reach.TOKENS, "8GiB", 120 << 30)
    assert [(task.tokens, task.longest) for task in tasks[:2]] == [(640 * K, False), (896 * K, True)]


def test_targets_of_reach() -> None:
    row = {"tokens": 640 * K, "longest": False, "run": "a", "tpot_ms": 11.0, "in_all_gib": 31.0, "held_over_cap": 0.01}
    other = {**row, "tokens": 896 * K, "longest": True, "held_over_cap": 0.03}
    found = {(entry["tokens"], entry["name"]): entry["met"] for entry in reach.targets([row, other])}
    assert found == {
        (640 * K, "tpot_ms"): True, (640 * K, "in_all_gib"): False, (640 * K, "held_over_cap"): True,
        (896 * K, "held_over_cap"): False,
    }  # fmt: skip


@pytest.mark.parametrize("multiple", buffers.MULTIPLES)
def test_caps_give_so_many_page_frames(multiple: int) -> None:
    frames = (1 + multiple) * buffers.step_pages(2048)
    assert buffers.step_pages(2048) == 256 + 2 + 9
    cap = buffers.cap_for(LLAMA, 128 * K, 1, 2048, frames)
    for given, expected in ((cap, frames), (cap - 1, frames - 1)):
        made = spin_hf.plan(
            LLAMA,
            context_length=128 * K + batch_rows.EXTRA,
            method="shadowkv",
            budget=2048,
            gpu_memory=given,
            dtype=torch.bfloat16,
        )
        assert made.page_frames == expected


def test_no_cap_gives_more_frames_than_pages() -> None:
    with pytest.raises(ValueError, match="page frames"):
        buffers.cap_for(LLAMA, 8 * K, 1, 2048, 11 * buffers.step_pages(2048))


def test_spread_is_guessed_from_the_nearest_context(tmp_path: Path) -> None:
    record = _record(tmp_path / "rows.json")
    assert batch_rows.guess_spread(record, 640 * K) == batch_rows.guess_spread(record, 512 * K) < 0.2
    record.add(_row(640 * K, "spin", 1, 90.0, overlap="replayed", spread=0.3))
    assert batch_rows.guess_spread(record, 640 * K) == 0.3


# ------------------------------------------------------------------------------------------------- the time, and its limit


class _Job:
    tokens, label, seconds, row_seconds = 8, "job", 5.0, 3.0

    def left(self, record: Record) -> Any:
        return self


def test_a_task_is_left_between_rows_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(campaign.time, "perf_counter", lambda: now)
    closed = []

    def rows_of(task: Any, bench: Bench) -> Any:
        nonlocal now
        try:
            for batch in (3, 2, 1):
                now += 4
                yield _row(task.tokens, "spin", batch, 10.0)
            raise RuntimeError("broken")
        finally:
            closed.append(now)

    def run(seconds: float) -> list[int]:
        nonlocal now
        now, record = 0.0, _record(tmp_path / f"{seconds}.json")
        options = campaign.parser("").parse_args(["--seconds", str(seconds)])
        bench = Bench(None, record, 64, 0)
        campaign.measure(options, [_Job(), _Job()], rows_of, str, 0.0, bench, lambda record: None)  # type: ignore[list-item]
        return [row["batch"] for row in record.rows]

    monkeypatch.setattr(campaign, "LATE_SECONDS", 0)
    assert run(4) == []
    assert run(10) == [3, 2]  # 8 seconds are over, and the third row takes 3
    assert closed == [8.0]
    assert run(100) == [3, 2, 1]  # of both jobs, the second's instead of the first's
    assert closed == [8.0, 12.0, 24.0]


# ---------------------------------------------------------------------------------------------------------- rows, really


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose cache has kernels, and little of everything that takes time."""
    from spin_hf.kernels.triton_launchers import launchers

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=4096, dtype=torch.float32,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    monkeypatch.setattr(spin_hf.kernels, "launchers", lambda device: launchers)
    tune(monkeypatch, programs=4)
    monkeypatch.setattr(spin_rows, "tpot", functools.partial(timing.tpot, few=1, many=2))
    monkeypatch.setattr(spin_rows, "WARM", 2)
    monkeypatch.setattr(batch_rows, "EXTRA", 40)
    monkeypatch.setattr(batch_rows, "OVERLAP_STEPS", 2)
    monkeypatch.setattr(throughput, "EXTRA", 40)
    monkeypatch.setattr(buffers, "EXTRA", 40)
    monkeypatch.setattr(shapes, "CHUNK_IN_ALL", 512)
    monkeypatch.setattr(batch_rows, "replaying_spread", lambda model, cache, guess, close: 0.3)
    return shapes.condition(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


@interpreted
@pytest.mark.parametrize("padding", [None, [0, 100, 250]])
def test_reserved_and_filled_in_parts_is_what_appending_gives(tiny: Any, padding: Any) -> None:
    held = None if padding is None else torch.tensor(padding)
    cache = SpinCache(tiny, "shadowkv", budget=48, gpu_memory=130_000)
    shapes.reserve_spin(cache, tiny.config, 300, "cpu", 3)
    reserved = [len(layer.store.backing.chunks) for layer in cache.layers]
    assert all(layer.store.frames is not None for layer in cache.layers)  # at once in the tier where they stay
    torch.manual_seed(1)
    shapes.fill_spin(cache, tiny.config, 300, "cpu", 3, held)
    assert [len(layer.store.backing.chunks) for layer in cache.layers] == reserved
    cache.check_integrity()
    assert cache.get_seq_length() == 300
    torch.manual_seed(1)
    plain = SpinCache(tiny, "shadowkv", budget=48)
    shapes.fill_spin(plain, tiny.config, 300, "cpu", 3, held)
    for one, other in zip(cache.layers, plain.layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    valid = state_of(cache).sequences.mask.valid
    assert (valid is None) == (padding is None)
    if padding is not None:
        assert [int(row.sum()) for row in valid] == [300, 200, 50]


@interpreted
def test_smaller_batches_are_selected_from_the_largest(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    since = Since()

    def free(device: torch.device) -> int:
        return max(0, 130_000 - sum(map(bytes_of, since.caches())))

    tune(monkeypatch, margin_bytes=0)
    for module in (spin_hf.memory.plan, watermarks):
        monkeypatch.setattr(module, "free_gpu_memory", free)
    monkeypatch.setattr(
        host, "room", lambda given: 3 * throughput.sequence_bytes(tiny.config, 256) * 2
    )  # float32, whole segments
    record = _record(tmp_path / "rows.json")
    bench, rows = Bench(tiny, record, 16, 0), []
    for row in throughput.rows_of(throughput.Task(200, "spin", (4, 2)), bench):
        record.add({"tokens": 200, **row})
        rows.append(row)
    assert [(row["batch"], bool(row["tpot_ms"])) for row in rows] == [(4, False), (3, True), (2, True)]
    assert "cpu_memory" in rows[0]["why"]
    assert rows[0]["largest_batch_size"] == 3  # measured instead
    for row in rows[1:]:
        assert row["filled_batch"] == 3
        assert row["page_frames"] > 0
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["tpot_ms"] * 1e3, abs=0.1)
        assert row["timed_tokens"] == 9
        assert 0 < row["hit_rate"] < 1
        assert row["cpu_gib"] >= 0
        assert 0 < row["overlap_at_1"] <= 1
    assert rows[2]["page_frames"] > rows[1]["page_frames"]  # fewer share the cap
    assert newest(record.rows, tokens=200, batch=3)["spread"] == 0.3
    assert throughput.Task(200, "spin", (4, 3, 2)).left(record) is None
    assert not since.caches()  # nor the host memory of one


@interpreted
def test_a_ragged_batch_generates_behind_its_padding(tiny: Any, tmp_path: Path) -> None:
    record = _record(tmp_path / "rows.json")
    seen = []
    forward = tiny.forward

    @functools.wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append((kwargs["attention_mask"].sum(1).tolist(), kwargs["position_ids"][:, -1].tolist()))
        return forward(*args, **kwargs)

    tiny.forward = watched
    (row,) = throughput.rows_of(throughput.Task(200, "spin ragged", (3,)), Bench(tiny, record, 16, 0))
    assert "failed" not in row
    assert (row["batch"], row["shortest_tokens"], row["mean_tokens"]) == (3, 50, 125)
    assert row["page_frames"] == 0  # on a CPU all is in one tier
    masked, positions = seen[-1]
    assert masked[0] - masked[2] == 200 - 50
    assert [position + 1 for position in positions] == masked


@interpreted
def test_rows_of_reach_and_buffers(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "room", lambda given: 1 << 30)
    bench = Bench(tiny, _record(tmp_path / "rows.json"), 16, 0)
    (row,) = reach.rows_of(reach.Task(256, "40kB"), bench)
    assert (row["tokens"], row["gpu_memory"], row["longest"], row["batch"]) == (256, "40kB", False, 1)
    assert row["page_frames"] > 0
    assert row["cap_gib"] == round(40_000 / 2**30, 3)
    assert {"held_over_cap", "peak_over_cap", "in_all_gib", "reserved_gib", "reserve_s", "fill_s"} <= set(row)
    for multiple in (0, 1):
        (row,) = buffers.rows_of(buffers.Task(256, 1, multiple), bench)
        assert row["page_frames"] == row["planned_frames"] == (1 + multiple) * row["step_pages"]
        assert row["multiple"] == multiple
        assert row["tpot_ms"] > 0


@interpreted
@pytest.mark.parametrize("batch", [1, 3])
def test_dense_decoding_of_a_batch_is_exact(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(batch, heads, n, 16, generator=generator) for heads, n in ((4, 1), (2, 100), (2, 100))
    )
    function: Any = dense_graph.flash_decode
    monkeypatch.setattr(function, "attends", True, raising=False)
    monkeypatch.setattr(function, "splits", 4, raising=False)
    actual, _ = function(None, query.transpose(1, 2).contiguous().transpose(1, 2), keys, values, None, 0.25)
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(actual, expected.transpose(1, 2), rtol=0, atol=1e-5)


def test_splits_shrink_with_the_batch() -> None:
    assert [dense_graph.splits_of(batch) for batch in (1, 2, 3, 15, 64, 200)] == [
        [32, 64, 128], [16, 32, 64], [8, 16, 32], [2, 4, 8], [1, 2], [1],
    ]  # fmt: skip


@pytest.mark.parametrize("module", [throughput, reach, buffers, equal_time])
def test_command_lines(module: Any) -> None:
    """What all have in common goes together with what each one has of its own."""
    options = module.parse(["--host-memory", "64", "--seconds", "5", "--plan"])
    assert (options.host_memory, options.seconds, options.plan) == (64, 5, True)
