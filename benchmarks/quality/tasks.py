"""Questions about a long text whose answers are known: sentences hidden in a real play, and what to ask.

    passkey      one number in the text, asked for
    one of six   six numbers of one kind, one of them asked for
    three        three numbers of one thing, all asked for; the score is the share of them that is named
    chain        a number by way of two names: gamma is what beta is, beta is what alpha is
    place        where somebody keeps something, among five others who keep other things elsewhere

`example(task, index)` gives the same sentences and the same question whatever the model; `prompt` makes the tokens of a chat.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """What is hidden and what is asked.

    Attributes:
        sentences: hidden in the text, in this order, far from each other.
        question: asked behind the text.
        answer: the first words of the answer, which are given.
        expected: what the rest of the answer should contain.
    """

    sentences: tuple[str, ...]
    question: str
    answer: str
    expected: tuple[str, ...]

    def score(self, text: str) -> float:
        """The share of what is expected that `text` contains."""
        return sum(word in text for word in self.expected) / len(self.expected)


COLOURS = ("red", "green", "blue", "white", "black", "yellow")
PEOPLE = ("Rosalind", "Edmund", "Portia", "Lucius", "Helena", "Oswald")
THINGS = ("silver lantern", "old violin", "copper kettle", "wooden mask", "glass lens", "iron key")
PLACES = ("cellar", "attic", "garden", "kitchen", "stable", "library")


def _numbers(draw: random.Random, count: int) -> list[str]:
    return [str(number) for number in draw.sample(range(10000, 100000), count)]


def _passkey(draw: random.Random) -> Example:
    about, (number,) = "The secret passkey of the theatre's back door is", _numbers(draw, 1)
    return Example((f"{about} {number}.",), "What is the secret passkey of the theatre's back door?", about, (number,))


def _one_of_six(draw: random.Random) -> Example:
    numbers, asked = _numbers(draw, len(COLOURS)), draw.randrange(len(COLOURS))
    colours = draw.sample(COLOURS, len(COLOURS))
    about = [f"The code of the {colour} cabinet is" for colour in colours]
    hidden = tuple(f"{start} {number}." for start, number in zip(about, numbers, strict=True))
    return Example(hidden, f"What is the code of the {colours[asked]} cabinet?", about[asked], (numbers[asked],))


def _three(draw: random.Random) -> Example:
    numbers = _numbers(draw, 3)
    hidden = tuple(f"One of the gardener's three lucky numbers is {number}." for number in numbers)
    return Example(
        hidden, "What are the gardener's three lucky numbers?", "The gardener's three lucky numbers are", tuple(numbers)
    )


def _chain(draw: random.Random) -> Example:
    (number,) = _numbers(draw, 1)
    hidden = (
        f"The number of alpha is {number}.",
        f"The number of beta is that of alpha, which is {number}.",
        "The number of gamma is that of beta.",
    )
    return Example(hidden, "What is the number of gamma?", "The number of gamma is that of beta, which is", (number,))


def _place(draw: random.Random) -> Example:
    people, things, places = (draw.sample(words, len(words)) for words in (PEOPLE, THINGS, PLACES))
    about = [f"{who} keeps the {what} in the" for who, what in zip(people, things, strict=True)]
    asked = draw.randrange(len(about))
    hidden = tuple(f"{start} {where}." for start, where in zip(about, places, strict=True))
    question = f"Where does {people[asked]} keep the {things[asked]}?"
    return Example(hidden, question, about[asked], (places[asked],))


TASKS: dict[str, Callable[[random.Random], Example]] = {
    "passkey": _passkey, "one of six": _one_of_six, "three": _three, "chain": _chain, "place": _place,
}  # fmt: skip


def example(task: str, index: int) -> Example:
    """The example of a task with this number."""
    return TASKS[task](random.Random(f"{task} {index}"))


def ids_of(tokenizer: Any, part: str) -> list[int]:
    """The ids of a text, without those that begin or end one."""
    found: list[int] = tokenizer(part, add_special_tokens=False).input_ids
    return found


def question(tokenizer: Any, hidden: Example) -> list[int]:
    """The ids that stand behind the text: the question, and the answer's first words."""
    return ids_of(
        tokenizer,
        f"\n\nAnswer in one short sentence, from the text: {hidden.question}<|im_end|>\n"
        f"<|im_start|>assistant\n{hidden.answer}",
    )


def prompt(tokenizer: Any, hidden: Example, text: str, num_tokens: int, index: int) -> list[int]:
    """`num_tokens` ids of a chat whose text holds the sentences at depths that `index` decides, up to the answer's first words.

    Raises:
        ValueError: the text is too short, or there is no room for one.
    """
    head = ids_of(tokenizer, "<|im_start|>user\nHere is a text.\n\n")
    return hide(tokenizer, head, hidden.sentences, question(tokenizer, hidden), text, num_tokens, index)


def hide(
    tokenizer: Any, head: list[int], sentences: Sequence[str], tail: list[int], text: str, num_tokens: int, index: int
) -> list[int]:
    """`num_tokens` ids: `head`, the sentences in their order in `text` at depths that `index` decides, `tail`.

    Raises:
        ValueError: the text is too short, or there is no room for one.
    """
    needles = [ids_of(tokenizer, f"\n\n{sentence}\n\n") for sentence in sentences]
    room, filler = num_tokens - len(head) - len(tail) - sum(map(len, needles)), ids_of(tokenizer, text)
    if not 0 < room <= len(filler):
        raise ValueError(f"expected a text of {room} tokens, more than 0, got one of {len(filler)}")
    draw = random.Random(f"depths {index}")
    cuts = sorted(round(room * (place + draw.random()) / len(needles)) for place in range(len(needles)))
    parts, start = list(head), 0
    for cut, needle in zip(cuts, needles, strict=True):
        parts += filler[start:cut] + needle
        start = cut
    return parts + filler[start:room] + tail
