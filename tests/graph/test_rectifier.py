"""Generated tokens are read again (`rectify_interval`): their keys and values become those of dense attention."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from spin_hf import CapacityError, SpinCache
from tests.support.inspection import state_of
from tests.support.tiny_llama import tiny_llama

PROMPT, STOP, INTERVAL = 70, 150, 64
OPTIONS: dict[str, Any] = {"budget": 8, "recent_window": 8, "rectify_interval": INTERVAL}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(initializer_range=0.2)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 64, (2, STOP), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def dense(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer by dense attention."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def decode(model: Any, cache: SpinCache, ids: Tensor, start: int = PROMPT, prompt: bool = True, **given: Any) -> None:
    """Read the first `start` tokens, then the others one by one. `given`: of all tokens, cut to those of a call."""

    def call(first: int, stop: int) -> None:
        some = {
            name: each[:, :stop] if name == "attention_mask" else each[:, first:stop] for name, each in given.items()
        }
        model(input_ids=ids[:, first:stop], past_key_values=cache, **some)

    if prompt:
        call(0, start)
    for place in range(start, ids.shape[1]):
        call(place, place + 1)


def distance(cache: SpinCache, dense: list[tuple[Tensor, Tensor]], first: int, stop: int) -> float:
    """Largest difference of the last layer's keys and values of tokens [first, stop) from those of dense attention."""
    layer, (keys, values) = cache.layers[-1], dense[-1]
    return max(
        float((a[:, :, first:stop] - b[:, :, first:stop]).abs().max())
        for a, b in ((layer.keys, keys), (layer.values, values))
    )


@pytest.mark.parametrize("method", ["fitted", "shadowkv", "bisection"])
def test_tokens_read_again_have_the_keys_of_dense_attention(model: Any, ids: Tensor, dense: Any, method: str) -> None:
    cache, plain = (
        SpinCache(model, method, **OPTIONS),
        SpinCache(model, method, **{**OPTIONS, "rectify_interval": None}),
    )
    decode(model, cache, ids)
    decode(model, plain, ids)
    last = PROMPT + INTERVAL
    assert cache.get_seq_length() == plain.get_seq_length() == STOP
    assert distance(cache, dense, 0, last) < 1e-5
    assert distance(plain, dense, PROMPT, last) > 1e-3
    assert distance(cache, dense, last, STOP) > 1e-3  # their time has not come
    cache.check_integrity()


def test_clustered_contexts_and_host_memory(model: Any) -> None:
    long = torch.randint(0, 64, (1, 1450), generator=torch.Generator().manual_seed(4))
    reference = DynamicCache(config=model.config)
    with torch.no_grad():
        model(long, past_key_values=reference)
    dense = [(layer.keys, layer.values) for layer in reference.layers]
    cache = SpinCache(model, "fitted", **OPTIONS, gpu_memory="200kB")
    decode(model, cache, long, 1300)
    assert distance(cache, dense, 0, 1300 + 2 * INTERVAL) < 1e-5
    cache.check_integrity()


def test_left_padding(model: Any, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    reference, cache = DynamicCache(config=model.config), SpinCache(model, "shadowkv", **OPTIONS)
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=reference)
    decode(model, cache, ids, attention_mask=mask, position_ids=positions)
    keys = reference.layers[-1].keys, cache.layers[-1].keys
    for row, first in enumerate((9, 0)):
        torch.testing.assert_close(
            keys[1][row, :, first : PROMPT + INTERVAL], keys[0][row, :, first : PROMPT + INTERVAL]
        )


def test_a_prompt_behind_generated_tokens_reads_them_again_first(model: Any, ids: Tensor, dense: Any) -> None:
    cache = SpinCache(model, "shadowkv", **OPTIONS)
    decode(model, cache, ids[:, :110])
    assert distance(cache, dense, 0, 110) > 1e-3
    with torch.no_grad():
        model(ids[:, 110:], past_key_values=cache)
    assert cache.get_seq_length() == STOP
    assert distance(cache, dense, 0, STOP) < 1e-5


