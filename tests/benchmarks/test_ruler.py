"""RULER's generators are called as scripts; what they write becomes prompts and scores. A small package stands in."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.quality import ruler_tasks
from benchmarks.quality.answers import turns
from benchmarks.quality.ruler import question
from benchmarks.quality.ruler_tasks import RulerError, RulerTasks, default_folder, opened

YAML = "needles:\n  task: needle\n  args:\n    words: 3\nlast:\n  task: needle\n  args:\n    words: 1\n"
PROMPTS = """TASKS = {"needle": {
    "tokens_to_generate": 7, "template": "Read {context}. Answer: what?", "answer_prefix": " Answer: the {kind} are"}}
"""
METRICS = """def match(answers, expected):
    return 100 * sum(word in answers[0] for word in expected[0]) / len(expected[0])
TASKS = {"needle": {"metric_fn": match}}
"""
GENERATOR = """import argparse, json, pathlib, nltk.tokenize
from beside import KIND
parser = argparse.ArgumentParser()
for name in ("save_dir", "save_name", "subset", "tokenizer_path", "tokenizer_type", "template"):
    parser.add_argument("--" + name)
for name in ("max_seq_length", "num_samples", "random_seed", "tokens_to_generate", "words"):
    parser.add_argument("--" + name, type=int)
args = parser.parse_args()
assert args.max_seq_length > 10, "too short"
folder = pathlib.Path(args.save_dir) / args.save_name
folder.mkdir(parents=True, exist_ok=True)
with (folder / (args.subset + ".jsonl")).open("w") as file:
    for index in range(min(args.num_samples, 9)):
        words = [f"w{index}{number}" for number in range(args.words)]
        context = "; ".join(nltk.tokenize.sent_tokenize(" ".join(words)))
        line = {"input": args.template.format(context=context, kind=KIND), "outputs": words}
        file.write(json.dumps(line) + "\\n")
"""
NLTK = "def sent_tokenize(text):\n    raise LookupError('download it')\n"
PUNKT = "class PunktSentenceTokenizer:\n    def tokenize(self, text):\n        return text.split()\n"


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """From the length of prompts to tasks, with prompts in a temporary folder and no installation."""
    package = tmp_path / "site" / "long_context_eval"
    files = {
        package / "synthetic.yaml": YAML, package / "data/synthetic/constants.py": PROMPTS,
        package / "eval/synthetic/constants.py": METRICS, package / "data/synthetic/needle.py": GENERATOR,
        package / "data/synthetic/beside.py": "KIND = 'words'\n", package.parent / "nltk/__init__.py": "",
        package.parent / "nltk/tokenize/__init__.py": NLTK, package.parent / "nltk/tokenize/punkt.py": PUNKT,
    }  # fmt: skip
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(ruler_tasks, "installed", lambda: (Path(sys.executable), package))
    return partial(RulerTasks, tmp_path / "prompts", "a model")


def _unwanted(*_: Any) -> Any:
    raise AssertionError("the package was asked for")


def test_prompts_are_those_of_the_generator(tasks: Any) -> None:
    made = tasks(100)
    assert made.names == ["needles", "last"]
    first, second = made.examples("needles", 2)
    assert (first.text, first.prefix) == ("Read w00; w01; w02. Answer: what?", " Answer: the words are")
    assert (second.expected, second.new_tokens) == (["w10", "w11", "w12"], 7)
    assert [first.score(answer) for answer in ("w00 w02 w01", "w01", "none")] == [1, pytest.approx(1 / 3), 0]


def test_a_folder_with_prompts_needs_no_package(tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tasks(100).examples("last", 3)
    monkeypatch.setattr(ruler_tasks, "installed", _unwanted)
    again = tasks(100).examples("last", 2)
    assert [one.text for one in again] == [one.text for one in found[:2]]
    assert again[0].score("w00") == 1
    with pytest.raises(AssertionError, match="asked for"):
        tasks(100).examples("last", 4)


def test_what_goes_wrong_is_said(tasks: Any) -> None:
    with pytest.raises(RulerError, match=r"status 1(.|\n)*too short"):
        tasks(10).examples("last", 1)
    with pytest.raises(RulerError, match="expected 10 examples, its generator wrote 9"):
        tasks(100).examples("last", 10)
    with pytest.raises(RulerError, match="expected some of needles, last, got 'needle'"):
        tasks(100).examples("needle", 1)


def test_a_generator_that_does_not_end_is_stopped(tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tasks(100)
    script = ruler_tasks.installed()[1] / "data/synthetic/needle.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(ruler_tasks, "SECONDS", 0.5)
    with pytest.raises(RulerError, match="raise --tokens"):
        made.examples("last", 1)


def test_the_command_line_names_tasks_of_the_package(tasks: Any, tmp_path: Path) -> None:
    tasks(100)
    args = SimpleNamespace(prompts=tmp_path / "prompts", model="a/model", tokens=100, tasks=None)
    assert opened(args).folder == args.prompts  # type: ignore[arg-type]
    assert args.tasks == ["needles", "last"]
    args.tasks = ["last", "first"]
    with pytest.raises(SystemExit, match="got first"):
        opened(args)  # type: ignore[arg-type]
    assert default_folder("a/model", 100).name == "model-100"


class Characters:
    """A tokenizer whose tokens are characters, and which begins texts with a 0."""

    def __init__(self, chat: bool) -> None:
        self.chat_template = "a template" if chat else None

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[0] * add_special_tokens + [ord(character) for character in text])

    def apply_chat_template(self, chat: list[dict[str, str]], **options: Any) -> str:
        assert options["add_generation_prompt"]
        assert not options["tokenize"]
        return f"<user>{chat[0]['content']}<model>"

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(map(chr, tokens))


@pytest.mark.parametrize(("chat", "text"), [(True, "<user>T?<model> A:"), (False, "\0T? A:")])
def test_first_words_of_the_answer_stand_behind_the_turn(chat: bool, text: str) -> None:
    example = ruler_tasks.Example("T?", " A:", ["1", "2"], 5, lambda found, expected: 50.0 * (found == ["x"]))
    made = question(Characters(chat), example, [3])
    assert "".join(map(chr, made.ids)) == text
    assert (made.context, made.new_tokens, made.stop) == (len(text), 5, [3])
    assert made.entry([ord("x")], 12.34) == {"score": 0.5, "answer": "x", "attended_tokens": 12.3}
    assert turns(Characters(chat)) == (("<user>", "<model>") if chat else ("", ""))
