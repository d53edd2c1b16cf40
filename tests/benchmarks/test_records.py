"""All records stand in the prompt, in order, and an answer is worth the share of their fields that it has right."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.quality.metrics import METRICS, match_all, match_part, record_fields
from benchmarks.quality.records import instruction, records_of, sentence, stored


class Characters:
    """A tokenizer whose tokens are characters."""

    chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(character) for character in text])


def _lines(found: list[Any]) -> str:
    return "\n".join(map(json.dumps, found))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_records_stand_in_the_prompt_in_order(index: int) -> None:
    made = stored(Characters(), 4000, 5, index)
    text, expected = "".join(map(chr, made.ids)), records_of(5, index)
    places = [text.index(sentence(record)) for record in expected]
    assert places == sorted(places)
    assert all(text.count(sentence(record)) == 1 for record in expected)
    assert len(text) == 4000
    assert text.endswith(instruction(5) + json.dumps(expected[0]) + "\n")
    assert (made.name, made.expected) == (f"5 records, {index}", expected[1:])
    right = _lines(expected[1:])
    assert len(right) < made.new_tokens < 1.2 * len(right)
    assert METRICS[made.metric](made.expected, right) == 1


def test_records_of_an_example_differ() -> None:
    many = records_of(300, 0)
    assert len({record["buyer"] for record in many}) == len({record["room"] for record in many}) == 300
    assert [record["number"] for record in many] == list(range(1, 301))
    assert records_of(5, 0) == records_of(5, 0) != records_of(5, 1)
    for count in (1, 401):
        with pytest.raises(ValueError, match=f"2 to 400 records, got {count}"):
            records_of(count, 0)


def test_the_score_is_the_share_of_fields_that_are_right() -> None:
    expected = records_of(4, 0)
    found: list[dict[str, Any]] = [dict(record) for record in expected]
    assert record_fields(expected, _lines(found)) == 1
    assert record_fields(expected, f"[{json.dumps([*reversed(found), {'buyer': 'invented'}])}]") == 1
    assert record_fields(expected, _lines([{key: str(value) for key, value in one.items()} for one in found])) == 1
    found[1]["price"] += 1
    del found[2]["room"]
    assert record_fields(expected, _lines(found)) == 0.9
    assert record_fields(expected, _lines([found[0]] * 4)) == 0.25
    assert record_fields(expected, _lines(found)[:-10]) == 0.65  # the last one is cut off
    assert record_fields(expected, " I cannot {at all}") == 0


def test_scores_of_ruler_are_those_of_its_package() -> None:
    assert match_all(["One", "two", "three"], "ONE, three and four") == pytest.approx(2 / 3)
    assert [match_part(["One", "two"], answer) for answer in ("one", "Two one", "three")] == [1, 1, 0]


def test_no_room() -> None:
    with pytest.raises(ValueError, match="raise --tokens"):
        stored(Characters(), 700, 5, 0)
