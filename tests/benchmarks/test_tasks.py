"""The retrieval tasks: what is asked for is in the prompt, once and whole, and scores count it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.quality.tasks import TASKS, example, prompt, question


class Characters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, add_special_tokens: bool) -> SimpleNamespace:
        assert not add_special_tokens
        return SimpleNamespace(input_ids=[ord(character) for character in text])


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("task", TASKS)
def test_what_is_asked_for_stands_in_the_prompt(task: str, index: int) -> None:
    hidden = example(task, index)
    ids = prompt(Characters(), hidden, "Lorem ipsum dolor sit amet. " * 200, 3000, index)
    text = "".join(map(chr, ids))
    assert len(ids) == 3000
    assert text.endswith(hidden.answer)
    assert ids[-len(question(Characters(), hidden)) :] == question(Characters(), hidden)
    assert "".join(map(chr, question(Characters(), hidden))).count(hidden.question) == 1
    places = [text.index(sentence) for sentence in hidden.sentences]
    assert places == sorted(places)
    assert all(text.count(sentence) == 1 for sentence in hidden.sentences)
    for word in hidden.expected:
        assert any(word in sentence for sentence in hidden.sentences)
    assert hidden.question in text
    assert hidden == example(task, index)
    assert hidden != example(task, index + 1)


def test_depths_differ_from_example_to_example() -> None:
    filler, places = "Lorem ipsum dolor sit amet. " * 200, set()
    for index in range(6):
        hidden = example("passkey", index)
        text = "".join(map(chr, prompt(Characters(), hidden, filler, 3000, index)))
        places.add(text.index(hidden.sentences[0]) // 300)
    assert len(places) > 2


def test_score_is_the_share_that_is_named() -> None:
    hidden = example("three", 0)
    assert hidden.score(" and ".join(hidden.expected)) == 1
    assert hidden.score(hidden.expected[1]) == pytest.approx(1 / 3)
    assert hidden.score("none") == 0


def test_no_room() -> None:
    with pytest.raises(ValueError, match="expected a text of"):
        prompt(Characters(), example("passkey", 0), "short", 3000, 0)
    with pytest.raises(ValueError, match="more than 0"):
        prompt(Characters(), example("passkey", 0), "long " * 1000, 100, 0)
