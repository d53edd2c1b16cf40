"""The log of token ids against a plain list."""

from __future__ import annotations

import random

import torch

from spin_hf.storage.token_log import TokenLog


def test_random_histories() -> None:
    """Tokens are recorded, unknown, cropped and selected; a prompt is compared up to the first difference."""
    draw = random.Random(0)
    for _ in range(60):
        log, held = TokenLog(), torch.zeros((2, 0), dtype=torch.long)
        known = torch.zeros((2, 0), dtype=torch.bool)
        for _ in range(draw.randrange(1, 40)):
            kind = draw.random()
            if kind < 0.7:
                ids, is_known = torch.randint(1, 50, (2, draw.choice([1, 1, 1, 7]))), draw.random() < 0.9
                log = log.recorded(held.shape[1], ids if is_known else None)
                held, known = torch.cat([held, ids], 1), torch.cat([known, torch.full_like(ids, is_known).bool()], 1)
            elif kind < 0.9:
                length = draw.randrange(held.shape[1] + 1)
                log, held, known = log.truncated(length), held[:, :length], known[:, :length]
            else:
                rows = [draw.randrange(2) for _ in range(2)]
                log, held, known = log.selected(rows), held[rows], known[rows]
        length = held.shape[1]
        complete = log.ids(length)
        assert (complete is not None) == bool(known.all() and length)
        assert complete is None or torch.equal(complete, held)
        prompt = torch.cat([held, torch.randint(1, 50, (2, 3))], 1)
        assert log.common_prefix(prompt, length) == length
        for position in range(length):
            other = prompt.clone()
            other[draw.randrange(2), position] = 99
            expected = position if bool(known[:, position].all()) else length
            assert log.common_prefix(other, length) == expected
            assert log.common_prefix(other[:, : position + 1], length) == min(expected, position + 1)


def test_many_single_tokens_are_joined() -> None:
    log = TokenLog()
    for position in range(2000):
        log = log.recorded(position, torch.full((1, 1), position))
        assert len(log.pieces) <= 257
    assert torch.equal(log.ids(2000), torch.arange(2000)[None])


def test_a_replaced_token_is_forgotten() -> None:
    """A record that begins before the end of the last one replaces what stood there."""
    log = TokenLog().recorded(0, torch.tensor([[1, 2, 3, 4]])).recorded(2, torch.tensor([[7]]))
    assert torch.equal(log.ids(3), torch.tensor([[1, 2, 7]]))
    assert log.ids(4) is None


def test_selected_sequences_share_ids() -> None:
    """Forks and beams copy no ids, also when single tokens are joined."""
    prompt = torch.arange(500)[None]
    log = TokenLog().recorded(0, prompt).selected([0] * 4)
    for position in range(600):
        log = log.recorded(500 + position, torch.full((4, 1), position)).selected([1, 0, 3, 2])
    assert log.pieces[0].stored.shape == (1, 500)
    assert len(log.pieces) <= 258
    ids = log.ids(1100)
    assert ids is not None
    assert torch.equal(ids, torch.cat([prompt, torch.arange(600)[None]], 1).expand(4, -1))
