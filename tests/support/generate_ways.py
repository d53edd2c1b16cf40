"""Ways to call `generate`, their results with DynamicCache and with SpinCache, and when both count as equal.

Prompts of 100 tokens, padded on the left. See `test_generation.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from spin_hf import SpinCache, plan
from tests.support.compare import RELATIVE_TOLERANCE, difference
from tests.support.memory import SMALL_ZONES
from tests.support.more_families import GENERATING, IMAGE_TOKEN_ID
from tests.support.zoo import PAD_TOKEN_ID, oracle_model, subject_model

FULL: dict[str, Any] = dict(budget=1 << 20, **SMALL_ZONES)
SMALL: dict[str, Any] = dict(budget=16, **SMALL_ZONES)
LENGTHS = [100, 83, 41]
FIRST, LAST = 3, 140
"""Tokens of prompts: none of them special."""


@dataclass(frozen=True)
class Way:
    """One way to use `generate`.

    Attributes:
        run: (name, model, maker of caches) -> outputs of its calls.
        rows, tokens: the largest batch that the cache holds in it.
    """

    run: Callable[[str, PreTrainedModel, Callable[[], Cache]], list[Any]]
    rows: int
    tokens: int


def prompt(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Token ids and mask, padded on the left."""
    width = max(lengths)
    ids = torch.randint(FIRST, LAST, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, PAD_TOKEN_ID), "attention_mask": mask}


def generate(model: PreTrainedModel, cache: Cache, inputs: dict[str, Tensor], new_tokens: int = 9, **way: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=new_tokens,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, **way},
    )


def once(lengths: list[int], **way: Any) -> Callable[..., list[Any]]:
    def run(name: str, model: PreTrainedModel, make: Callable[[], Cache]) -> list[Any]:
        return [generate(model, make(), prompt(lengths), **way)]

    return run


def _turns(name: str, model: PreTrainedModel, make: Callable[[], Cache]) -> list[Any]:
    """A second question continues with the cache of the first one."""
    cache, inputs = make(), prompt(LENGTHS)
    first = generate(model, cache, inputs)
    question = prompt([11, 3, 7], seed=1)
    answer = torch.cat([first.sequences, question["input_ids"]], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones((3, 9), dtype=torch.int64), question["attention_mask"]], 1)
    return [first, generate(model, cache, {"input_ids": answer, "attention_mask": mask})]


def _lookup(name: str, model: PreTrainedModel, make: Callable[[], Cache]) -> list[Any]:
    """A prompt that repeats itself, so that guesses are accepted and refused."""
    phrase = prompt([50])["input_ids"]
    inputs = {"input_ids": torch.cat([phrase, phrase], 1), "attention_mask": torch.ones((1, 100), dtype=torch.int64)}
    return [generate(model, make(), inputs, 12, prompt_lookup_num_tokens=4)]


def _images(name: str, model: PreTrainedModel, make: Callable[[], Cache]) -> list[Any]:
    inputs = prompt([100, 83])
    inputs["input_ids"][:, 40 : 40 + GENERATING[name].image] = IMAGE_TOKEN_ID
    inputs["pixel_values"] = torch.randn((2, 3, 16, 16), generator=torch.Generator().manual_seed(3))
    if name == "gemma3":
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN_ID).long()
    if name == "mistral3":
        inputs["image_sizes"] = torch.tensor([[16, 16]] * 2)
    return [generate(model, make(), inputs)]


WAYS: dict[str, Way] = {
    "greedy": Way(once(LENGTHS), 3, 108),
    "sampling": Way(once(LENGTHS, do_sample=True, top_k=30, num_return_sequences=2), 6, 108),
    "beams": Way(once([100, 83], num_beams=3, num_return_sequences=2), 6, 108),
    "outputs": Way(once(LENGTHS, output_hidden_states=True, output_scores=True), 3, 108),
    "chunked": Way(once(LENGTHS, prefill_chunk_size=17), 3, 108),
    "lookup": Way(_lookup, 1, 116),
    "turns": Way(_turns, 3, 128),
    "images": Way(_images, 2, 108),
}
RUNS = [(name, way) for name in GENERATING for way in WAYS if way != "images" or GENERATING[name].image]


@functools.cache
def expected(name: str, way: str) -> list[Any]:
    """The results with DynamicCache."""
    model = oracle_model(name)
    return WAYS[way].run(name, model, lambda: DynamicCache(config=model.config))


def with_spin(name: str, way: str, **options: Any) -> tuple[list[Any], list[SpinCache]]:
    """The results with SpinCache, and the caches."""
    caches: list[SpinCache] = []

    def make() -> SpinCache:
        caches.append(SpinCache(subject_model(name), **options))
        return caches[-1]

    return WAYS[way].run(name, subject_model(name), make), caches


def smallest(name: str, way: str, **options: Any) -> int:
    """The smallest `gpu_memory` that `plan` allows for a way."""
    size = WAYS[way]
    planned = plan(subject_model(name), batch_size=size.rows, context_length=size.tokens, **options)
    return planned.smallest_gpu_memory


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    """Equal logits in every step, and equal tokens, up to a step in which two tokens are nearly equally likely."""
    for call, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.sequences.shape == other.sequences.shape
        first = mine.sequences.shape[1] - len(other.logits)
        for step, (a, b) in enumerate(zip(mine.logits, other.logits, strict=True)):
            off = difference(a, b)
            assert off <= RELATIVE_TOLERANCE, f"call {call}, step {step}: logits are {off:.1e} of the largest away"
            rows = mine.sequences[:, first + step], other.sequences[:, first + step]
            if a.shape[0] == rows[0].shape[0] and not torch.equal(*rows):
                _assert_tie(b, *rows)
                return
        assert torch.equal(mine.sequences, other.sequences)
        for name in ("scores", "sequences_scores"):
            given = getattr(other, name, None)
            if given is not None and "hidden_states" in other:
                for a, b in zip(getattr(mine, name), given, strict=True):
                    assert difference(a, b) <= RELATIVE_TOLERANCE, name
        for a, b in zip(mine.get("hidden_states") or (), other.get("hidden_states") or (), strict=True):
            for x, y in zip(a, b, strict=True):  # of layers; the last position is a real token's
                assert difference(x[:, -1], y[:, -1]) <= RELATIVE_TOLERANCE


def _assert_tie(logits: Tensor, ours: Tensor, theirs: Tensor) -> None:
    """Where tokens differ, their logits are nearly equal."""
    for row in (ours != theirs).nonzero().flatten().tolist():
        gap = float((logits[row, ours[row]] - logits[row, theirs[row]]).abs() / logits[row].abs().max())
        assert gap <= 2 * RELATIVE_TOLERANCE, f"row {row} chose token {int(ours[row])}, not {int(theirs[row])}"
