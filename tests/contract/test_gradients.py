"""Training: rollouts in training mode, and gradients through new tokens after a prefix that needs none.

The gradients of a dense step are a DynamicCache's. Others are refused in the backward pass, with the remedy. Either way the
cache is as after inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from spin_hf import AttentionError, Bisection, RetroInfer, ShadowKV, SpinCache
from spin_hf.storage.change_log import Past
from tests.support.clustering_methods import clustering_often
from tests.support.inspection import state_of
from tests.support.memory import with_tight_gpu_memory
from tests.support.runs import generate
from tests.support.subjects import DenseSubject, SpinSubject
from tests.support.zoo import build_model, left_padded, random_tokens

TOLERANCE = 1e-4
"""Of a gradient, relative to the largest of its parameter."""


def loss_of(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The mean loss of predicting each next real token; `logits` of the last tokens of `ids`."""
    new = logits.shape[1]
    chosen = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, -new + 1 :, None]).squeeze(2)
    real = mask[:, -new:-1].bool() if new > 1 else mask[:, -1:].bool()
    return -chosen[real].mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert theirs
    for name, expected in theirs.items():
        assert bool(torch.isfinite(ours[name]).all()), name
        largest = float(expected.abs().max())
        assert float((ours[name] - expected).abs().max()) <= TOLERANCE * largest + 1e-9, name


def behind_a_prefix(model: Any, cache: Any, ids: Tensor, mask: Tensor, prefix: int) -> dict[str, Tensor]:
    """Gradients through tokens [prefix, n), the ones before read without gradients; the cache is gone by the backward pass."""
    if prefix:
        with torch.no_grad():
            model(ids[:, :prefix], attention_mask=mask[:, :prefix], past_key_values=cache)
    logits = model(ids[:, prefix:], attention_mask=mask, past_key_values=cache).logits
    del cache
    loss_of(logits, ids, mask).backward()
    return gradients(model)


