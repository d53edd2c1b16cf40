"""All records stand in the prompt, in order, and an answer is worth the share of them that it has whole."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.quality import records
from benchmarks.quality.records import START, Asker, instruction, records_of, score, sentence


class Characters:
    """A tokenizer whose tokens are the first 128 characters."""

    chat_template = None

    def __len__(self) -> int:
        return 128

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(character) for character in text])

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return [self.decode(row) for row in rows]

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, tokens))


def _behind_start(found: list[Any]) -> str:
    return json.dumps(found).removeprefix(START)


@pytest.fixture(autouse=True)
def plays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "play", lambda name: f"Lorem ipsum of {name}. " * 100)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_records_stand_in_the_prompt_in_order(index: int) -> None:
    made = Asker(Characters(), 4000, [1]).question(5, index)
    text, expected = "".join(map(chr, made.ids)), records_of(5, index)
    places = [text.index(sentence(record)) for record in expected]
    assert places == sorted(places)
    assert all(text.count(sentence(record)) == 1 for record in expected)
    assert len(text) == 4000
    assert text[made.context :] == instruction(5) + START
    assert made.stop == [1, ord("]")]
    right = _behind_start(list(expected))
    assert len(right) < made.new_tokens < 2 * len(right)
    assert made.entry([ord(letter) for letter in right], 9)["score"] == 1


def test_names_and_rooms_of_an_example_differ() -> None:
    many = records_of(300, 0)
    assert len({record["name"] for record in many}) == len({record["room"] for record in many}) == 300
    assert records_of(5, 0) == records_of(5, 0) != records_of(5, 1)
    with pytest.raises(ValueError, match="1 to 400 records, got 401"):
        records_of(401, 0)


def test_the_score_is_the_share_of_records_that_are_right() -> None:
    expected = records_of(4, 0)
    found: list[dict[str, Any]] = [dict(record) for record in expected]
    assert score(expected, _behind_start(found)) == 1
    assert score(expected, _behind_start([*reversed(found), {"name": "invented"}])) == 1
    assert score(expected, _behind_start([{key: str(value) for key, value in one.items()} for one in found])) == 1
    found[1]["price"] += 1
    del found[2]["room"]
    assert score(expected, _behind_start(found)) == 0.5
    assert score(expected, _behind_start([found[0]] * 4)) == 0.25
    assert score(expected, _behind_start(found)[:-10]) == 0.25  # the last one is cut off
    assert score(expected, " I cannot") == 0


def test_no_room() -> None:
    with pytest.raises(ValueError, match="raise --tokens"):
        Asker(Characters(), 700, []).question(5, 0)
