"""Errors of a cache that holds tokens: raised before anything changes, so that the conversation continues unchanged.

Each wrong call is made between two turns of a conversation. The second turn has to equal DynamicCache's. Families: all layers
paged, paged beside sliding layers, paged beside linear layers, none paged (latents), none paged (windows).

A linear-attention layer overwrites its state at every forward. Where an error comes too late for it, the cache may refuse to
continue (CacheStateError). It must never continue with other tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel

from spin_hf import AttentionError, BatchSizeError, BudgetError, CacheStateError, OptionError, SpinCache, SpinError
from tests.support.compare import Trace, assert_same
from tests.support.error_messages import check_message
from tests.support.memory import SMALL_ZONES, with_tight_gpu_memory
from tests.support.runs import generate
from tests.support.subjects import SpinSubject, Subject, dense_subject
from tests.support.zoo import build_model, left_padded, random_tokens, subject_model

FAMILIES = ("llama", "gemma3_text", "qwen3_next", "deepseek_v3", "mistral")


def conversation(subject: Subject, between: Callable[[Any], None] | None = None) -> Trace:
    """Two turns of a padded batch of 2 on one cache, with `between` called on it in between."""
    trace, cache = Trace(), subject.new()
    ids, mask = left_padded([61, 50])
    output = generate(subject, ids, cache, attention_mask=mask, new_tokens=5)
    if between is not None:
        between(cache)
        cache.check_integrity()  # type: ignore[attr-defined]
    ids = torch.cat([output.sequences, random_tokens(2, 4, seed=1)], dim=1)
    mask = torch.cat([mask, torch.ones_like(ids[:, mask.shape[1] :])], dim=1)
    trace.add_generated("after the error", generate(subject, ids, cache, attention_mask=mask, new_tokens=8))
    return trace


def assert_goes_on(subject: SpinSubject, between: Callable[[Any], None], may_refuse: bool = False) -> None:
    """The conversation continues as without the error; or, if allowed, the cache refuses to continue and names the remedy."""
    try:
        trace = conversation(subject, between)
    except CacheStateError as error:
        assert may_refuse
        check_message(error, "reset()")
    else:
        assert_same(trace, conversation(dense_subject(subject.family)))


@dataclass(frozen=True)
class Wrong:
    """A call that must fail, with the type and the words of its error."""

    call: Callable[[PreTrainedModel, Any], object]
    error: type[SpinError]
    builtin: type[Exception]
    facts: tuple[str, ...]


def _forward(rows: int, tokens: int = 1, **kwargs: Any) -> Callable[[PreTrainedModel, Any], object]:
    return lambda model, cache: model(random_tokens(rows, tokens), past_key_values=cache, **kwargs)


def _of_another_model(model: PreTrainedModel, cache: Any) -> None:
    copy.deepcopy(model)(random_tokens(2, 1), past_key_values=cache)


WRONG: dict[str, Wrong] = {
    "another model": Wrong(_of_another_model, AttentionError, ValueError, ("another model", "from_cache")),
    "more rows": Wrong(_forward(3), BatchSizeError, ValueError, ("2", "3", "reset")),
    "fewer rows": Wrong(_forward(1, 7), BatchSizeError, ValueError, ("2", "1")),
    "more rows and a mask": Wrong(
        _forward(3, attention_mask=torch.ones(3, 66, dtype=torch.long)), BatchSizeError, ValueError, ("2", "3")
    ),
    "generate with more rows": Wrong(
        lambda model, cache: model.generate(random_tokens(4, 66), past_key_values=cache, max_new_tokens=2),
        BatchSizeError, ValueError, ("2", "4"),
    ),
    "a mask of integers": Wrong(
        _forward(2, attention_mask=torch.ones(2, 1, 1, 66, dtype=torch.long)),
        AttentionError, ValueError, ("torch.int64", "bool()"),
    ),
    "a mask of fewer rows": Wrong(
        _forward(2, attention_mask=torch.tensor([[0] + [1] * 65])), BatchSizeError, ValueError, ("2", "(1, 66)")
    ),
    "a row that is not there": Wrong(
        lambda model, cache: cache.reorder_cache(torch.tensor([0, 2])), BatchSizeError, ValueError, ("2",)
    ),
    "a position bias": Wrong(
        _forward(2, position_bias=torch.zeros(1, 4, 1, 66)), AttentionError, ValueError, ("position_bias",)
    ),
    "a 4-D mask that is too narrow": Wrong(
        _forward(2, attention_mask=torch.zeros(2, 1, 1, 50)), AttentionError, ValueError, ("50", "66")
    ),
}  # fmt: skip
# Arguments that transformers' own layers take in their own way, where a model has such layers.
ALL_PAGED_ONLY = (
    "a position bias", "a 4-D mask that is too narrow", "a mask of integers", "a mask of fewer rows",
)  # fmt: skip


def _cases() -> Iterator[Any]:
    for name in WRONG:
        for family in FAMILIES:
            if not (name in ALL_PAGED_ONLY and family != "llama"):
                yield pytest.param(family, name, id=f"{family}-{name}")


@pytest.mark.parametrize(("family", "name"), _cases())
def test_cache_goes_on_after(family: str, name: str) -> None:
    wrong, subject = WRONG[name], SpinSubject(family)

    def between(cache: Any) -> None:
        with pytest.raises(wrong.error) as caught, torch.no_grad():
            wrong.call(subject.model, cache)
        assert isinstance(caught.value, wrong.builtin)
        check_message(caught.value, *wrong.facts)

    assert_goes_on(subject, between)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_batch_that_grows_beyond_the_cap(family: str) -> None:
    """Repeating every sequence 50 times needs more page frames than there are."""

    def run(cap: int) -> None:
        def between(cache: Any) -> None:
            with pytest.raises(BudgetError) as caught:
                cache.batch_repeat_interleave(50)
            assert caught.value.needed_bytes is not None
            check_message(caught.value, "gpu_memory", str(cap), str(caught.value.needed_bytes))

        assert_goes_on(SpinSubject(family, gpu_memory=cap, **SMALL_ZONES), between)

    with_tight_gpu_memory(run)


@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next", "deepseek_v3", "mistral"])
def test_an_interrupted_forward(family: str, layer: int) -> None:
    """A forward that fails between layers, or after the last, leaves the cache as it was, or reports that it cannot."""
    subject = SpinSubject(family)
    last = subject.model.config.num_hidden_layers - 1

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    def between(cache: Any) -> None:
        handle = subject.model.model.layers[layer].mlp.register_forward_pre_hook(stop)
        try:
            with pytest.raises(KeyboardInterrupt), torch.no_grad():
                subject.model(random_tokens(2, 3), past_key_values=cache)
        finally:
            handle.remove()
        if layer % (last + 1) == last:  # every layer took the tokens
            cache.activate_past_recording()
            cache.crop(-3)

    if layer % (last + 1) == last and (any(subject.new().is_sliding) or any(subject.new().is_linear)):
        return  # these have let go of what they would need to roll back
    assert_goes_on(subject, between, may_refuse=True)


def test_a_refused_cache_works_after_reset() -> None:
    subject, oracle = SpinSubject("qwen3_next"), dense_subject("qwen3_next")
    cache = subject.new()
    with torch.no_grad():
        subject.model(random_tokens(2, 50), past_key_values=cache)
        with pytest.raises(AttentionError):
            subject.model(
                random_tokens(2, 1), attention_mask=torch.ones(2, 1, 1, 51, dtype=torch.long), past_key_values=cache
            )
    cache.reset()
    trace, expected = Trace(), Trace()
    trace.add_generated("reset", generate(subject, random_tokens(2, 40), cache))
    expected.add_generated("reset", generate(oracle, random_tokens(2, 40), oracle.new()))
    assert_same(trace, expected)


def test_crop_to_a_positive_length() -> None:
    """transformers took the length to keep before 5.18, and refuses it since; so does SpinCache."""
    model = subject_model("llama")
    cache = SpinCache(model)
    with torch.no_grad():
        model(random_tokens(1, 30), past_key_values=cache)
    if Version(transformers.__version__) < Version("5.18"):
        cache.crop(21)
        assert cache.get_seq_length() == 21
        cache.crop(40)
        assert cache.get_seq_length() == 21
    else:
        with pytest.raises(OptionError) as caught:
            cache.crop(21)
        assert isinstance(caught.value, ValueError)
        check_message(caught.value, "21")
        assert cache.get_seq_length() == 30
    cache.check_integrity()


def test_dropout_is_refused() -> None:
    model = build_model("gpt2")
    model.train()  # GPT-2 drops attention weights while it trains
    with pytest.raises(AttentionError) as caught, torch.no_grad():
        model(random_tokens(1, 9), past_key_values=SpinCache(model))
    check_message(caught.value, "dropout", "eval()")


def test_training_through_a_sparse_step_is_refused() -> None:
    """The choice of pages has no gradient: forward works without no_grad, backward does not."""
    model = build_model("llama")
    cache = SpinCache(model, budget=16, recent_window=8)
    with torch.no_grad():
        model(random_tokens(1, 90), past_key_values=cache)
    logits = model(random_tokens(1, 1), past_key_values=cache).logits
    with pytest.raises(AttentionError) as caught:
        logits.sum().backward()
    check_message(caught.value, "sparse", "budget")


def test_layers_do_not_change_one_by_one() -> None:
    model = subject_model("llama")
    cache = SpinCache(model)
    with torch.no_grad():
        model(random_tokens(2, 30), past_key_values=cache)
    for name, arguments in (("reset", ()), ("crop", (-1,)), ("reorder_cache", (torch.tensor([1, 0]),))):
        with pytest.raises(CacheStateError) as caught:
            getattr(cache.layers[0], name)(*arguments)
        check_message(caught.value, "cache")
    cache.check_integrity()
    assert cache.get_seq_length() == 30
