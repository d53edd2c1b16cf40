"""Rows on a GPU: captured steps decode as each cache alone, and serve rows that join and leave without a new capture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spin_hf import CapacityError, SpinCache
from spin_hf.serving.row_batch import RowBatch
from spin_hf.serving.row_program import Recording
from tests.support.row_schedules import Requests, alone
from tests.support.synchronisation import no_synchronisation
from tests.support.zoo import build_model, random_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

MODES: dict[str, dict[str, Any]] = {
    "fitted": {},
    "bisection": {"method": "bisection"},
    "shadowkv": {"method": "shadowkv"},
    "retroinfer": {"method": "retroinfer"},
    "quest": {"method": "quest"},
    "tiered": {"method": "shadowkv", "gpu_memory": "1MB"},
    "fitted tiered": {"gpu_memory": "1MB"},
    "fitted int8": {"gpu_memory": "1MB", "cpu_dtype": "int8"},
    "dense": {"method": "shadowkv", "budget": 1.0},
}
SPARSE: dict[str, Any] = {"budget": 64, "recent_window": 16}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many steps were captured and replayed."""
    counts = {"captures": 0, "replays": 0}
    init, replay = Recording.__init__, Recording.replay

    def capture(self: Recording, *args: Any) -> None:
        init(self, *args)
        counts["captures"] += 1

    def count(self: Recording) -> torch.Tensor:
        counts["replays"] += 1
        return replay(self)

    monkeypatch.setattr(Recording, "__init__", capture)
    monkeypatch.setattr(Recording, "replay", count)
    return counts


def prompts_of(lengths: list[int]) -> list[torch.Tensor]:
    return [random_tokens(1, length, seed=number).cuda() for number, length in enumerate(lengths)]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_oss", "qwen3_next", "gemma2"])
def test_captured_rows_decode_as_alone(family: str, made: dict[str, int]) -> None:
    """At full budget; windows that are full and that are not; rows join, leave and pause, and one goes on by itself."""
    model, prompts = build_model(family).cuda().eval(), prompts_of([10, 60, 33, 200])
    expected = [alone(model, prompt, 24, budget=4096) for prompt in prompts]
    requests = Requests(model, prompts, 4, budget=4096)
    requests.start(0, 1)
    for _ in range(4):
        requests.step(0, 1)
    assert made == {"captures": 1, "replays": 3}
    requests.start(2)
    for _ in range(4):
        requests.step(2, 0, 1)
    assert made == {"captures": 1, "replays": 7}, "two rows have the places of four"
    left = requests.leave(1)
    requests.start(3)
    for _ in range(4):
        requests.step(3, 2, 0)
    assert made == {"captures": 1, "replays": 11}, "a row that joins needs no capture"
    requests.go_on_alone(1, left, 4)
    requests.step(3, 0)
    assert made == {"captures": 1, "replays": 12}, "nor do rows that pause"
    for _ in range(4):  # with full windows only, which need no mask
        requests.step(2, 3)
    requests.check(expected)
    for number in (0, 2, 3):
        requests.leave(number).check_integrity()
    left.check_integrity()


class Twins:
    """A cache that is a row, and one with the same tokens that decodes alone, of a copy of the model."""

    def __init__(self, models: tuple[Any, Any], length: int, seed: int, **options: Any) -> None:
        self.tokens, self.length = random_tokens(1, length + 200, seed=seed).cuda(), length
        self.models, self.row, self.alone = models, *(SpinCache(model, **options) for model in models)
        with torch.no_grad():
            for model, cache in zip(models, (self.row, self.alone), strict=True):
                model(self.tokens[:, :length], past_key_values=cache)

    @torch.no_grad()
    def next(self) -> tuple[int, torch.Tensor]:
        token = self.tokens[:, self.length : self.length + 1]
        self.length += 1
        return int(token), self.models[1](token, past_key_values=self.alone).logits[0, -1]


def step(batch: RowBatch, twins: dict[int, Twins]) -> None:
    """A step of all rows, whose logits are those of each cache alone."""
    given = {row: each.next() for row, each in twins.items()}
    logits = batch.step({row: token for row, (token, _) in given.items()})
    for number, (_, expected) in enumerate(given.values()):
        assert float((logits[number] - expected).abs().max() / expected.abs().max()) < 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_mixed_lengths_select_as_alone(mode: str, made: dict[str, int]) -> None:
    """From 77 to 3000 tokens; pages are completed, tokens clustered, and scratch grows."""
    models = build_model("llama").cuda().eval(), build_model("llama").cuda().eval()
    options = SPARSE | MODES[mode]
    batch = RowBatch(models[0], 8)
    all_twins = [Twins(models, length, seed, **options) for seed, length in enumerate([100, 3000, 1021, 509, 77])]
    twins = {batch.join(each.row): each for each in all_twins[:4]}
    for _ in range(20):
        step(batch, twins)
    captures = made["captures"]
    assert captures == (2 if mode == "fitted int8" else 1), "one for each layout of pages"
    batch.leave(1)
    twins[batch.join(all_twins[4].row)] = all_twins[4]
    for _ in range(20):
        step(batch, twins)
    assert made["captures"] == captures
    for row in twins:
        batch.leave(row)
    for each in all_twins:
        each.row.check_integrity()
        assert each.row.stats().sparse_queries == each.alone.stats().sparse_queries


def test_a_row_that_is_out_of_memory_is_named() -> None:
    """All rows are as before the step; the others go on without it, and so does it later."""
    model, prompts = build_model("llama").cuda().eval(), prompts_of([100, 300, 200])
    expected = [alone(model, prompt, 12, budget=4096) for prompt in prompts]
    requests = Requests(model, prompts, 4, budget=4096)
    requests.start(0, 1, 2)
    for _ in range(3):
        requests.step(0, 1, 2)
    cache = requests.batch.rows[requests.row[1]]
    assert cache is not None
    sequences = cache.paged_layers[0].cache_state.sequences

    def refuse(*_: Any) -> None:
        raise CapacityError("expected more memory, got none; raise cpu_memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "begin", refuse)
        with pytest.raises(CapacityError) as caught:
            requests.step(0, 1, 2)
        assert caught.value.row == requests.row[1]
        requests.tokens = [tokens[:3] for tokens in requests.tokens]
        requests.step(0, 2)
    for _ in range(4):
        requests.step(2, 1, 0)
    requests.check(expected)


def test_no_step_waits_for_the_host(made: dict[str, int]) -> None:
    """Neither do steps that complete pages."""
    model = build_model("llama").cuda().eval()
    batch = RowBatch(model, 4)
    for seed, length in enumerate([100, 611, 300]):
        cache = SpinCache(model, **SPARSE)
        with torch.no_grad():
            model(random_tokens(1, length, seed=seed).cuda(), past_key_values=cache)
        batch.join(cache)
    tokens = dict.fromkeys(range(3), 5)
    for _ in range(4):
        batch.step(tokens)
    with no_synchronisation():
        for _ in range(10):
            batch.step(tokens)
    assert made["replays"] == 13


def test_many_rows() -> None:
    """All powers of two up to 32, down and up again."""
    model, prompts = build_model("llama").cuda().eval(), prompts_of([30 + 37 * number for number in range(32)])
    expected = [alone(model, prompt, 20, budget=4096) for prompt in prompts]
    requests = Requests(model, prompts, 32, budget=4096)
    for count in (1, 2, 4, 8, 16, 32):
        requests.start(*range(len(requests.row), count))
        requests.step(*range(count))
        requests.step(*range(count))
    for count in (17, 9, 5, 3):
        requests.step(*range(count))
    requests.step(*range(32))
    requests.check(expected)
