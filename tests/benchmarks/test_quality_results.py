"""Rows that go on after a stop and never mix, their tables and figure, and KL by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.common.rows_file import Rows, command_line
from benchmarks.quality import retrieval
from benchmarks.quality.answers import answer
from benchmarks.quality.divergence import divergence
from benchmarks.quality.quality_tables import (
    has_rivals,
    kl_lines,
    kl_table,
    ruler_table,
    score_lines,
    summary,
    task_means,
    task_table,
)

ABOUT = {"model": "m", "tokens": 4000, "versions": {"torch": "1"}}


def test_a_run_goes_on_where_another_stopped(tmp_path: Path) -> None:
    file = tmp_path / "results" / "rows.json"
    first = Rows(file, ABOUT, "first")
    first.put("shadowkv, 1/64, macbeth", {"kl": 0.1, "mass_by_head": [[0.5]]})
    second = Rows(file, ABOUT, "second")
    assert "shadowkv, 1/64, macbeth" in second
    assert second["shadowkv, 1/64, macbeth"]["kl"] == 0.1
    assert second.commands == ["first"]  # it has measured nothing yet
    second.put("quest, 1/64, macbeth", {"kl": 0.2})
    held = json.loads(file.read_text())
    assert held["commands"] == ["first", "second"]
    assert list(held["rows"]) == ["shadowkv, 1/64, macbeth", "quest, 1/64, macbeth"]
    assert {key: held[key] for key in ABOUT} == ABOUT
    assert [path.name for path in file.parent.iterdir()] == ["rows.json"]
    second.put("tova, 1/64, macbeth", {"kl": 0.3}, ["tova, 1/64, macbeth", "none", "quest, 1/64, macbeth"])
    rows = json.loads(file.read_text())["rows"]
    assert [(name, row["kl"]) for name, row in rows.items()] == [
        ("tova, 1/64, macbeth", 0.3), ("quest, 1/64, macbeth", 0.2), ("shadowkv, 1/64, macbeth", 0.1),
    ]  # fmt: skip


@pytest.mark.parametrize("changed", [{"tokens": 8000}, {"versions": {"torch": "2"}}, {"sources": "abc"}])
def test_rows_of_something_else_are_left_behind(tmp_path: Path, changed: dict[str, Any]) -> None:
    file = tmp_path / "rows.json"
    Rows(file, ABOUT, "first").put("a", {"kl": 0.1})
    other = Rows(file, {**ABOUT, **changed}, "second")
    assert not other.rows
    assert not other.commands
    assert not Rows(file, ABOUT, "third", again=True).rows


def test_a_command_names_the_model_and_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["/some/where/retrieval.py", "--model", "/some/where/smol", "--tasks", "one of six"]
    )
    assert command_line("quality.retrieval", "/some/where/smol") == (
        'python -m benchmarks.quality.retrieval --model smol --tasks "one of six"'
    )


def test_divergence_by_hand() -> None:
    dense = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]).log()
    sparse = torch.tensor([[0.5, 0.5], [0.6, 0.4], [0.7, 0.3]]).log()
    found = divergence(dense, sparse)
    second = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    third = 0.2 * math.log(0.2 / 0.7) + 0.8 * math.log(0.8 / 0.3)
    assert found["kl"] == pytest.approx((second + third) / 3, abs=1e-5)
    assert found["kl_p90"] == pytest.approx(second + 0.8 * (third - second), abs=1e-5)
    assert found["top1_agrees"] == pytest.approx(2 / 3, abs=1e-4)


def test_kl_is_averaged_over_texts_and_left_out_where_one_is_missing() -> None:
    rows = {
        "shadowkv, 1/64, macbeth": {"kl": 0.1, "of_oracle": 0.7},
        "shadowkv, 1/64, hamlet": {"kl": 0.3, "of_oracle": 0.9},
        "shadowkv, 1/16, macbeth": {"kl": 0.1, "of_oracle": 0.7},
        "kvpress snapkv, 1/64, macbeth": {"kl": 0.2},
        "kvpress snapkv, 1/64, hamlet": {"kl": 0.4},
    }
    assert kl_table(rows)[:1] + kl_table(rows)[2:] == [
        "| budget | 1/64 | 1/16 |",
        "| shadowkv | 0.200, 80.0% |  |",
        "| kvpress snapkv | 0.300 |  |",
    ]


def test_scores_are_averaged_over_tasks_of_cells_that_were_asked_all() -> None:
    rows = {
        "passkey, 0": {"dense": {"score": 1.0}, "quest, 1/64": {"score": 1.0}, "window, 1/64": {"score": 0.0}},
        "passkey, 1": {"dense": {"score": 1.0}, "quest, 1/64": {"score": 0.0}, "window, 1/64": {"score": 0.0}},
        "one of six, 0": {"dense": {"score": 0.5}, "quest, 1/64": {"score": 0.0}},
    }
    means = task_means(rows)
    assert means == {
        "dense": {"passkey": 1.0, "one of six": 0.5, "mean": 0.75},
        "quest, 1/64": {"passkey": 0.5, "one of six": 0.0, "mean": 0.25},
    }
    assert task_table(rows)[2:] == ["| dense | 100% | 50% | 75% |", "| quest, 1/64 | 50% | 0% | 25% |"]


CELLS = {"fitted, 1/64": {"score": 0.5}, "fitted, 1/16": {"score": 1.0}, "dense": {"score": 1.0}}
FEW = {"dense": {"score": 0.25}, "fitted, 1/64": {"score": 0.0}}
RULER = [
    {"model": "m", "tokens": 16384, "rows": {"vt, 0": CELLS, "qa_1, 0": CELLS}},
    {"model": "m", "tokens": 32768, "rows": {"vt, 0": FEW}},
]


def test_the_table_of_ruler_has_a_column_for_each_length() -> None:
    assert ruler_table(RULER) == [
        "| budget | m, 16K | m, 32K |", "| --- | --- | --- |", "| dense | 100.0 | 25.0 |", "| fitted, 1/64 | 50.0 | 0.0 |",
        "| fitted, 1/16 | 100.0 |  |",
    ]  # fmt: skip
    assert ruler_table(RULER, ["fitted, 1/16"])[2:] == ["| fitted, 1/16 | 100.0 |  |"]


def test_the_figure_of_ruler_has_a_panel_for_each_length(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.quality import plot_ruler

    for results in (RULER, RULER[:1]):
        plot_ruler.draw(results, tmp_path / f"{len(results)}.svg")
    one, two = ((tmp_path / f"{count}.svg").read_text() for count in (1, 2))
    assert one.count('id="axes_') == 1
    assert two.count('id="axes_') == 2


def test_an_answer_ends_at_the_end_of_its_line() -> None:
    words = ["a", "b", ".\n", "<|im_end|>", "c"]

    class Words:
        def __len__(self) -> int:
            return len(words)

        def batch_decode(self, rows: list[list[int]]) -> list[str]:
            return [self.decode(row) for row in rows]

        def decode(self, tokens: list[int]) -> str:
            return "".join(words[token] for token in tokens)

    class Counting:
        device = torch.device("cpu")

        def __call__(self, tokens: torch.Tensor, past_key_values: Any) -> Any:
            following = int(tokens[0, 0]) + 1
            return SimpleNamespace(logits=torch.eye(5)[following % 5].view(1, 1, 5))

    stop = retrieval.ending(Words())
    assert stop == [2, 3]
    model, cache = Counting(), None
    assert answer(model, 0, cache, stop, 9) == [1, 2]
    assert answer(model, 2, cache, stop, 9) == [3]  # the prompt's last token ends nothing
    assert len(answer(model, 0, cache, [], 9)) == 9
    assert retrieval.one_line(Words(), [0, 1, 2, 3]) == "ab."
    assert retrieval.one_line(Words(), [4, 3, 0]) == "c"


def test_one_table_and_one_figure_of_all_results(tmp_path: Path) -> None:
    methods = ("shadowkv", "kvpress snapkv")
    rows = {f"{method}, 1/{share}, macbeth": {"kl": 0.1 * share} for method in methods for share in (64, 16)}
    scores = {f"{method}, 1/{share}": {"score": 0.5} for method in methods for share in (64, 16)}
    answers = {"passkey, 0": {"dense": {"score": 1.0}, **scores}}
    about = {"model": "m", "tokens": 4000}
    results = [{**about, "rows": rows}, {**about, "new_tokens": 28, "rows": answers}]
    assert kl_lines(rows)["shadowkv"] == pytest.approx({64: 6.4, 16: 1.6})
    assert score_lines(answers) == {"dense": {1: 1.0}, **{method: {64: 0.5, 16: 0.5} for method in methods}}
    assert all(map(has_rivals, results))
    assert not has_rivals({"rows": {"shadowkv, 1/64, macbeth": {"kl": 0.1}}})
    assert summary(results)[2:] == [
        "| dense |  |  | 100% | 100% |",
        "| shadowkv | 6.400 | 1.600 | 50% | 50% |",
        "| kvpress snapkv | 6.400 | 1.600 | 50% | 50% |",
    ]
    pytest.importorskip("matplotlib")
    from benchmarks.quality import plot_quality

    plot_quality.draw(results, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 5000
