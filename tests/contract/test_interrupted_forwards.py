"""Forwards that end early: in a shortened stack of layers, by an exception, or before their tokens count. None is half done."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from spin_hf import AttentionError, CacheStateError, SpinCache
from spin_hf.attention import handed_states, interface
from spin_hf.forward_log import ForwardLog
from spin_hf.graph import model_calls
from spin_hf.layer import SpinLayer
from tests.support.compare import Trace, assert_same
from tests.support.runs import EVERYTHING, advance, decode, logits_of
from tests.support.subjects import DenseSubject, SpinSubject
from tests.support.zoo import build_model, random_tokens

HYBRIDS = ("qwen3_next", "gemma3_text", "llama")


def shorten(model: PreTrainedModel, layers: int) -> None:
    """Cut the stack, as early exit and layer pruning do."""
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers


@pytest.mark.parametrize("midway", [False, True])
@pytest.mark.parametrize("method", ["shadowkv", "bisection", "fitted"])
def test_a_stack_that_was_cut(midway: bool, method: str) -> None:
    """The layers that are left hold what `DynamicCache`'s hold, and attend to all of it."""
    traces = []
    for subject in (SpinSubject("smollm3", method=method), DenseSubject("smollm3")):
        subject.model = copy.deepcopy(subject.model)
        trace, cache = Trace(), SpinCache(subject.model, method, **EVERYTHING) if not traces else subject.new()
        if not midway:
            shorten(subject.model, 1)
        token = advance(subject, cache, random_tokens(2, 61), trace, "prompt")
        shorten(subject.model, 1)
        token = decode(subject, cache, token, trace, "cut", 5)
        if midway:  # older versions of transformers cannot crop a layer that never had tokens
            cache.crop(-3)
        token = advance(subject, cache, random_tokens(2, 7), trace, "after a crop")
        cache.reorder_cache(torch.tensor([1, 1]))
        decode(subject, cache, token, trace, "after a reorder", 3)
        assert cache.get_seq_length() == 61 + 5 - 3 * midway + 7 + 3
        if isinstance(cache, SpinCache):
            cache.check_integrity()
        traces.append(trace)
    assert_same(*traces)


def test_a_layer_that_was_left_out_is_not_taken_for_one_that_kept_up() -> None:
    """When all layers are back, one of them lacks tokens: the error names it, and the shorter stack continues."""
    model = copy.deepcopy(build_model("llama"))
    cache, layers = SpinCache(model, **EVERYTHING), model.model.layers
    logits_of(model, random_tokens(1, 40), cache)
    shorten(model, 1)
    logits_of(model, random_tokens(1, 1), cache)
    whole = copy.copy(layers), 2
    model.model.layers, model.config.num_hidden_layers = whole
    with pytest.raises(CacheStateError, match=r"layer 1 holds 40 tokens.*41.*reset"):
        logits_of(model, random_tokens(1, 1), cache)
    assert cache.get_seq_length() == 41
    cache.crop(-1)
    dense = DynamicCache(config=model.config)
    logits_of(model, random_tokens(1, 40), dense)
    torch.testing.assert_close(
        logits_of(model, random_tokens(1, 3), cache), logits_of(model, random_tokens(1, 3), dense)
    )


