"""Answers of a small model: all cells of a question from one prefill, and only those that are missing."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.common.rows_file import Rows
from benchmarks.quality import answers, kvpress_rivals
from benchmarks.quality.answers import Question, answer_all, end_of_turn
from benchmarks.quality.quality_tables import task_table
from tests.support.tiny_llama import tiny_llama

METHODS = ["shadowkv", "fitted", "oracle", "window"]


def _model() -> Any:
    return tiny_llama(eos_token_id=[5, 3])


def _question(index: int) -> Question:
    ids = torch.randint(0, 64, (400,), generator=torch.Generator().manual_seed(index)).tolist()
    return Question(ids, 390, 6, [], str, lambda text: text.count(",") / 5)


def test_every_cell_is_answered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = SimpleNamespace(methods=METHODS[:1], shares=[8, 1], kvpress=False, model="m")
    rows = Rows(tmp_path / "rows.json", {}, "command")
    questions = {f"task, {index}": partial(_question, index) for index in range(2)}
    model = _model()
    answer_all(model, questions, args, rows)  # type: ignore[arg-type]
    assert list(rows["task, 0"]) == ["shadowkv, 1/8", "shadowkv, 1/1", "dense"]
    first = dict(rows["task, 0"])
    args.methods = METHODS
    answer_all(model, questions, args, rows)  # type: ignore[arg-type]
    found = rows["task, 0"]
    assert {name: found[name] for name in first} == first
    assert set(found) == {"dense", *(f"{method}, 1/{share}" for method in METHODS for share in (8, 1))}
    assert all(entry["score"] == 1 for entry in found.values())
    for method in ("shadowkv", "fitted"):  # a budget of everything is dense attention
        assert found[f"{method}, 1/1"]["answer"] == found["dense"]["answer"]
    attended = found["shadowkv, 1/8"]["attended_tokens"]
    assert 100 < attended < 150
    assert found["oracle, 1/8"]["attended_tokens"] == round(attended)
    assert len(task_table(rows.rows)) == 2 + 9
    monkeypatch.setattr(answers, "Prefill", lambda *_: pytest.fail("nothing is missing"))
    answer_all(model, questions, args, Rows(tmp_path / "rows.json", {}, "command"))  # type: ignore[arg-type]


def test_kvpress_gets_as_many_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def ask(model: str, cases: list[dict[str, Any]]) -> Any:
        asked.extend(cases)
        for case in cases:
            for press in case["presses"]:
                yield case["key"], press["cell"], {"tokens": [1, 2], "attended_tokens": press["kept"]}

    monkeypatch.setattr(kvpress_rivals, "ask", ask)
    rows = Rows(tmp_path / "rows.json", {}, "command")
    rows.put("task, 0", {"dense": {"score": 1}, "shadowkv, 1/8": {"score": 1, "attended_tokens": 120.4}})
    args = SimpleNamespace(methods=["shadowkv"], shares=[8], kvpress=True, model="m")
    answer_all(None, {"task, 0": partial(_question, 0)}, args, rows, ["snapkv", "tova"])  # type: ignore[arg-type]
    (case,) = asked
    assert (case["context"], case["new_tokens"], case["stop"], len(case["ids"])) == (390, 6, [], 400)
    assert rows["task, 0"]["kvpress tova, 1/8"] == {"score": 0.2, "answer": "[1, 2]", "attended_tokens": 120}


def test_a_turn_ends_at_the_ids_of_the_model_and_of_the_tokenizer() -> None:
    assert end_of_turn(_model(), SimpleNamespace(eos_token_id=7)) == [3, 5, 7]
    assert end_of_turn(_model(), SimpleNamespace(eos_token_id=None)) == [3, 5]


def test_a_run_that_is_stopped_keeps_its_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    args = SimpleNamespace(methods=["shadowkv", "oracle"], shares=[8], kvpress=False, model="m")
    monkeypatch.setattr(answers, "Chosen", stopped)
    with pytest.raises(KeyboardInterrupt):
        answer_all(
            _model(),
            {"task, 0": partial(_question, 0)},
            args,
            Rows(tmp_path / "rows.json", {}, "one"),
        )  # type: ignore[arg-type]
    assert list(Rows(tmp_path / "rows.json", {}, "two")["task, 0"]) == ["shadowkv, 1/8"]
