"""TokenMask against lists of booleans."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_hf.storage.padding_mask import TokenMask

Rows = list[list[bool]]


def held(mask: TokenMask, expected: Rows) -> bool:
    """Whether the mask agrees with the lists; nothing is stored while there was no padding."""
    return (all(map(all, expected))) if mask.valid is None else mask.valid.tolist() == expected


def test_nothing_is_stored_without_padding() -> None:
    mask = TokenMask()
    mask = mask.appended(2, 0, None, 5)
    mask = mask.appended(2, 5, torch.ones((2, 3), dtype=torch.bool), 3)
    assert mask.valid is None
    assert mask.changed_tokens(None, 8) is None
    assert mask.changed_tokens(torch.ones((2, 9), dtype=torch.bool), 8) is None


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.data())
def test_random_histories(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 3))
    mask, expected = TokenMask(), [[] for _ in range(rows)]
    bits = st.one_of(st.just(True), st.booleans())
    for _ in range(data.draw(st.integers(1, 8))):
        length = len(expected[0])
        action = data.draw(st.sampled_from(["append", "append none", "append again", "truncate", "select", "replace"]))
        if action.startswith("append"):
            start = data.draw(st.integers(0, length)) if action == "append again" else length
            count = data.draw(st.integers(1, 4))
            new = [[data.draw(bits) for _ in range(count)] for _ in range(rows)]
            if action == "append none":
                new = [[True] * count for _ in range(rows)]
            mask = mask.appended(rows, start, None if action == "append none" else torch.tensor(new), count)
            expected = [row[:start] + fresh for row, fresh in zip(expected, new, strict=True)]
        elif action == "truncate":
            keep = data.draw(st.integers(0, length))
            mask = mask.truncate(keep)
            expected = [row[:keep] for row in expected]
        elif action == "select":
            order = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3))
            mask = mask.selected(torch.tensor(order))
            rows, expected = len(order), [list(expected[i]) for i in order]
        elif length:
            wanted = [[data.draw(bits) for _ in range(length + 1)] for _ in range(rows)]
            given_mask = None if data.draw(st.booleans()) else torch.tensor(wanted)
            if given_mask is None:
                wanted = [[True] * (length + 1) for _ in range(rows)]
            changed = mask.changed_tokens(given_mask, length)
            differs = [
                [a != b for a, b in zip(old, new, strict=False)] for old, new in zip(expected, wanted, strict=True)
            ]
            assert (changed is None) == (not any(map(any, differs)))
            assert changed is None or changed.tolist() == differs
            mask = mask.replaced(given_mask, length)
            expected = [row[:length] for row in wanted]
        assert held(mask, expected)


def test_replace_copies() -> None:
    mask, given_mask = TokenMask(), torch.tensor([[True, False, True]])
    mask = mask.replaced(given_mask, 3)
    given_mask.fill_(False)
    assert held(mask, [[True, False, True]])


def test_an_emptied_mask_takes_another_batch() -> None:
    """All tokens were cropped away; the next batch may have another size."""
    mask = TokenMask()
    mask = mask.appended(3, 0, torch.zeros((3, 2), dtype=torch.bool), 2)
    mask = mask.truncate(0)
    mask = mask.appended(2, 0, torch.tensor([[True], [False]]), 1)
    assert held(mask, [[True], [False]])


def held_positions(mask: TokenMask, rows: int, length: int) -> Rows:
    places = torch.arange(length).expand(rows, -1) if mask.positions is None else mask.positions
    return places.tolist()


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.data())
def test_positions_are_settled_when_tokens_come(data: st.DataObject) -> None:
    """A token's position is the number of real tokens before it when it comes, whatever later masks show."""
    rows = data.draw(st.integers(1, 3))
    mask = TokenMask(keeps_positions=True)
    valid: Rows = [[] for _ in range(rows)]
    expected: list[list[int | None]] = [[] for _ in range(rows)]  # None: came as padding, stands nowhere
    bits = st.one_of(st.just(True), st.booleans())
    for _ in range(data.draw(st.integers(1, 8))):
        length = len(valid[0])
        action = data.draw(st.sampled_from(["append", "append", "append none", "truncate", "select", "replace"]))
        if action.startswith("append"):
            count = data.draw(st.integers(1, 4))
            new = [[action == "append none" or data.draw(bits) for _ in range(count)] for _ in range(rows)]
            mask = mask.appended(rows, length, None if action == "append none" else torch.tensor(new), count)
            for row in range(rows):
                for bit in new[row]:
                    expected[row].append(sum(valid[row]) if bit else None)
                    valid[row].append(bit)
        elif action == "truncate" and length:
            keep = data.draw(st.integers(0, length))
            mask = mask.truncate(keep)
            valid, expected = [row[:keep] for row in valid], [row[:keep] for row in expected]
        elif action == "select":
            chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3))
            mask = mask.selected(torch.tensor(chosen))
            valid, expected = [list(valid[row]) for row in chosen], [list(expected[row]) for row in chosen]
            rows = len(chosen)
        elif action == "replace" and length:
            valid = [[data.draw(bits) for _ in range(length)] for _ in range(rows)]
            mask = mask.replaced(torch.tensor(valid), length)
        found = held_positions(mask, rows, len(valid[0]))
        for row in range(rows):
            assert len(found[row]) == len(expected[row])
            for ours, theirs in zip(found[row], expected[row], strict=True):
                assert theirs is None or ours == theirs


def test_no_positions_are_kept_unless_asked_for() -> None:
    mask = TokenMask()
    mask = mask.appended(1, 0, torch.tensor([[False, True]]), 2)
    mask = mask.replaced(torch.tensor([[True, False]]), 2)
    assert mask.positions is None
    assert mask.metadata == {"padding": 2, "token positions": 0}
