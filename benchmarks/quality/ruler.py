"""Prompts of RULER's 13 tasks (arXiv 2404.06654) for `answer_prompts.py`:
`python -m benchmarks.quality.ruler --prompts FOLDER`.

    --model SmolLM2-135M-Instruct (default), or a folder or hub id     --tokens 4096 ...
    --examples 4     --tasks niah_single_1 qa_2 ... (default: all)

RULER's generators make the texts (`ruler_tasks.py`), of at most `--tokens` tokens with their answers. The model's chat format
comes on top, and RULER's first words of the answer stand behind it. An answer has at most as many new tokens as RULER gives
the task; the end of the model's turn ends it. The score is RULER's: the share of the expected values that the answer contains;
of qa_1 and qa_2, whether it contains one.

Writes `FOLDER/ruler-<model>-<tokens>.json.xz`, one for each length.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.common.example_models import default_model
from benchmarks.quality.answers import turns
from benchmarks.quality.prompt_files import PromptFile, StoredPrompt
from benchmarks.quality.ruler_tasks import VERSION, Example, RulerTasks, default_folder
from benchmarks.quality.tasks import ids_of


def stored(tokenizer: Any, task: str, index: int, example: Example) -> StoredPrompt:
    """An example as token ids, in the model's chat format if it has one."""
    head, turn = turns(tokenizer)
    text = head + example.text + turn + example.prefix
    ids = ids_of(tokenizer, text) if head or turn else tokenizer(text).input_ids
    return StoredPrompt(task, index, ids, example.new_tokens, [], example.metric, example.expected)


def prompt_file(tasks: RulerTasks, tokenizer: Any, names: list[str], count: int) -> PromptFile:
    """The first examples of these tasks."""
    examples = {name: tasks.examples(name, count) for name in names}
    prompts = [stored(tokenizer, name, index, examples[name][index]) for index in range(count) for name in names]
    return PromptFile("ruler", Path(tasks.model).name, tasks.num_tokens, VERSION, prompts)


def main() -> None:
    """Write prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--examples", type=int, default=4, help="of each task")
    parser.add_argument("--tasks", nargs="+", help="default: all 13")
    parser.add_argument("--prompts", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    model = args.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(model)
    for tokens in args.tokens:
        tasks = RulerTasks(default_folder(model, tokens), model, tokens)
        names = args.tasks or tasks.names
        unknown = sorted(set(names) - set(tasks.names))
        if unknown:
            sys.exit(f"--tasks: expected some of {', '.join(tasks.names)}, got {', '.join(unknown)}")
        print(prompt_file(tasks, tokenizer, names, args.examples).write(args.prompts))


if __name__ == "__main__":
    main()
