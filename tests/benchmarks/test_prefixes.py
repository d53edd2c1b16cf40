"""Parts of the benchmark of prompts that are used again, on a CPU with a small model."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.results_sections import Section, measured
from benchmarks.speed import prefix_tables, prefixes, stored_prefixes
from benchmarks.speed.stored_prefixes import Run, TimedStore
from spin_hf import SpinCache
from tests.support.zoo import build_model

TOKENS = 300


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(build_model("llama"), TOKENS, tmp_path)


def measure(run: Run, part: str) -> dict[str, dict[str, Any]]:
    """The rows of a part. A failure is no row."""
    return dict(prefixes.PARTS[part](run))


@dataclass
class Measured:
    """Parts that are measured once, for all tests."""

    run: Run
    parts: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    read: list[tuple[int, int]] = field(default_factory=list)
    """Of the questions: tokens held before each call, and tokens of the call."""

    def rows(self, part: str) -> dict[str, dict[str, Any]]:
        if part not in self.parts:
            generated = prefixes.generated

            def noted(model: Any, ids: Any, cache: Any, *args: Any, **options: Any) -> Any:
                if part == "questions":
                    self.read.append((cache.get_seq_length(), ids.shape[1] * len(ids)))
                return generated(model, ids, cache, *args, **options)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(prefixes, "generated", noted)
                self.parts[part] = measure(self.run, part)
            assert not list(self.run.folder.iterdir())
        return copy.deepcopy(self.parts[part])


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return Measured(Run(build_model("llama"), TOKENS, tmp_path_factory.mktemp("parts")))


def test_prefill(once: Measured) -> None:
    rows = once.rows("prefill")
    assert [row["seconds"] > 0 for row in rows.values()] == [True, True]
    assert list(rows) == ["prefill, dynamic", "prefill, spin"]


def test_fork(once: Measured) -> None:
    rows = once.rows("fork")
    assert list(rows) == ["fork, first", "fork, later", "fork, deepcopy of DynamicCache"]
    assert all(row["seconds"] > 0 and row["gpu_bytes"] == 0 for row in rows.values())


def test_every_question_has_a_copy_of_the_document(once: Measured) -> None:
    rows = once.rows("questions")
    prompt = TOKENS + stored_prefixes.QUESTION
    first, asked = [(0, TOKENS)], [(TOKENS, prompt)] * 8
    assert once.read == [*first, *asked, *asked, (TOKENS, 8 * prompt), *first, *asked, (0, prompt)]
    assert list(rows) == [f"questions, {name}" for name in prefix_tables.QUESTIONS]
    for row in list(rows.values())[:-1]:
        assert row["seconds"] == pytest.approx(row["prefill_s"] + row["copies_s"] + row["answers_s"], abs=2e-4)
        assert row["memory_ratio"] is None  # no GPU
    last = rows["questions, prefills"]
    assert (last["measured"], last["times"]) == (1, 8)
    assert last["seconds"] == pytest.approx(8 * last["one_s"], abs=1e-3)


def test_a_way_that_fails_leaves_the_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(prefixes, "batched", full)
    rows = measure(run, "questions")
    assert rows["questions, forks, one batch"]["why"] == "out of GPU memory"
    assert "seconds" not in rows["questions, forks, one batch"]
    assert "seconds" in rows["questions, deepcopy"]


def test_memory_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "with_memory", lambda call, weights: call() | {"peak_gpu_gib": 22.0})
    once = {"prefill_s": 12.0, "held_gib": 20.0}
    row = prefixes.answered(once, lambda: {"copies_s": 0.5, "answers_s": 1.5}, 0)
    assert (row["seconds"], row["peak_gib"], row["memory_ratio"]) == (14.0, 22.0, 1.1)


def test_memory_store(once: Measured) -> None:
    rows = once.rows("memory store")
    assert rows["memory store, hit"]["reused_tokens"] >= TOKENS
    assert len(rows["memory store, hit"]["each_s"]) == stored_prefixes.HITS
    assert rows["memory store, hit"]["seconds"] > rows["memory store, hit"]["restore_s"] > 0
    assert rows["memory store, first call"]["stored_gib"] > 0


def test_a_prompt_that_is_not_restored_is_an_error(run: Run) -> None:
    ids = stored_prefixes.longer(run.model, stored_prefixes.prompt(run.model, TOKENS))
    with pytest.raises(RuntimeError, match=f"expected {TOKENS} tokens from the store, got 0"):
        stored_prefixes.hit(run.model, TimedStore(max_host_bytes="1GiB"), ids)


@pytest.mark.parametrize("part", ["disk store", "disk store, shadowkv"])
def test_disk_store(once: Measured, part: str) -> None:
    rows = once.rows(part)
    name = f"disk store, {'shadowkv' if 'shadowkv' in part else 'fitted'}"
    assert list(rows) == [
        f"{name}, {what}" for what in (
            "first call", "plain reads, warm", "hit, warm", "from_pretrained, warm, verify=True",
            "from_pretrained, warm, verify=False", "steps by themselves", "plain reads, cold", "hit, cold",
        )
    ]  # fmt: skip
    assert all(rows[f"{name}, hit, {files}"]["reused_tokens"] == TOKENS for files in ("warm", "cold"))
    assert rows[f"{name}, first call"]["seconds"] > rows[f"{name}, first call"]["keep_s"] >= 0
    assert rows[f"{name}, first call"]["stored_s"] >= 0


def test_no_cold_reads_behind_the_time(run: Run) -> None:
    rows = measure(Run(run.model, TOKENS, run.folder, 0.0), "disk store")
    assert not [name for name in rows if "cold" in name]
    assert [name for name in rows if "warm" in name]


def test_plain_reads_read_all_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_prefixes, "READ_BYTES", 1000)
    files = [tmp_path / "one", tmp_path / "two"]
    for number, file in enumerate(files):
        file.write_bytes(b"x" * (2500 + number))
    stored_prefixes.evict(files)
    assert stored_prefixes.plain_reads(files)["seconds"] > 0


def test_lookup(run: Run) -> None:
    rows = dict(stored_prefixes.lookup(run, prefixes=20))
    assert list(rows) == ["lookup, memory", "lookup, disk"]
    assert all(min(row["lookup_ms"], row["space_ms"], row["find_ms"]) > 0 for row in rows.values())
    assert not list(run.folder.iterdir())


def test_agent_loop(once: Measured) -> None:
    rows = once.rows("agent loop")
    assert list(rows) == ["agent loop, by hand", "agent loop, none kept", "agent loop, store"]
    assert all(len(row["each_s"]) == prefixes.TURNS and min(row["each_s"]) > 0 for row in rows.values())
    assert all(row["seconds"] < row["with_replies_s"] for row in rows.values())
    assert rows["agent loop, store"]["hits"] == prefixes.TURNS - 1


def test_the_cache_kept_by_hand_is_one(run: Run) -> None:
    made: list[Any] = []

    def make() -> Any:
        made.append(prefixes.dynamic(run.model))
        return made[-1]

    prefixes.turns(run.model, [30, 60, 90], make, kept=True)
    assert [cache.get_seq_length() for cache in made] == [90 + prefixes.REPLY - 1]
    prefixes.turns(run.model, [30, 60, 90], make)
    assert [cache.get_seq_length() for cache in made[1:]] == [length + prefixes.REPLY - 1 for length in (30, 60, 90)]


def test_a_part_that_fails_is_a_row(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: Run) -> stored_prefixes.Rows:
        yield "half", {"seconds": 1.0}
        raise ValueError("no more")

    monkeypatch.setitem(prefixes.PARTS, "fork", broken)
    rows: dict[str, Any] = {}
    prefixes.measure(run, ["fork", "prefill"], rows.__setitem__)
    assert list(rows) == ["half", "fork, failure", "prefill, dynamic", "prefill, spin"]
    assert rows["fork, failure"] == {"failed": "ValueError: no more"}
    rows.clear()
    prefixes.measure(Run(run.model, TOKENS, run.folder, 0.0), ["prefill"], rows.__setitem__)
    assert not rows


def test_warm_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    methods: list[str] = []

    def made(model: Any, method: str, **options: Any) -> SpinCache:
        methods.append(method)
        return SpinCache(model, method, **options)

    monkeypatch.setattr(prefixes, "SpinCache", made)
    prefixes.warm_up(run, ["prefill"])
    assert set(methods) == {"fitted"}
    prefixes.warm_up(run, ["disk store, shadowkv"])
    assert set(methods) == {"fitted", "shadowkv"}


def test_the_command(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is called on a GPU, with a small model in the place of the shape's."""
    stores, output = tmp_path / "stores", tmp_path / "rows.json"
    stores.mkdir()
    words = [
        "--tokens",
        str(TOKENS),
        "--only",
        "prefill",
        "disk store",
        "--output",
        str(output),
        "--folder",
        str(stores),
    ]
    monkeypatch.setattr(sys, "argv", ["prefixes.py", *words])
    monkeypatch.setattr(prefixes, "build", lambda shape: run.model)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a machine")
    prefixes.main()
    written = json.loads(output.read_text())
    assert written["commands"] == [f'python -m benchmarks.speed.prefixes --tokens {TOKENS} --only prefill "disk store"']
    assert {"prefill, spin", "disk store, fitted, hit, cold"} <= set(written["rows"])
    assert not [name for name in written["rows"] if "failure" in name]
    assert not list(stores.iterdir())


def test_tables(once: Measured) -> None:
    rows: dict[str, Any] = {}
    for part in prefixes.PARTS:
        rows |= once.rows(part)
    titled = dict(prefix_tables.tables({"rows": copy.deepcopy(rows)}))
    assert len(titled) == 7
    assert {title: len(table) - 2 for title, table in titled.items()} == {
        "Time to the first token": 7, "First call of a store": 3, "Reading the files": 8,
        "Eight questions about one document": 5, "Copies of a cache": 3, "Finding a prompt": 2, "An agent's turns": 3,
    }  # fmt: skip
    assert all(line.count("|") == table[0].count("|") for table in titled.values() for line in table)
    failed = {"prefill, spin": {"tokens": TOKENS, "why": "out of GPU memory"}}
    assert prefix_tables.tables({"rows": failed}) == []


def test_a_section_without_its_file_is_left_out() -> None:
    sections = [
        Section("", "", (name,), lambda results: []) for name in ("h200/no-such-file.json", "reach-llama-8b.json")
    ]
    assert [measured(section) for section in sections] == [[], sections[1:]]
