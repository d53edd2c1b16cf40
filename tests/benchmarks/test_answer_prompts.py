"""Stored prompts are answered example by example, by one process or several, until the time is over."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.common.rows_file import Rows
from benchmarks.quality import answer_prompts
from benchmarks.quality.answer_prompts import Answerer, Job, answered, cell_of, jobs_of, parse
from benchmarks.quality.prompt_files import PromptFile, StoredPrompt
from tests.support import fork_server
from tests.support.tiny_llama import tiny_llama

CELLS = [("fitted", 64), ("fitted", 1), ("shadowkv", 16), ("oracle", 16)]
NAMES = ["fitted, 1/64", "fitted, 1/1", "shadowkv, 1/16", "oracle, 1/16", "dense"]


class Numbers:
    """A tokenizer whose text is a list of ids."""

    eos_token_id = None

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(map(str, tokens))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama(eos_token_id=3).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_prompts, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda name: Numbers()))


def _prompt(task: str, index: int) -> StoredPrompt:
    ids = torch.randint(4, 64, (300,), generator=torch.Generator().manual_seed(index)).tolist()
    return StoredPrompt(task, index, ids, 4, [], "all", [" "])


def _file(tokens: int = 2048) -> PromptFile:
    return PromptFile("ruler", "tiny", tokens, "made", [_prompt(task, index) for index in range(3) for task in "ab"])


def _command(monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["answer_prompts.py", *map(str, words)])


def test_a_file_of_prompts_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = _file().write(tmp_path / "prompts")
    assert file.name == "ruler-tiny-2048.json.xz"
    assert PromptFile.read(file) == _file()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert PromptFile.read(file).label == "ruler-2k"


def test_prompts_become_questions() -> None:
    made = StoredPrompt("a", 0, [5, 6, 7], 9, [8, 3], "part", ["5", "x"]).question(Numbers(), [3, 4], 2048)
    assert (made.ids, made.context, made.new_tokens, made.stop, made.length) == ([5, 6, 7], 3, 9, [3, 4, 8], 2048)
    assert made.entry([5, 9], 12.34) == {"score": 1, "answer": "5 9", "attended_tokens": 12.3}
    assert made.entry([9], 1)["score"] == 0


@pytest.mark.usefixtures("tokenizer")
def test_a_run_writes_all_answers_and_goes_on(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [_file(tokens).write(tmp_path / "prompts") for tokens in (2048, 1024)]
    words = [*files, "--model", model_folder, "--dtype", "float32", "--output", tmp_path / "results", "--cells"]
    _command(monkeypatch, *words, *(f"{method}/{share}" for method, share in CELLS), "--examples", 1)
    with pytest.raises(SystemExit, match="0"):
        answer_prompts.main()
    file = tmp_path / "results" / "ruler-2k-tiny.json"
    result = json.loads(file.read_text())
    assert list(result["rows"]) == ["a, 0", "b, 0"]
    assert {name: list(row) for name, row in result["rows"].items()} == {"a, 0": NAMES, "b, 0": NAMES}
    assert (result["tokens"], result["prompts"], result["device"]) == (2048, "made", "cpu")
    assert str(tmp_path) not in result["commands"][0]
    for row in result["rows"].values():
        assert row["fitted, 1/1"]["answer"] == row["dense"]["answer"]  # a budget of everything is dense attention
        assert row["oracle, 1/16"]["attended_tokens"] == round(row["shadowkv, 1/16"]["attended_tokens"])
    other = json.loads((tmp_path / "results" / "ruler-1k-tiny.json").read_text())["rows"]
    assert other["a, 0"]["shadowkv, 1/16"]["attended_tokens"] < row["shadowkv, 1/16"]["attended_tokens"]

    asked: list[str] = []
    before = Answerer.__call__

    def counted(self: Answerer, job: Job) -> Any:
        asked.append(f"{job.file}: {job.prompt.name}, {len(job.held)} known")
        return before(self, job)

    monkeypatch.setattr(Answerer, "__call__", counted)
    _command(monkeypatch, *words, "fitted/64", "--examples", 2)
    with pytest.raises(SystemExit, match="0"):
        answer_prompts.main()
    assert asked == [f"{number}: {task}, 1, 0 known" for number in (0, 1) for task in "ab"]
    assert list(json.loads(file.read_text())["rows"]["a, 1"]) == ["fitted, 1/64", "dense"]


def test_files_come_before_examples_and_examples_before_tasks(tmp_path: Path) -> None:
    rows = [Rows(tmp_path / f"{number}.json", {}, "") for number in range(2)]
    rows[0].put("b, 0", {"dense": {"score": 1}, "fitted, 1/64": {"score": 1}})
    rows[1].put("b, 0", {"dense": {"score": 1}})
    jobs = jobs_of([_file(), _file(1024)], rows, CELLS[:1], [1.0, 2.0], 2)
    assert [job.deadline for job in jobs] == [1, 1, 1, 2, 2, 2, 2]
    assert [(job.file, job.prompt.name, len(job.held)) for job in jobs] == [
        (0, "a, 0", 0), (0, "a, 1", 0), (0, "b, 1", 0), (1, "a, 0", 0), (1, "b, 0", 1), (1, "a, 1", 0), (1, "b, 1", 0),
    ]  # fmt: skip


@pytest.mark.usefixtures("tokenizer")
def test_an_example_that_is_not_finished_in_time_is_dropped(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer = Answerer((str(model_folder), "float32", "cpu"))
    times = iter([0.0, 0.0, 2.0, 2.0])
    monkeypatch.setattr(answer_prompts, "time", SimpleNamespace(monotonic=lambda: next(times)))
    cells = [("fitted", 64)]
    held: dict[str, Any] = {}
    assert answerer(Job(0, _prompt("a", 0), 2048, cells, 1.0, held)) is not None  # late, but nothing is missing
    assert not held
    assert answerer(Job(0, _prompt("a", 0), 2048, cells, 1.0)) is None  # too late to begin
    times = iter([0.0, 2.0])
    assert answerer(Job(0, _prompt("a", 0), 2048, cells, 1.0)) is None  # the dense answer is missing


def test_processes_answer_as_one_does(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes have a tokenizer of their own, so the folder gets one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({str(number): number for number in range(64)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(model_folder)
    options = (str(model_folder), "float32", "cpu")
    monkeypatch.setattr(answer_prompts, "get_context", lambda _: fork_server.context())
    jobs = [Job(0, _prompt("a", index), 2048, CELLS[:1], math.inf) for index in range(2)]
    jobs += [Job(0, _prompt("b", 0), 2048, [("no method", 64)], math.inf)]
    jobs += [Job(0, _prompt("b", 1), 2048, CELLS[:1], time.monotonic())]
    found = {job.prompt.name: result for job, result in answered(jobs, options, 2)}
    alone = {job.prompt.name: result for job, result in answered(jobs[:2], options, 1)}
    assert {name: found[name] for name in alone} == alone
    assert "no method" in str(found["b, 0"])
    assert found["b, 1"] is None


def test_a_process_whose_gpu_fails_holds_its_jobs_back(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    def fails(job: Job) -> Any:
        raise RuntimeError("illegal address")

    monkeypatch.setattr(answer_prompts, "_of_process", [fails])
    monkeypatch.setattr(answer_prompts, "time", SimpleNamespace(monotonic=lambda: 5.0, sleep=slept.append))
    for works, deadline, seconds in (
        (True, 9.0, []),
        (False, 9.0, [4.0]),
        (False, 1.0, [0.0]),
        (False, math.inf, [600.0]),
    ):
        slept.clear()
        monkeypatch.setattr(answer_prompts, "_gpu_works", lambda works=works: works)
        with pytest.raises(RuntimeError, match="illegal address"):
            answer_prompts._answer(Job(0, _prompt("a", 0), 2048, CELLS, deadline))
        assert slept == seconds


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cell_of("fitted/64") == ("fitted", 64)
    for wrong in ("fitted", "fitted/0", "/64", "fitted/1.5"):
        with pytest.raises(argparse.ArgumentTypeError, match="such as fitted/64"):
            cell_of(wrong)
    words = ["one", "two", "--model", "m", "--cells", "shadowkv/64"]
    assert parse(words).seconds == [math.inf, math.inf]
    assert parse([*words, "--seconds", "5"]).seconds == [5, 5]
    assert parse([*words, "--seconds", "5", "7"]).seconds == [5, 7]
    with pytest.raises(SystemExit):
        parse([*words, "--seconds", "5", "7", "9"])
    assert "expected 1 or 2 numbers, got 3" in capsys.readouterr().err
    assert parse([*words, "oracle/64"]).cells == [("shadowkv", 64), ("oracle", 64)]
    with pytest.raises(SystemExit):
        parse([*words, "window/16"])
    assert "expected shadowkv/16 before window/16" in capsys.readouterr().err