@pytest.mark.parametrize("prefix", [0, 35, 55], ids=["from the start", "many new tokens", "few new tokens"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gemma2"])
def test_as_a_dynamic_cache_gives_them(family: str, padded: bool, prefix: int) -> None:
    model = build_model(family).train()
    ids, mask = left_padded([60, 52]) if padded else (random_tokens(2, 60), torch.ones(2, 60, dtype=torch.long))
    theirs = behind_a_prefix(model, DynamicCache(config=model.config), ids, mask, prefix)
    ours = behind_a_prefix(model, SpinCache(model, budget=1 << 20), ids, mask, prefix)
    assert_close(ours, theirs)


@pytest.mark.parametrize(
    "method", [ShadowKV(), clustering_often(Bisection, 32, 16)(), clustering_often(RetroInfer, 32, 16)()]
)
def test_behind_clustered_pages_in_both_tiers(method: Any) -> None:
    model = build_model("llama")
    ids, mask = random_tokens(1, 150), torch.ones(1, 150, dtype=torch.long)

    def run(cap: int | str) -> None:
        """A sparse conversation, then 30 tokens with gradients; and the same after a DynamicCache with the same contents."""
        cache = SpinCache(model, method, budget=16, recent_window=8, gpu_memory=cap)
        with torch.no_grad():
            for start, stop in [(0, 100), *((i, i + 1) for i in range(100, 120))]:
                model(ids[:, start:stop], past_key_values=cache)
        other = DynamicCache(config=model.config)
        for index, layer in enumerate(cache.layers):
            other.update(layer.keys, layer.values, index)
        assert isinstance(method, ShadowKV) or state_of(cache).sequences.spans.num_pages > 0
        results = []
        for each in (cache, other):
            logits = model(ids[:, 120:], past_key_values=each).logits
            loss_of(logits, ids, mask).backward()
            results.append(gradients(model))
        assert_close(*results)

    run("auto")
    with_tight_gpu_memory(run)


@pytest.mark.parametrize("new", [30, 1])
def test_a_given_mask(new: int) -> None:
    model, ids = build_model("llama"), random_tokens(2, 40 + new)
    length = 40 + new
    causal = torch.arange(length) <= torch.arange(40, length)[:, None]
    given = causal & (torch.rand(2, 4, new, length, generator=torch.Generator().manual_seed(0)) < 0.7)
    given |= torch.arange(length) == torch.arange(40, length)[:, None]

    def run(cache: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            model(ids[:, :40], past_key_values=cache)
        model(ids[:, 40:], attention_mask=given, past_key_values=cache).logits.square().mean().backward()
        return gradients(model)

    assert_close(
        run(SpinCache(model, budget=16)), run(DynamicCache(config=model.config))
    )  # such masks are never sparse


def test_prompts_and_many_tokens_have_gradients_at_any_budget() -> None:
    model, ids = build_model("llama"), random_tokens(2, 90)
    mask = torch.ones_like(ids)
    for prefix in (0, 40):
        theirs = behind_a_prefix(model, DynamicCache(config=model.config), ids, mask, prefix)
        assert_close(behind_a_prefix(model, SpinCache(model, budget=16, recent_window=8), ids, mask, prefix), theirs)


def test_only_the_inputs_train() -> None:
    """Prompt tuning: the model is frozen, the new tokens' embeddings are not."""
    model, ids = build_model("llama"), random_tokens(2, 60)
    model.requires_grad_(False)

    def run(cache: Any) -> dict[str, Tensor]:
        embeds = model.get_input_embeddings()(ids[:, 40:]).clone().requires_grad_(True)
        with torch.no_grad():
            model(ids[:, :40], past_key_values=cache)
        model(inputs_embeds=embeds, past_key_values=cache).logits.square().mean().backward()
        assert embeds.grad is not None
        return {"embeddings": embeds.grad}

    assert_close(run(SpinCache(model, budget=1 << 20)), run(DynamicCache(config=model.config)))


def test_two_continuations_of_one_prefix() -> None:
    """The new tokens of the first are cropped before either gets its backward pass: the prefix is still what it was."""
    model = build_model("llama")
    prefix, one, two = random_tokens(1, 40), random_tokens(1, 20, seed=1), random_tokens(1, 24, seed=2)

    def run(cache: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            model(prefix, past_key_values=cache)
        losses = []
        for new in (one, two):
            losses.append(model(new, past_key_values=cache).logits.square().mean())
            cache.crop(-new.shape[1])
        (losses[0] - 2 * losses[1]).backward()
        return gradients(model)

    assert_close(run(SpinCache(model, budget=1 << 20)), run(DynamicCache(config=model.config)))


def test_the_cache_goes_on() -> None:
    """A forward with gradients leaves the cache as one without does."""
    model, ids = build_model("llama"), random_tokens(2, 80)
    outputs = []
    for grad in (True, False):
        cache = SpinCache(model, budget=16, recent_window=8)
        with torch.no_grad():
            model(ids[:, :40], past_key_values=cache)
        with torch.set_grad_enabled(grad):
            out = model(ids[:, 40:70], past_key_values=cache).logits
        if grad:
            out.square().mean().backward()
        with torch.no_grad():
            outputs.append([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(70, 80)])
        cache.check_integrity()
        for layer in cache.layers:
            assert not layer.keys.requires_grad
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)


def _sparse(model: Any, cache: SpinCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        model(ids[:, :70], past_key_values=cache)
    return model(ids[:, 70:72], past_key_values=cache).logits  # type: ignore[no-any-return]


def _behind_a_graph(model: Any, cache: SpinCache, ids: Tensor) -> Tensor:
    model(ids[:, :40], past_key_values=cache)
    return model(ids[:, 40:72], past_key_values=cache).logits  # type: ignore[no-any-return]


def _cropped(model: Any, cache: SpinCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
    logits = model(ids[:, 40:72], past_key_values=cache).logits
    cache.crop(-40)
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
    return logits  # type: ignore[no-any-return]


def _reset(model: Any, cache: SpinCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
    logits = model(ids[:, 40:72], past_key_values=cache).logits
    cache.reset()
    return logits  # type: ignore[no-any-return]


def _other_batch(model: Any, cache: SpinCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        model(ids[:, :40], past_key_values=cache)
    logits = model(ids[:, 40:72], past_key_values=cache).logits
    cache.reorder_cache(torch.tensor([1, 0]))
    return logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (_sparse, "got one through a sparse step; give the cache budget=1.0"),
        (_behind_a_graph, r"expected the 40 tokens before to come from forwards under torch.no_grad\(\)"),
        (_cropped, "cropped, reset or given another batch since"),
        (_reset, "cropped, reset or given another batch since"),
        (_other_batch, "cropped, reset or given another batch since"),
    ],
)
def test_refused_in_the_backward_pass(run: Callable[[Any, SpinCache, Tensor], Tensor], text: str) -> None:
    """Never silently wrong. The forward itself is served, as its use is not known then."""
    model, ids = build_model("llama"), random_tokens(2, 72)
    cache = SpinCache(model, budget=16, recent_window=8)
    logits = run(model, cache, ids)
    with pytest.raises(AttentionError, match=text):
        logits.square().mean().backward()


def test_tokens_with_a_graph_that_are_gone_do_not_count() -> None:
    """After a crop to before them, tokens that carried gradients are no prefix of anything."""
    model, ids = build_model("llama"), random_tokens(1, 60)
    cache = SpinCache(model, budget=1 << 20)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
    for _ in range(3):  # steps of an optimiser
        model(ids[:, 30:], past_key_values=cache).logits.square().mean().backward()
        cache.crop(-30)
    model.zero_grad()


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_rollouts_in_training_mode(family: str) -> None:
    ids, mask = left_padded([50, 41])
    spin, dense = SpinSubject(family), DenseSubject(family)
    spin.model.train()
    dense.model.train()
    try:
        got = generate(spin, ids, spin.new(), attention_mask=mask, new_tokens=8)
        expected = generate(dense, ids, dense.new(), attention_mask=mask, new_tokens=8)
    finally:
        spin.model.eval()
        dense.model.eval()
    assert torch.equal(got.sequences, expected.sequences)


def test_dropout_is_refused_before_anything_changes() -> None:
    model, ids = build_model("llama"), random_tokens(1, 30)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    cache = SpinCache(model)
    with pytest.raises(AttentionError, match=r"expected dropout 0, got 0.1; call model.eval\(\)"), torch.no_grad():
        model.train()(ids, past_key_values=cache)
    with torch.no_grad():
        model.eval()(ids, past_key_values=cache)
    assert cache.get_seq_length() == 30


def test_gradient_checkpointing_is_refused() -> None:
    """Where gradients are recorded it drops the cache, and the padding would be lost."""
    model = build_model("llama")
    ids, mask = left_padded([30, 22])
    model.gradient_checkpointing_enable()
    with pytest.raises(AttentionError, match=r"model.gradient_checkpointing_disable\(\) or"):
        model.train()(ids, attention_mask=mask, past_key_values=SpinCache(model))


def test_past() -> None:
    past = Past()
    marks = [past.now]
    for kept in (40, 50, 12, 30):
        past.change(kept)
        marks.append(past.now)
    unchanged = [max(n for n in range(100) if past.is_unchanged(mark, n)) for mark in marks]
    assert unchanged == [12, 12, 12, 30, 99]
