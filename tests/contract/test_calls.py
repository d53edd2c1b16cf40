"""The calls that carry a cache: which model they are of, how they end, and that nothing else is changed outside of them."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from spin_hf import AttentionError, CacheStateError, SpinCache
from spin_hf.forward_pass import ForwardLog
from spin_hf.integration import forward_hook
from spin_hf.layer import SpinLayer
from tests.support.compare import Trace, assert_same
from tests.support.runs import advance, decode, generate
from tests.support.subjects import DenseSubject, SpinSubject
from tests.support.zoo import assistant_model, build_model, random_tokens

EVERYTHING = dict(budget=1 << 20)
HYBRIDS = ("qwen3_next", "gemma3_text", "llama")


def logits_of(call: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        return call(ids, past_key_values=cache).logits


# ------------------------------------------------------------------------------------------------ forwards that end early


def shorten(model: PreTrainedModel, layers: int) -> None:
    """Cut the stack, as early exit and layer pruning do."""
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers


@pytest.mark.parametrize("midway", [False, True])
@pytest.mark.parametrize("method", ["shadowkv", "bisection"])
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
    """When the whole stack comes back, a layer lacks tokens: an error names it, the cache goes on with the short one."""
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
        with pytest.raises(CacheStateError, match=r"behind layer 0.*layer 1.*roll_back"):
            use()
    assert cache.get_seq_length() == 0
    assert cache.stats().tokens == 0
    cache.roll_back()
    torch.testing.assert_close(logits_of(model, random_tokens(1, 30), cache), model(random_tokens(1, 30)).logits)
    cache.roll_back()  # nothing to take back
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


def decodes_as_if_nothing_had_been(family: str, from_config: bool, interruption: Any, happens: bool = False) -> None:
    """A decode step that is interrupted, then others: they give what they give without it, or, if it `happens`, behind it."""
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


@pytest.mark.parametrize("layer", [0, 1], ids=["first", "second"])
def test_a_cache_of_a_config_takes_back_what_is_written_in_place(layer: int) -> None:
    """Linear attention overwrites its state before it says so."""

    def interruption(cache: SpinCache) -> Any:
        update, calls = cache.update_recurrent_state, iter(range(9))

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == layer:
                raise KeyboardInterrupt
            return update(*args, **kwargs)

        return patch.object(cache, "update_recurrent_state", interrupted)

    decodes_as_if_nothing_had_been("qwen3_next", True, interruption)


def test_a_cache_of_a_config_that_is_interrupted_behind_the_last_layer_that_holds_tokens() -> None:
    """Where layers share the keys of others, windows are taken back as the pages are."""
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


# ---------------------------------------------------------------------------------------------------- which model it is


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("other_has_a_cache", [False, True])
def test_the_cache_of_another_model(family: str, other_has_a_cache: bool) -> None:
    """Refused before anything changes, whether or not the other model's calls are seen; `from_cache` takes the tokens over."""
    model = build_model(family)
    other = copy.deepcopy(model)
    own = SpinCache(other) if other_has_a_cache else None
    cache = SpinCache(model, **EVERYTHING)
    logits_of(model, random_tokens(2, 50), cache)
    for tokens in (1, 9):
        with pytest.raises(AttentionError, match=r"another model.*from_cache"):
            logits_of(other, random_tokens(2, tokens), cache)
        assert other.config._attn_implementation == model.config._attn_implementation == "sdpa"
    assert cache.get_seq_length() == 50
    cache.check_integrity()
    if family == "llama":
        taken = SpinCache.from_cache(cache, other, **EVERYTHING)
        ids = random_tokens(2, 3)
        torch.testing.assert_close(logits_of(other, ids, taken), logits_of(model, ids, cache))
    del own


def test_the_cache_of_a_larger_model() -> None:
    """A target's cache given to its draft, which has a SpinCache of its own."""
    large, small = build_model("llama"), assistant_model("llama")
    own, cache = SpinCache(small), SpinCache(large)
    with pytest.raises(AttentionError, match="another model"):
        small.generate(random_tokens(1, 20), past_key_values=cache, max_new_tokens=2)
    assert cache.get_seq_length() == own.get_seq_length() == 0


def test_the_cache_of_an_equal_config() -> None:
    model = build_model("llama")
    cache = SpinCache(copy.deepcopy(model.config), **EVERYTHING)
    with pytest.raises(AttentionError, match=r"LlamaAttention with another config.*'sdpa'"):
        logits_of(model, random_tokens(1, 20), cache)
    assert cache.get_seq_length() == 0


def test_layers_called_by_hand() -> None:
    """A cache of the config serves them; one of the model is told of calls of the model only, and says so."""
    model = build_model("llama")
    oracle, ids = DenseSubject("llama").model, random_tokens(1, 21)

    def by_hand(model: PreTrainedModel, cache: Any) -> torch.Tensor:
        decoder = model.model
        states = decoder.embed_tokens(ids)
        positions = torch.arange(ids.shape[1])[None]
        embeddings = decoder.rotary_emb(states, positions)
        name = "cache" if "cache" in inspect.signature(decoder.layers[0].forward).parameters else "past_key_values"
        with torch.no_grad():
            for layer in decoder.layers:
                states = layer(states, position_ids=positions, position_embeddings=embeddings, **{name: cache})
        return states

    expected = by_hand(oracle, DynamicCache(config=oracle.config))
    torch.testing.assert_close(by_hand(model, SpinCache(model.config, **EVERYTHING)), expected)
    with pytest.raises(AttentionError, match=r"by itself.*SpinCache\(model.config\)"):
        by_hand(model, SpinCache(model, **EVERYTHING))