@pytest.mark.parametrize("given", ["model", "config"])
def test_a_decoder_called_by_itself(given: str) -> None:
    """`model.model(...)` takes a cache too, by position as well."""
    model, oracle = build_model("llama"), DenseSubject("llama").model
    cache = SpinCache(model if given == "model" else model.config, **EVERYTHING)
    dense = DynamicCache(config=oracle.config)
    place = list(inspect.signature(model.model.forward).parameters).index("past_key_values" if "past_key_values" in
        inspect.signature(model.model.forward).parameters else "cache")  # fmt: skip
    for tokens in (50, 1, 1, 6):
        ids = random_tokens(2, tokens, seed=tokens)
        states = []
        for decoder, held in ((model.model, cache), (oracle.model, dense)):
            with torch.no_grad():
                states.append(decoder(ids, *[None] * (place - 1), held).last_hidden_state)
        torch.testing.assert_close(*states)
    assert cache.get_seq_length() == 58
    assert logits_of(model, random_tokens(2, 1), cache).isfinite().all()


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("at", ["first layer", "last layer", "behind the last layer"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_failing_call_never_happened(family: str, at: str, tokens: int) -> None:
    """Windows and linear states included; an exception at any place of the model takes all of it back."""
    traces = []
    for fails in (True, False):
        subject = SpinSubject(family)
        trace, cache = Trace(), subject.new()
        token = advance(subject, cache, random_tokens(2, 57), trace, "prompt")
        token = decode(subject, cache, token, trace, "before", 3)
        if fails:
            layers = subject.model.model.layers
            module = {"first layer": layers[0].mlp, "last layer": layers[-1].mlp}.get(at, subject.model.lm_head)
            with pytest.raises(KeyboardInterrupt), interrupting(module):
                logits_of(subject.model, random_tokens(2, tokens, seed=3), cache)
            assert cache.get_seq_length() == 60
            cache.check_integrity()
        token = advance(subject, cache, random_tokens(2, tokens, seed=4), trace, "after")
        decode(subject, cache, token, trace, "then", 4)
        traces.append(trace)
    assert_same(*traces)


class interrupting:  # noqa: N801
    """Ctrl-C when `module` is called."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        def interrupt(*args: Any) -> None:
            raise KeyboardInterrupt

        self.handle = self.module.register_forward_pre_hook(interrupt)

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def test_a_cache_of_a_config_does_not_guess_how_its_first_forward_ended() -> None:
    model = build_model("llama")
    cache = SpinCache(model.config, **EVERYTHING)
    with pytest.raises(KeyboardInterrupt), interrupting(model.model.layers[0].mlp):
        logits_of(model, random_tokens(1, 30), cache)
    for use in (
        lambda: logits_of(model, random_tokens(1, 3), cache),
        lambda: cache.crop(-1),
        lambda: cache.reorder_cache(torch.tensor([0])),
        lambda: copy.deepcopy(cache),
    ):
        with pytest.raises(CacheStateError, match=r"after layer 0.*layer 1.*roll_back"):
            use()
    assert cache.get_seq_length() == 0
    assert cache.stats().tokens == 0
    cache.roll_back()
    torch.testing.assert_close(logits_of(model, random_tokens(1, 30), cache), model(random_tokens(1, 30)).logits)
    cache.roll_back()  # nothing to roll back
    assert cache.get_seq_length() == 30


def test_a_cache_of_a_config_is_told_how_later_forwards_end() -> None:
    """Its first forward has shown which model runs it."""
    model = copy.deepcopy(build_model("llama"))
    cache, dense = SpinCache(model.config, **EVERYTHING), DynamicCache(config=model.config)
    for held in (cache, dense):
        logits_of(model, random_tokens(1, 40), held)
    with pytest.raises(KeyboardInterrupt), interrupting(model.model.layers[0].mlp):
        logits_of(model, random_tokens(1, 3), cache)
    assert cache.get_seq_length() == 40
    torch.testing.assert_close(
        logits_of(model, random_tokens(1, 3), cache), logits_of(model, random_tokens(1, 3), dense)
    )
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(AttentionError, match="another"):
        logits_of(copy.deepcopy(model), random_tokens(1, 1), cache)


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward shows a cache made from a config which model runs it, as if that were none of transformers'."""
    monkeypatch.setattr(model_calls, "find_model", lambda *_: None)


def decodes_as_if_nothing_had_been(family: str, from_config: bool, interruption: Any, happens: bool = False) -> None:
    """Decode steps after an interrupted one give what they give without it or, if it `happens`, after it."""
    traces = []
    for interrupts in (True, False):
        subject = SpinSubject(family, from_config=from_config)
        trace, cache = Trace(), subject.new()
        token = advance(subject, cache, random_tokens(2, 57), trace, "prompt")
        token = decode(subject, cache, token, trace, "before", 3)
        if interrupts:
            with pytest.raises(KeyboardInterrupt), interruption(cache):
                logits_of(subject.model, token, cache)
            cache.roll_back()
            assert cache.get_seq_length() == 60 + happens
            cache.check_integrity()
        elif happens:
            logits_of(subject.model, token, cache)
        decode(subject, cache, token, trace, "then", 4)
        traces.append(trace)
    assert_same(*traces)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("layer", [0, 1], ids=["first", "second"])
def test_a_cache_of_a_config_takes_back_what_is_written_in_place(layer: int) -> None:
    """Linear attention overwrites its state before the cache is told."""

    def interruption(cache: SpinCache) -> Any:
        update, calls = cache.update_recurrent_state, iter(range(9))

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == layer:
                raise KeyboardInterrupt
            return update(*args, **kwargs)

        return patch.object(cache, "update_recurrent_state", interrupted)

    decodes_as_if_nothing_had_been("qwen3_next", True, interruption)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("place", [(handed_states, "owner"), (interface, "_check_arguments")], ids=["before", "after"])
@pytest.mark.parametrize("layer", [0, 1], ids=["first", "last"])
def test_a_cache_of_a_config_that_is_interrupted_where_attention_takes_the_keys(layer: int, place: Any) -> None:
    """Before and after the layer learns that its tokens are to be appended, which the last layer never does."""
    module, name = place
    original = getattr(module, name)

    def interruption(cache: SpinCache) -> Any:
        calls = iter(range(9))

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == layer:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return patch.object(module, name, interrupted)

    decodes_as_if_nothing_had_been("qwen3_next", True, interruption)


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("tells", ["roll_back", "release_gpu_memory"])
@pytest.mark.parametrize("place", [(handed_states, "owner"), (interface, "_check_arguments")], ids=["before", "after"])
def test_the_only_paged_layer_is_interrupted_where_attention_takes_the_keys(place: Any, tells: str) -> None:
    """Then no paged layer has appended, so lengths alone do not show that linear attention is a token ahead."""
    config = copy.deepcopy(build_model("qwen3_next").config)
    config.layer_types = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    torch.manual_seed(0)
    model = type(build_model("qwen3_next"))(config).eval()
    cache, dense, (module, name) = SpinCache(model.config, **EVERYTHING), DynamicCache(config=model.config), place
    for held in (cache, dense):
        logits_of(model, random_tokens(1, 40), held)
    with pytest.raises(KeyboardInterrupt), patch.object(module, name, side_effect=KeyboardInterrupt):
        logits_of(model, random_tokens(1, 1), cache)
    if tells == "release_gpu_memory" and place[0] is interface:
        with pytest.raises(CacheStateError, match="roll_back"):
            cache.release_gpu_memory()
        cache.roll_back()
    else:
        getattr(cache, tells)()
    for seed in (1, 2):
        ours, theirs = (logits_of(model, random_tokens(1, 1, seed=seed), held) for held in (cache, dense))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("unseen")
def test_a_cache_of_a_config_that_is_interrupted_behind_the_last_layer_that_holds_tokens() -> None:
    """Where layers share the keys of others, windows are rolled back like pages."""
    run = SpinLayer._run

    def interrupted(self: SpinLayer, call: Any, key: Any, value: Any, mask: Any, append: bool, out: Any) -> Any:
        if not append:
            raise KeyboardInterrupt
        return run(self, call, key, value, mask, append, out)

    decodes_as_if_nothing_had_been("gemma3n_text", True, lambda cache: patch.object(SpinLayer, "_run", interrupted))


@pytest.mark.parametrize("happens", [False, True])
def test_the_instant_at_which_a_forward_counts(happens: bool) -> None:
    """Pages and windows agree about it."""
    clear = ForwardLog.clear

    def interrupted(self: ForwardLog) -> None:
        if self.last >= 0:  # the end of the forward, not of what came before
            if happens:
                clear(self)
            patched.stop()
            raise KeyboardInterrupt
        clear(self)

    patched = patch.object(ForwardLog, "clear", interrupted)

    @contextmanager
    def interruption(cache: SpinCache) -> Iterator[None]:
        patched.start()
        yield

    decodes_as_if_nothing_had_been("gemma3_text", False, interruption, happens)


def test_a_call_that_drops_the_cache() -> None:
    """As gradient checkpointing in training mode: what it computes has nothing of the tokens held."""
    model = build_model("llama")
    cache = SpinCache(model, **EVERYTHING)
    logits_of(model, random_tokens(1, 20), cache)
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(AttentionError, match="gradient_checkpointing_disable"):
        model(random_tokens(1, 20), past_key_values=cache)
    assert cache.get_seq_length() == 20
    model.gradient_checkpointing_disable()
    assert model.eval()(random_tokens(1, 1), past_key_values=cache).logits.isfinite().all()
