"""Files of prompts as token ids, with what an answer is worth: made where the data are, answered where the GPU is.

    <kind>-<model>-<tokens>.json.xz    {"kind", "model", "tokens", "source", "prompts": [StoredPrompt, ...]}

`ruler.py`, `records.py` and `documents.py` write them, `answer_prompts.py` answers them. Nothing but the model's folder is
needed for that.
"""

from __future__ import annotations

import json
import lzma
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.quality.answers import Question
from benchmarks.quality.metrics import METRICS


@dataclass(frozen=True)
class StoredPrompt:
    """One prompt.

    Attributes:
        task, index: what it is called in results.
        ids: token ids.
        new_tokens: the answer's largest number of tokens.
        stop: ids that end an answer, beside those of the model.
        metric: name of a function of `METRICS`.
        expected: what the metric compares an answer with.
    """

    task: str
    index: int
    ids: list[int]
    new_tokens: int
    stop: list[int]
    metric: str
    expected: list[Any]

    @property
    def name(self) -> str:
        """Of its row in a results file."""
        return f"{self.task}, {self.index}"

    def question(self, tokenizer: Any, stop: list[int], length: int) -> Question:
        """Its question: `stop` are the ids that end the model's turn, and budgets are shares of `length` tokens."""
        return Question(
            self.ids, len(self.ids), self.new_tokens, sorted({*stop, *self.stop}),
            partial(tokenizer.decode, skip_special_tokens=True), partial(METRICS[self.metric], self.expected), length,
        )  # fmt: skip


@dataclass(frozen=True)
class PromptFile:
    """The prompts of one kind, model and length.

    Attributes:
        kind: `ruler`, `records` or `documents`.
        model: name of the model whose tokenizer made the ids.
        tokens: length of the prompts, at most or exactly.
        source: package or module that made the prompts.
        prompts: in the order in which they are answered: all tasks of an index before the next index.
    """

    kind: str
    model: str
    tokens: int
    source: str
    prompts: list[StoredPrompt]

    @property
    def label(self) -> str:
        """Of its results file: `ruler-16k`."""
        return f"{self.kind}-{self.tokens >> 10}k"

    def write(self, folder: Path) -> Path:
        """Write the file into a folder, which is made; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.kind}-{self.model}-{self.tokens}.json.xz"
        unfinished = file.with_suffix(".part")
        with lzma.open(unfinished, "wt") as out:
            json.dump(asdict(self), out, separators=(",", ":"))
        unfinished.replace(file)
        return file

    @classmethod
    def read(cls, file: Path) -> PromptFile:
        """The contents of a file."""
        with lzma.open(file, "rt") as source:
            held = json.load(source)
        return cls(**{**held, "prompts": [StoredPrompt(**prompt) for prompt in held["prompts"]]})