# ------------------------------------------------------------------------------------------------------ forwards, wrapped


def forwards(model: nn.Module) -> dict[str, Any]:
    return {name: module.__dict__["forward"] for name, module in model.named_modules() if "forward" in module.__dict__}


def test_forwards_come_back_when_the_last_cache_goes() -> None:
    model = build_model("llama")
    first, second = SpinCache(model), SpinCache(model)
    wrapped = forwards(model)
    assert set(wrapped) == {"", "model"}
    assert all(isinstance(forward, MethodType) for forward in wrapped.values())
    assert inspect.signature(model.forward) == inspect.signature(MethodType(type(model).forward, model))
    del first
    gc.collect()
    assert forwards(model) == wrapped
    del second
    gc.collect()
    assert not forwards(model)
    assert not [name for name in model.__dict__ if "spin" in name]


def test_two_models_that_share_a_part() -> None:
    """The part's forward is wrapped while a cache of either lives."""
    first = build_model("llama")
    second = copy.deepcopy(first)
    second.model = first.model
    of_first, of_second = SpinCache(first), SpinCache(second)
    del of_first
    gc.collect()
    assert set(forwards(second)) == {"", "model"}
    del of_second
    gc.collect()
    assert not forwards(second)
    assert not forwards(first)


@pytest.mark.parametrize("order", ["cache, wrapper, cache", "wrapper, cache"])
def test_a_wrapper_of_somebody_else(order: str) -> None:
    """As accelerate's hooks: called once for each call, and left in place."""
    model, calls = build_model("llama"), []
    first = SpinCache(model, **EVERYTHING) if order.startswith("cache") else None
    inner = model.forward

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = outer  # type: ignore[method-assign]
    if order.startswith("cache"):
        del first
        gc.collect()
    cache = SpinCache(model, **EVERYTHING)
    subject, oracle = SpinSubject("llama"), DenseSubject("llama")
    subject.model = model
    trace, expected = Trace(), Trace()
    trace.add_generated("wrapped", generate(subject, random_tokens(1, 30), cache, new_tokens=4))
    expected.add_generated("wrapped", generate(oracle, random_tokens(1, 30), oracle.new(), new_tokens=4))
    assert_same(trace, expected)
    assert len(calls) == 4
    del cache
    gc.collect()
    assert model.forward is outer
    assert torch.equal(model(random_tokens(1, 9)).logits, oracle.model(random_tokens(1, 9)).logits)


@pytest.mark.parametrize("prepared_first", [False, True])
def test_a_forward_that_is_taken_apart(prepared_first: bool) -> None:
    """As accelerate's `unwrap_model(keep_fp32_wrapper=False)`: peels `__wrapped__`, and binds what is left to the model."""
    model, oracle = build_model("llama"), DenseSubject("llama").model
    cache = None if prepared_first else SpinCache(model, **EVERYTHING)
    original = model.forward
    model._original_forward = original

    @functools.wraps(original.__func__)
    def converted(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original.__func__(self, *args, **kwargs)

    model.forward = MethodType(converted, model)  # type: ignore[method-assign]
    if prepared_first:
        cache = SpinCache(model, **EVERYTHING)
    forward = model.forward
    model.__dict__.pop("_original_forward")
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
        if forward == original:
            break
    model.forward = MethodType(forward, model)  # type: ignore[method-assign]
    ids = random_tokens(1, 30)
    torch.testing.assert_close(model(ids).logits, oracle(ids).logits)
    torch.testing.assert_close(model(input_ids=ids).logits, oracle(ids).logits)
    name = "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"  # of the bare function
    torch.testing.assert_close(model(ids, **{name: cache}).logits, oracle(ids).logits)
    torch.testing.assert_close(
        model(ids[:, :1], **{name: cache}).logits, oracle(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    )
    del cache
    gc.collect()
    assert not [module for module in forwards(model) if module]
    torch.testing.assert_close(model(ids).logits, oracle(ids).logits)


def test_other_weights_for_one_call() -> None:
    """`functional_call` puts other tensors under the model's names."""
    model = build_model("llama")
    other = {name: parameter * 0.5 for name, parameter in model.named_parameters()}
    ids, expected = random_tokens(1, 20), copy.deepcopy(model)
    expected.load_state_dict(other, strict=False)
    cache = SpinCache(model, **EVERYTHING)
    logits = torch.func.functional_call(model, other, (ids,), {"past_key_values": cache}).logits
    torch.testing.assert_close(logits, expected(ids).logits)


def test_what_wraps_a_model_is_seen_through() -> None:
    model = build_model("llama")
    compiled = torch.compile(model, backend="eager")
    assert forward_hook.unwrapped(compiled) is model
    subject, oracle = SpinSubject("llama"), DenseSubject("llama")
    subject.model = model
    trace, expected = Trace(), Trace()
    trace.add_generated("", generate(subject, random_tokens(1, 30), SpinCache(compiled, **EVERYTHING), new_tokens=4))
    expected.add_generated("", generate(oracle, random_tokens(1, 30), oracle.new(), new_tokens=4))
    assert_same(trace, expected)
