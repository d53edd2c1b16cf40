"""What an answer is worth, in [0, 1]: METRICS, by the names that files of prompts use.

all        share of the expected values that the answer contains, upper or lower case; RULER's `string_match_all`
part       1 if it contains one of them; RULER's `string_match_part`
phrase     1 if it contains one of them as whole words, without `$` and separators of thousands
records    share of the expected records' fields that its JSON objects have; an object counts for the record of its buyer
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any


def match_all(expected: Sequence[str], answer: str) -> float:
    """The share of the expected values that `answer` contains."""
    return sum(value.lower() in answer.lower() for value in expected) / len(expected)


def match_part(expected: Sequence[str], answer: str) -> float:
    """1 if `answer` contains an expected value, or 0."""
    return float(any(value.lower() in answer.lower() for value in expected))


def contains_phrase(expected: Sequence[str], answer: str) -> float:
    """1 if `answer` contains one of the expected phrases as whole words, or 0. See `phrase_form`."""
    text = phrase_form(answer)
    found = (re.search(rf"(?<![\w.]){re.escape(phrase_form(value))}(?!\w|\.\d)", text) for value in expected)
    return float(any(found))


def phrase_form(text: str) -> str:
    """Text in lower case, with single spaces, without `$` and separators of thousands."""
    return " ".join(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.lower().replace("$", "")).split())


def record_fields(expected: Sequence[dict[str, Any]], answer: str) -> float:
    """The share of the fields of the expected records that `answer` has right.

    Args:
        expected: records of equally many fields, each with a buyer of its own.
        answer: text with flat JSON objects in it. Those that are no JSON, or have no expected buyer, do not count.
    """
    found: dict[str, dict[str, str]] = {}
    for part in re.findall(r"\{[^{}]*\}", answer):
        try:
            record = {field: str(value).strip() for field, value in json.loads(part).items()}
        except ValueError:
            continue
        found.setdefault(record.get("buyer", ""), record)
    right = [
        found.get(record["buyer"], {}).get(field) == str(value)
        for record in expected for field, value in record.items()
    ]  # fmt: skip
    return sum(right) / len(right)


METRICS: dict[str, Callable[[Sequence[Any], str], float]] = {
    "all": match_all, "part": match_part, "phrase": contains_phrase, "records": record_fields,
}  # fmt: skip
