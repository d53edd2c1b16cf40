"""RULER's examples (arXiv 2404.06654), from NVIDIA's package.

The package `nvidia-long-context-eval` brings the generators and their data: essays, SQuAD, HotpotQA. It is installed once
under `~/.cache/spin_hf/` (or `$SPIN_HF_CACHE`), in an environment of its own, and called there. Nothing of it is part of this
project.

    folder of examples   <task>/validation.jsonl as the generators write it
    Example              the text, the first words of its answer, the expected values, the metric
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import yaml

from benchmarks.common.example_models import build_once, cache_folder

WORKER = Path(__file__).resolve().parent / "ruler_worker.py"
VERSION = "nvidia-long-context-eval==26.3"
REQUIREMENTS = ("nltk==3.10.4", "wonderwords==3.0.1", "tenacity==9.2.1", "scipy", "pyyaml", "tqdm", "jinja2")
"""What the generators import; the package itself asks for clients of servers besides, which they do not need."""
CONFIG, PROMPTS, METRICS = "synthetic.yaml", "data/synthetic/constants.py", "eval/synthetic/constants.py"
"""Files of the package that say what the tasks are, what their prompts say, and how answers are scored."""
SCORES = {"string_match_all": "all", "string_match_part": "part"}
"""The package's metrics, and what `metrics.py` calls them."""
SECONDS = 1200
"""How long a generator may take: one that finds no example of the length tries for ever."""
SEED = 42
"""Of the package."""


class RulerError(Exception):
    """A generator wrote no prompts, or the package has no such task."""


@dataclass(frozen=True)
class Example:
    """One prompt.

    Attributes:
        text: what the user says.
        prefix: the first words of the answer, which are given.
        expected: values that the answer should contain.
        new_tokens: the answer's largest number of tokens.
        metric: `all` if it should contain all of them, `part` if one is enough.
    """

    text: str
    prefix: str
    expected: list[str]
    new_tokens: int
    metric: str


def _build(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    tokenizers = f"transformers=={transformers.__version__}"
    for words in (["--no-deps", VERSION], [*REQUIREMENTS, tokenizers]):
        print(f"installing {' '.join(words)} for RULER (once)", file=sys.stderr)
        subprocess.run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *words], check=True)


def installed() -> tuple[Path, Path]:
    """The interpreter of the package's environment, which is built if it is not there, and the package's folder."""
    name = f"{VERSION.replace('==', '-')}-transformers-{transformers.__version__}"
    folder = build_once(name, _build)
    (package,) = folder.glob("lib/python*/site-packages/long_context_eval")
    return folder / "bin" / "python", package


def _tasks_of(file: Path) -> dict[str, Any]:
    """The table TASKS of a module of the package."""
    spec = importlib.util.spec_from_file_location("ruler_constants", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tasks: dict[str, Any] = module.TASKS
    return tasks


class RulerTasks:
    """The tasks. Installs the package.

    Args:
        folder: of examples; made if it is not there.
        model: folder or hub id, for its tokenizer.
        num_tokens: most tokens of a prompt and its answer.
    """

    def __init__(self, folder: Path, model: str, num_tokens: int) -> None:
        self.folder, self.model, self.num_tokens = folder, model, num_tokens
        self.python, self.package = installed()
        self.config: dict[str, Any] = yaml.safe_load((self.package / CONFIG).read_text())
        self.prompts, self.metrics = (_tasks_of(self.package / name) for name in (PROMPTS, METRICS))

    @property
    def names(self) -> list[str]:
        """All tasks."""
        return list(self.config)

    def _generate(self, task: str, count: int) -> None:
        about = self.prompts[self.config[task]["task"]]
        options = {
            "save_dir": self.folder, "save_name": task, "subset": "validation", "tokenizer_path": self.model,
            "tokenizer_type": "hf", "max_seq_length": self.num_tokens, "num_samples": count, "random_seed": SEED,
            "tokens_to_generate": about["tokens_to_generate"], "template": about["template"] + about["answer_prefix"],
            **self.config[task]["args"],
        }  # fmt: skip
        command = [
            str(self.python),
            str(WORKER),
            str(self.package / "data" / "synthetic" / f"{self.config[task]['task']}.py"),
        ]
        command += [f"--{name}={value}" for name, value in options.items()]
        environment = {**os.environ, "PYTHONPATH": str(self.package.parent)}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
            try:
                output, _ = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                raise RulerError(
                    f"{task}: expected {count} examples of at most {self.num_tokens} tokens in {SECONDS} s, got none; "
                    "the length may be too small for the task: raise --tokens, or leave the task out of --tasks"
                ) from None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            raise RulerError(f"{task}: its generator ended with status {process.returncode}:\n{output[-2000:]}")

    def _lines(self, task: str) -> list[dict[str, Any]]:
        file = self.folder / task / "validation.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines() if line] if file.exists() else []

    def examples(self, task: str, count: int) -> list[Example]:
        """The first examples of a task, which are generated if they are not in the folder.

        Raises:
            RulerError: there is no such task, or its generator wrote too few.
        """
        if task not in self.config:
            raise RulerError(f"expected some of {', '.join(self.config)}, got {task!r}")
        if len(self._lines(task)) < count:
            self._generate(task, count)
        lines = self._lines(task)[:count]
        if len(lines) < count:
            raise RulerError(f"{task}: expected {count} examples, its generator wrote {len(lines)}")
        return [self._example(task, line) for line in lines]

    def _example(self, task: str, line: dict[str, Any]) -> Example:
        base = self.config[task]["task"]
        about, text = self.prompts[base], line["input"]
        start = text.rfind(about["answer_prefix"].split("{")[0])
        if start < 0:
            raise RulerError(f"{task}: expected a prompt that ends in {about['answer_prefix']!r}, got {text[-200:]!r}")
        score = self.metrics[base]["metric_fn"].__name__
        if score not in SCORES:
            raise RulerError(f"{task}: expected a metric of {', '.join(SCORES)}, got {score}")
        return Example(text[:start], text[start:], line["outputs"], about["tokens_to_generate"], SCORES[score])


def default_folder(model: str, num_tokens: int) -> Path:
    """Where the generators' examples for a tokenizer and length are stored."""
    return cache_folder() / "ruler-prompts" / f"{Path(model).name}-{num_tokens}"
