"""Are all records of a long text found when decoding reads a part of it? `python -m benchmarks.quality.records`.

    --model SmolLM2-135M-Instruct (default), or a folder or hub id     --tokens 4096     --kvpress
    --device cpu (default) cuda
    --methods shadowkv fitted oracle     --shares 64 16     --examples 4     --records 16

Records of four fields are hidden in plays of Shakespeare, in order and at drawn distances. The model writes all of them as
JSON, so an answer needs every part of the text in turn, and each of its tokens only a few of the text. It is answered densely
and for every method and budget, as `answers.py` describes. The score is the share of the records whose fields are all right;
records that the model invents do not count.

Finished answers are in the results file and are not decoded again, so a run that was stopped goes on; `--again` starts anew.
Writes `benchmarks/results/records-<model>.json` and prints a table of mean scores.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import AutoTokenizer

from benchmarks.common.example_models import play
from benchmarks.quality import kvpress_rivals, run_options
from benchmarks.quality.answers import PRESSES, Question, answer_all, end_of_turn, turns
from benchmarks.quality.prefill import load_model
from benchmarks.quality.quality_tables import task_table
from benchmarks.quality.tasks import hide, ids_of

Record = dict[str, str | int]

FIRST = (
    "Ada", "Bruno", "Clara", "David", "Elsa", "Frank", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Louis", "Marta", "Nora",
    "Oscar", "Paula", "Quentin", "Rita", "Simon", "Tilda",
)  # fmt: skip
LAST = (
    "Archer", "Baker", "Carter", "Draper", "Fisher", "Gardner", "Hunter", "Mason", "Miller", "Parker", "Potter", "Sawyer",
    "Shepherd", "Tanner", "Taylor", "Turner", "Walker", "Weaver", "Wheeler", "Wright",
)  # fmt: skip
THINGS = (
    "lantern", "violin", "kettle", "mask", "telescope", "saddle", "mirror", "compass", "carpet", "teapot", "clock", "umbrella",
)  # fmt: skip
PLAYS = ("macbeth", "hamlet", "othello")
START = "["
"""The first character of the answer, which is given; behind more of it, small models write no valid JSON."""
DISTANCE = 20
"""Tokens of other text for each record, at least."""
SLACK = 1.2
"""An answer may have as many times the tokens of the right one with line breaks: a wrong record or two."""


def records_of(count: int, index: int) -> list[Record]:
    """The records of an example, all with another name and room.

    Raises:
        ValueError: there are not as many names.
    """
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    if not 0 < count <= len(names):
        raise ValueError(f"expected 1 to {len(names)} records, got {count}")
    draw = random.Random(f"records {count} {index}")
    rooms = draw.sample(range(100, 1000), count)
    return [
        {"name": name, "room": room, "thing": draw.choice(THINGS), "price": draw.randrange(11, 100)}
        for name, room in zip(draw.sample(names, count), rooms, strict=True)
    ]


def sentence(record: Record) -> str:
    """How a record stands in the text."""
    return "Register: {name} of room {room} bought the {thing} and paid {price} crowns.".format(**record)


def instruction(count: int) -> str:
    """What the model is asked for, behind the text."""
    return (
        f'\n\nThe text above contains {count} lines that begin with "Register:". Write every one of them as JSON, in the order '
        'of the text: a list of objects with the keys "name", "room", "thing" and "price". Leave none out. Write nothing else.'
    )


def score(expected: Sequence[Record], answer: str) -> float:
    """The share of the records of which `answer`, the JSON behind `START`, has an object with the same fields."""
    found = []
    for part in re.findall(r"\{[^{}]*\}", START + answer):
        try:
            record = json.loads(part)
        except ValueError:
            continue
        found.append({name: str(value).strip() for name, value in record.items()})
    return sum({name: str(value) for name, value in record.items()} in found for record in expected) / len(expected)


class Asker:
    """Makes questions.

    Args:
        tokenizer: with a chat format, or without.
        num_tokens: length of a prompt.
        stop: ids that end the model's turn.
    """

    def __init__(self, tokenizer: Any, num_tokens: int, stop: list[int]) -> None:
        self.tokenizer, self.num_tokens = tokenizer, num_tokens
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        self.stop = sorted({*stop, *(token for token, text in enumerate(texts) if "]" in text)})  # the end of the list

    def question(self, count: int, index: int) -> Question:
        """An example with so many records.

        Raises:
            ValueError: the prompt has no room for them.
        """
        records = records_of(count, index)
        head, turn = (ids_of(self.tokenizer, part) for part in turns(self.tokenizer))
        head += ids_of(self.tokenizer, "Here is a text.\n\n")
        tail = [*ids_of(self.tokenizer, instruction(count)), *turn, *ids_of(self.tokenizer, START)]
        text = "\n\n".join(play(PLAYS[(index + number) % len(PLAYS)]) for number in range(len(PLAYS)))
        sentences = [sentence(record) for record in records]
        least = len(head) + len(tail)
        least += sum(len(ids_of(self.tokenizer, f"\n\n{one}\n\n")) + DISTANCE for one in sentences)
        if self.num_tokens < least:
            raise ValueError(
                f"expected at least {least} tokens for {count} records, got {self.num_tokens}; raise --tokens"
            )
        ids = hide(self.tokenizer, head, sentences, tail, text, self.num_tokens, index)
        new_tokens = round(SLACK * len(ids_of(self.tokenizer, json.dumps(records, indent=2))))
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        return Question(ids, len(ids) - len(tail), new_tokens, self.stop, decode, partial(score, records))


def main() -> None:
    """Ask what is missing, write JSON, print a table."""
    parser = run_options.parser(__doc__, ["shadowkv", "fitted", "oracle"], 4096)
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--records", type=int, default=16, help="hidden in a text")
    parser.set_defaults(shares=[64, 16])
    args = run_options.parse(parser)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = load_model(args.model, args.dtype, args.device)
    asker = Asker(tokenizer, args.tokens, end_of_turn(model, tokenizer))
    rows = run_options.open_rows("records", args, new_tokens=f"{SLACK} of the right answer's", distance=DISTANCE)
    questions: dict[str, Callable[[], Question]] = {
        f"{args.records} records, {index}": partial(asker.question, args.records, index)
        for index in range(args.examples)
    }
    answer_all(model, questions, args, rows, (*PRESSES, *kvpress_rivals.UNSEEN))
    print("\n" + "\n".join(task_table(rows.rows)))


if __name__ == "__main__":
    main()
