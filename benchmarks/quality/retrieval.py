"""Are questions about a long text still answered when decoding reads a part of it? `python -m benchmarks.quality.retrieval`.

    --model SmolLM2-135M-Instruct (default), or a folder or hub id with its chat format     --tokens 3000     --kvpress
    --methods shadowkv quest oracle window     --shares 64 32 16 8     --examples 4     --tasks passkey "one of six" ...

Every example (see `tasks.py`) is answered densely and for every method and budget of 1/64 to 1/8 of the context, as
`answers.py` describes.

Finished answers are in the results file and are not decoded again, so a run that was stopped goes on; `--again` starts anew.
Writes `benchmarks/results/retrieval-<model>.json` and prints a table of mean scores. A score is the fraction of the expected
values that the answer contains.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from transformers import AutoTokenizer

from benchmarks.common.example_models import play
from benchmarks.quality import answers, kvpress_rivals, run_options
from benchmarks.quality.answers import Question
from benchmarks.quality.prefill import load_model
from benchmarks.quality.quality_tables import task_table
from benchmarks.quality.tasks import TASKS, example, prompt, question

NEW_TOKENS = 28
"""Three numbers of five digits, each a token, with commas; an answer ends at the end of its line."""
PLAYS = ("macbeth", "hamlet", "othello")
END = "<|im_end|>"
PRESSES = (*answers.PRESSES, *kvpress_rivals.UNSEEN)


def ending(tokenizer: Any) -> list[int]:
    """The ids after which an answer is over: those with a line break, and the end of a turn."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return [token for token, text in enumerate(texts) if "\n" in text or text == END]


def one_line(tokenizer: Any, tokens: list[int]) -> str:
    """The text of an answer, without what ended it."""
    return str(tokenizer.decode(tokens)).split(END)[0].split("\n")[0]


class Asker:
    """Makes questions to a chat model.

    Args:
        tokenizer: of a chat in SmolLM2's format.
        num_tokens: length of a prompt.
    """

    def __init__(self, tokenizer: Any, num_tokens: int) -> None:
        self.tokenizer, self.num_tokens, self.stop = tokenizer, num_tokens, ending(tokenizer)

    def question(self, task: str, index: int) -> Question:
        """An example's."""
        asked = example(task, index)
        ids = prompt(self.tokenizer, asked, play(PLAYS[index % len(PLAYS)]), self.num_tokens, index)
        context = len(ids) - len(question(self.tokenizer, asked))
        return Question(ids, context, NEW_TOKENS, self.stop, partial(one_line, self.tokenizer), asked.score)


def main() -> None:
    """Ask what is missing, write JSON, print a table."""
    parser = run_options.parser(__doc__, ["shadowkv", "quest", "oracle", "window"], 3000)
    parser.add_argument("--examples", type=int, default=4, help="of each task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    args = run_options.parse(parser)
    asker = Asker(AutoTokenizer.from_pretrained(args.model), args.tokens)
    rows = run_options.open_rows("retrieval", args, new_tokens=NEW_TOKENS)
    questions = {
        f"{task}, {index}": partial(asker.question, task, index)
        for index in range(args.examples) for task in args.tasks
    }  # fmt: skip
    answers.answer_all(load_model(args.model, args.dtype, args.device), questions, args, rows, PRESSES)
    print("\n" + "\n".join(task_table(rows.rows)))


if __name__ == "__main__":
    main()