@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt()])
def test_an_error_leaves_the_tokens_as_they_were(
    model: Any, ids: Tensor, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = SpinCache(model, "shadowkv", **OPTIONS)
    decode(model, cache, ids[:, : PROMPT + INTERVAL])
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    last = model.model.layers[-1]
    with monkeypatch.context() as patched, pytest.raises(type(error)):
        patched.setattr(last.mlp, "forward", lambda *args, **kwargs: (_ for _ in ()).throw(error))
        decode(model, cache, ids[:, : PROMPT + INTERVAL + 1], PROMPT + INTERVAL, prompt=False)
    assert cache.get_seq_length() == PROMPT + INTERVAL
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    cache.check_integrity()
    decode(model, cache, ids, PROMPT + INTERVAL, prompt=False)
    assert cache.get_seq_length() == STOP


def test_without_memory_decoding_goes_on_with_a_warning(
    model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = SpinCache(model, "shadowkv", **OPTIONS)
    decode(model, cache, ids[:, : PROMPT + INTERVAL])
    attention = model.model.layers[-1].mlp
    forward = attention.forward

    def full(states: Tensor) -> Tensor:
        if states.shape[1] > 1:
            raise CapacityError("full")
        return forward(states)

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "spin_hf"):
        patched.setattr(attention, "forward", full)
        decode(model, cache, ids, PROMPT + INTERVAL, prompt=False)
    assert cache.get_seq_length() == STOP
    assert "64 tokens were not read again" in caplog.text
    assert "full" in caplog.text


def test_nothing_is_read_again_without_ids_or_need(model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *args, **given: (lengths.append(given["inputs_embeds"].shape[1]
        if given.get("input_ids") is None else given["input_ids"].shape[1]), forward(*args, **given))[1],
    )  # fmt: skip
    embedded, everything = SpinCache(model, "shadowkv", **OPTIONS), SpinCache(model, **{**OPTIONS, "budget": STOP})
    with torch.no_grad():
        states = model.get_input_embeddings()(ids)
        for first, stop in [(0, PROMPT), *((place, place + 1) for place in range(PROMPT, STOP))]:
            model(inputs_embeds=states[:, first:stop], past_key_values=embedded)
    decode(model, everything, ids)
    assert sorted(lengths)[-2:] == [PROMPT, PROMPT]
    assert state_of(embedded).exact == PROMPT + INTERVAL, "not every step tries"
    assert embedded.get_seq_length() == everything.get_seq_length() == STOP


def test_clustered_tokens_are_not_read_again(model: Any) -> None:
    """Other steps than those of one model call may leave more tokens behind than are ever read again."""
    long = torch.randint(0, 64, (1, 1400), generator=torch.Generator().manual_seed(4))
    cache = SpinCache(model, "fitted", **OPTIONS)
    decode(model, cache, long[:, :1301], 1300)
    before = [layer.keys.clone() for layer in cache.layers]
    state_of(cache).exact = 1000
    decode(model, cache, long[:, :1302], 1301, prompt=False)
    assert state_of(cache).exact == 1301
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :1301], keys)
    cache.check_integrity()


def test_beams_and_copies(model: Any, ids: Tensor) -> None:
    found = model.generate(
        ids[:, :PROMPT], past_key_values=SpinCache(model, "shadowkv", **{**OPTIONS, "budget": 64}), num_beams=3,
        max_new_tokens=80, do_sample=False, eos_token_id=None,
    )  # fmt: skip
    assert found.shape == (2, STOP)
    cache = SpinCache(model, "shadowkv", **OPTIONS)
    decode(model, cache, ids[:, : PROMPT + INTERVAL - 4])
    twin = cache.fork()
    for each in (cache, twin):
        decode(model, each, ids, PROMPT + INTERVAL - 4, prompt=False)
    assert torch.equal(cache.layers[-1].keys, twin.layers[-1].keys)
