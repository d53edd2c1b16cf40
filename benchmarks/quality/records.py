"""Prompts that ask for all records of a long text as JSON, for `answer_prompts.py`:
`python -m benchmarks.quality.records --prompts FOLDER`.

    --model SmolLM2-135M-Instruct (default), or a folder or hub id     --tokens 4096 ...     --examples 4     --records 8

Numbered records of five fields stand in drawn sentences about a landscape, in order and at drawn distances. The model writes
all of them as JSON, one object a line, so an answer needs every part of the text in turn. The first object is given, which
shows the form. The other sentences name no people and no numbers: in plays, small models mix people into the records.
The score is the share of the fields of the other records that are right; records that the model invents do not count.

Writes `FOLDER/records-<model>-<tokens>.json.xz`, one for each length.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.common.example_models import default_model
from benchmarks.quality.answers import turns
from benchmarks.quality.prompt_files import PromptFile, StoredPrompt
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
KINDS = (
    "old",
    "quiet",
    "narrow",
    "green",
    "distant",
    "empty",
    "wide",
    "grey",
    "silent",
    "low",
    "wet",
    "pale",
    "broad",
    "cold",
)
PARTS = (
    "meadow", "river", "bridge", "hill", "forest", "garden wall", "valley", "path", "orchard", "pond", "hedge", "shore",
    "cliff", "field",
)  # fmt: skip
DOINGS = (
    "lies behind", "leads to", "is older than", "stands above", "can be seen from", "ends near", "is hidden by", "runs along",
    "looks like", "begins at",
)  # fmt: skip
TIMES = (
    "in the morning", "after the rain", "when the wind turns", "in late autumn", "before the snow comes", "at low tide",
    "in the long summer", "under a clear sky",
)  # fmt: skip
DISTANCE = 20
"""Tokens of other text for each record, at least."""
SLACK = 1.1
"""An answer may have as many times the tokens of the right one."""


def records_of(count: int, index: int) -> list[Record]:
    """The records of an example, all with another name and room.

    Raises:
        ValueError: there are not as many names.
    """
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    if not 1 < count <= len(names):
        raise ValueError(f"expected 2 to {len(names)} records, got {count}")
    draw = random.Random(f"records {count} {index}")
    rooms = draw.sample(range(100, 1000), count)
    return [
        {"number": number, "buyer": name, "room": room, "thing": draw.choice(THINGS), "price": draw.randrange(11, 100)}
        for number, (name, room) in enumerate(zip(draw.sample(names, count), rooms, strict=True), 1)
    ]


def sentence(record: Record) -> str:
    """How a record stands in the text."""
    return "Record {number}: buyer {buyer}, room {room}, thing {thing}, price {price}.".format(**record)


def instruction(count: int) -> str:
    """What the model is asked for, behind the text."""
    return (
        f'\n\nThe text above contains {count} records, "Record 1" to "Record {count}". Write all of them as JSON, one object a '
        'line, in this order, with the keys "number", "buyer", "room", "thing" and "price". Write nothing else.'
    )


def landscape(count: int, index: int) -> str:
    """So many sentences of other text."""
    draw = random.Random(f"landscape {index}")

    def part() -> str:
        return f"the {draw.choice(KINDS)} {draw.choice(PARTS)}"

    sentences = (f"{part()} {draw.choice(DOINGS)} {part()} {draw.choice(TIMES)}." for _ in range(count))
    return " ".join(one[0].upper() + one[1:] for one in sentences)


def stored(tokenizer: Any, num_tokens: int, count: int, index: int) -> StoredPrompt:
    """An example of `num_tokens` ids, in the model's chat format if it has one.

    Raises:
        ValueError: the prompt has no room for so many records.
    """
    first, *others = records = records_of(count, index)
    head, turn = (ids_of(tokenizer, part) for part in turns(tokenizer))
    head += ids_of(tokenizer, "Here is a text.\n\n")
    tail = [*ids_of(tokenizer, instruction(count)), *turn, *ids_of(tokenizer, json.dumps(first) + "\n")]
    sentences = [sentence(record) for record in records]
    least = len(head) + len(tail) + sum(len(ids_of(tokenizer, f"\n\n{one}\n\n")) + DISTANCE for one in sentences)
    if num_tokens < least:
        raise ValueError(f"expected at least {least} tokens for {count} records, got {num_tokens}; raise --tokens")
    ids = hide(tokenizer, head, sentences, tail, landscape(num_tokens // 8, index), num_tokens, index)
    new_tokens = round(SLACK * len(ids_of(tokenizer, "\n".join(map(json.dumps, others)))))
    return StoredPrompt(f"{count} records", index, ids, new_tokens, [], "records", others)


def main() -> None:
    """Write prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--examples", type=int, default=4)
    parser.add_argument("--records", type=int, default=8, help="in a text, at least 2")
    parser.add_argument("--prompts", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    model = args.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(model)
    for tokens in args.tokens:
        prompts = [stored(tokenizer, tokens, args.records, index) for index in range(args.examples)]
        print(
            PromptFile("records", Path(model).name, tokens, "benchmarks.quality.records", prompts).write(args.prompts)
        )


if __name__ == "__main__":
    main()
