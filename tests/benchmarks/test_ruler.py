"""RULER's generators are called as scripts; what they write becomes stored prompts. A small package stands in."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.quality import ruler, ruler_tasks
from benchmarks.quality.answers import turns
from benchmarks.quality.prompt_files import PromptFile
from benchmarks.quality.ruler import stored
from benchmarks.quality.ruler_tasks import RulerError, RulerTasks, default_folder

YAML = "needles:\n  task: needle\n  args:\n    words: 3\nlast:\n  task: needle\n  args:\n    words: 1\n"
PROMPTS = """TASKS = {"needle": {
    "tokens_to_generate": 7, "template": "Read {context}. Answer: what?", "answer_prefix": " Answer: the {kind} are"}}
"""
METRICS = """def string_match_all(answers, expected):
    raise AssertionError("scores are made without the package")
TASKS = {"needle": {"metric_fn": string_match_all}}
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


def test_examples_are_generated_once(tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tasks(100).examples("last", 3)
    again = tasks(100)
    monkeypatch.setattr(again, "_generate", lambda *_: pytest.fail("the examples are there"))
    assert [one.text for one in again.examples("last", 2)] == [one.text for one in found[:2]]


def test_a_metric_that_is_not_known_is_refused(tasks: Any) -> None:
    file = ruler_tasks.installed()[1] / "eval/synthetic/constants.py"
    file.write_text(METRICS.replace("string_match_all", "edit_distance"))
    with pytest.raises(RulerError, match="string_match_all, string_match_part, got edit_distance"):
        tasks(100).examples("last", 1)


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


def test_the_command_writes_a_file_for_each_length(
    tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks(100)
    monkeypatch.setattr(ruler, "default_folder", lambda model, tokens: tmp_path / f"raw-{tokens}")
    monkeypatch.setattr(ruler, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda name: Characters(True)))
    words = ["ruler.py", "--model", "a/model", "--prompts", str(tmp_path / "out"), "--tokens", "100", "200"]
    monkeypatch.setattr(sys, "argv", [*words, "--examples", "2"])
    ruler.main()
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [file.name for file in files] == ["ruler-model-100.json.xz", "ruler-model-200.json.xz"]
    assert [prompt.name for prompt in PromptFile.read(files[0]).prompts] == [
        f"{task}, {index}" for index in (0, 1) for task in ("needles", "last")
    ]
    monkeypatch.setattr(sys, "argv", [*words, "--tasks", "last", "first"])
    with pytest.raises(SystemExit, match="got first"):
        ruler.main()
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


@pytest.mark.parametrize(("chat", "text"), [(True, "<user>T?<model> A:"), (False, "\0T? A:")])
def test_first_words_of_the_answer_stand_behind_the_turn(chat: bool, text: str) -> None:
    example = ruler_tasks.Example("T?", " A:", ["1", "2"], 5, "part")
    made = stored(Characters(chat), "vt", 3, example)
    assert "".join(map(chr, made.ids)) == text
    assert (made.name, made.new_tokens, made.metric, made.expected) == ("vt, 3", 5, "part", ["1", "2"])
    assert turns(Characters(chat)) == (("<user>", "<model>") if chat else ("", ""))
