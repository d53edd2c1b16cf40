"""Changes by a model of keys and values between `update` and attention: passed on, or refused before a token is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_hf import SpinCache
from spin_hf.attention import handed_states
from spin_hf.backends import dense
from spin_hf.errors import AttentionError
from tests.support.zoo import build_model, oracle_model, random_tokens

EVERYTHING = 1 << 20
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class ChangingCache(SpinCache):
    """A cache whose model does `change` to what `update` of layer `only` (-1: of any) returned."""

    change: Change | None = None
    only: int = -1

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.change is None or self.only not in (-1, layer_idx):
            return states
        return self.change(*states)


def written(states: Tensor) -> Tensor:
    states.mul_(1.0)
    return states


CHANGES: dict[str, tuple[Change, str]] = {
    "values split": (lambda k, v: (k, torch.chunk(v, 2, dim=1)[0].repeat(1, 2, 1, 1)), "values"),
    "keys rotated": (lambda k, v: (k.roll(1, -1), v), "keys"),
    "both repeated": (lambda k, v: (k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), "keys and values"),
    "values written": (lambda k, v: (k, written(v)), "values"),
    "keys written": (lambda k, v: (written(k), v), "keys"),
    "a slice of values": (lambda k, v: (k, v[:, :, -1:]), "values"),
}


@pytest.mark.parametrize("only", [-1, 1], ids=["every layer", "the last layer"])
@pytest.mark.parametrize("kind", CHANGES)
@torch.no_grad()
def test_changed_states_are_refused_at_once(kind: str, only: int) -> None:
    """The first call fails, by the names of model and layer, and the cache is as before."""
    change, named = CHANGES[kind]
    model = build_model("llama")
    cache = ChangingCache(model, budget=EVERYTHING)
    ids = random_tokens(2, 30)
    model(ids, past_key_values=cache)
    cache.change, cache.only = staticmethod(change), only
    layer = max(only, 0)
    with pytest.raises(
        AttentionError, match=rf"LlamaForCausalLM, layer {layer}.*attends with {named} other than"
    ) as error:
        model(random_tokens(2, 1, seed=1), past_key_values=cache)
    assert "DynamicCache" in str(error.value)
    cache.change = None
    assert cache.get_seq_length() == 30
    token = random_tokens(2, 1, seed=2)
    logits = model(token, past_key_values=cache).logits
    expected = oracle_model("llama")(torch.cat([ids, token], 1)).logits[:, -1:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_several_attention_calls_of_one_update() -> None:
    """Two calls with the same keys and values give the same; tokens are stored once."""
    model = build_model("llama")
    cache = SpinCache(model, budget=EVERYTHING)
    ids = random_tokens(2, 30)
    expected = oracle_model("llama")(ids).logits
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    spin, calls = ALL_ATTENTION_FUNCTIONS["spin"], []

    def twice(*args: Any, **kwargs: Any) -> Any:
        first, second = spin(*args, **kwargs), spin(*args, **kwargs)
        calls.append((first[0], second[0]))
        return second

    ALL_ATTENTION_FUNCTIONS["spin"] = twice
    try:
        parts = [model(part, past_key_values=cache).logits for part in ids.split([20, 1, 9], dim=1)]
    finally:
        ALL_ATTENTION_FUNCTIONS["spin"] = spin
    assert all(torch.equal(first, second) for first, second in calls)
    assert len(calls) == 6
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 30
    cache.check_integrity()


@torch.no_grad()
def test_a_call_without_the_cache_after_an_interruption() -> None:
    """What an interrupted call left open is not charged to a call that has nothing to do with it."""
    model = build_model("llama")
    cache = ChangingCache(model, budget=EVERYTHING)
    ids = random_tokens(1, 12)

    def interrupted(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        raise KeyboardInterrupt

    cache.change = staticmethod(interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(ids, past_key_values=cache)
    logits = model(ids, use_cache=False).logits
    torch.testing.assert_close(logits, oracle_model("llama")(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_output_takes_over_a_result(mode: Any) -> None:
    """Only a fresh one, once, and only a result in its own layout and dtype."""
    with mode():
        out = handed_states.fresh_output(torch.zeros(2, 3, 5, 8), torch.zeros(2, 1, 5, 4))
        assert out.shape == (2, 5, 3, 4)
        result = torch.rand(2, 5, 3, 4)
        assert not handed_states.take_over(torch.empty_like(out), result)
        assert not handed_states.take_over(out, result.double())
        assert not handed_states.take_over(out, torch.rand(2, 3, 5, 4).transpose(1, 2))
        before = out.data_ptr()
        assert handed_states.take_over(out, torch.cat([result, result])[2:])
        assert out.data_ptr() != before
        assert torch.equal(out, result)
        assert not handed_states.take_over(out, result)


@torch.no_grad()
def test_a_whole_prompt_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first forward of a prompt has one result; many queries behind earlier tokens have several, which are merged."""
    model, merges = build_model("llama"), []
    merge = dense.kernels.merge_into
    monkeypatch.setattr(dense.kernels, "merge_into", lambda *given: merges.append(len(given[0])) or merge(*given))
    cache = SpinCache(model, budget=EVERYTHING)
    model(random_tokens(2, 40), past_key_values=cache)
    assert not merges
    model(random_tokens(2, 200, seed=1), past_key_values=cache)
    assert merges == [2] * len(cache.paged_layers)
