"""RULER's 13 tasks (arXiv 2404.06654), when decoding reads a part of the text: `python -m benchmarks.quality.ruler`.

    --model SmolLM2-135M-Instruct (default), or a folder or hub id     --tokens 4096     --kvpress
    --device cpu (default) cuda
    --methods shadowkv fitted oracle     --shares 64 16     --examples 4     --tasks niah_single_1 qa_2 ... (default: all)
    --prompts FOLDER     prompts that `python -m benchmarks.quality.ruler_tasks` wrote elsewhere, for a machine without network

`ruler_tasks.py` has the prompts made by RULER's generators, of at most `--tokens` tokens with their answers. The model's chat
format comes on top, and RULER's first words of the answer stand behind it. A prompt is answered densely and for every method
and budget, as `answers.py` describes, with at most as many new tokens as RULER gives the task; the end of the model's turn
ends an answer. The score is RULER's: the share of the expected values that the answer contains; of qa_1 and qa_2, whether it
contains one.

Finished answers are in the results file and are not decoded again, so a run that was stopped goes on; `--again` starts anew.
Writes `benchmarks/results/ruler-<model>.json` and prints a table of mean scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import AutoTokenizer

from benchmarks.quality import ruler_tasks, run_options
from benchmarks.quality.answers import PRESSES, Question, answer_all, end_of_turn, turns
from benchmarks.quality.prefill import load_model
from benchmarks.quality.quality_tables import task_table
from benchmarks.quality.ruler_tasks import Example
from benchmarks.quality.tasks import ids_of


def question(tokenizer: Any, example: Example, stop: list[int]) -> Question:
    """The question of an example; `stop` ends its answer."""
    head, turn = turns(tokenizer)
    text = head + example.text + turn + example.prefix
    ids = ids_of(tokenizer, text) if head or turn else tokenizer(text).input_ids
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    return Question(ids, len(ids), example.new_tokens, stop, decode, example.score)


def main() -> None:
    """Ask what is missing, write JSON, print a table."""
    parser = run_options.parser(__doc__, ["shadowkv", "fitted", "oracle"], 4096)
    ruler_tasks.add_prompt_options(parser)
    parser.set_defaults(shares=[64, 16])
    args = run_options.parse(parser)
    tasks = ruler_tasks.opened(args)
    examples = {task: tasks.examples(task, args.examples) for task in args.tasks}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load_model(args.model, args.dtype, args.device)
    stop = end_of_turn(model, tokenizer)
    rows = run_options.open_rows("ruler", args, new_tokens="RULER's", ruler=ruler_tasks.VERSION)
    questions: dict[str, Callable[[], Question]] = {
        f"{task}, {index}": partial(question, tokenizer, examples[task][index], stop)
        for index in range(args.examples) for task in args.tasks
    }  # fmt: skip
    answer_all(model, questions, args, rows, PRESSES)
    print("\n" + "\n".join(task_table(rows.rows)))


if __name__ == "__main__":
    main()
