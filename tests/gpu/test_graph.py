"""Decode steps as CUDA graphs: exact, without synchronisation, several caches at once, and eager where they cannot be."""

from __future__ import annotations

import gc
import logging
from typing import Any

import pytest
import torch
from transformers import DynamicCache, TextStreamer

from spin_hf import ShadowKV, SpinCache, enable
from spin_hf.graph import model_calls
from spin_hf.kernels import device_limits
from tests.support.inspection import kernels_of
from tests.support.padded_pair import FULL, generate_short, padded_inputs
from tests.support.synchronisation import no_synchronisation
from tests.support.tuning import tune
from tests.support.zoo import PAD_TOKEN_ID, build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def _graphs(cache: SpinCache) -> int:
    return sum(step is not None for step in cache.calls.steps.captured.values())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"num_beams": 3}),
        ("llama", {"do_sample": True}),
        ("llama", {"output_hidden_states": True}),
        ("qwen3", {}),
        ("gpt_oss", {}),
        ("gemma3_text", {}),
        ("qwen3_next", {}),
        ("opt", {}),
    ],
)
def test_a_captured_step_equals_dynamic_cache(family: str, options: dict[str, Any], padded: bool) -> None:
    model = build_model(family).cuda().eval()
    expected = generate_short(model, DynamicCache(config=model.config), padded, **options)
    cache = SpinCache(model, **FULL)
    actual = generate_short(model, cache, padded, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    a, b = torch.stack(actual.logits), torch.stack(expected.logits)
    finite = torch.isfinite(b)
    assert float((a - b)[finite].abs().max() / b[finite].abs().max()) < 1e-4
    assert _graphs(cache) == 1, cache.calls.steps.refused
    cache.check_integrity()


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_no_step_waits_for_the_host(padded: bool) -> None:
    model = build_model("llama").cuda().eval()
    cache = SpinCache(model, "shadowkv", budget=24, recent_window=8)
    inputs = padded_inputs(padded)
    model(**inputs, past_key_values=cache)
    token, mask = torch.full((2, 1), 5, device="cuda"), inputs["attention_mask"]

    def step() -> None:
        nonlocal mask
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        model(token, past_key_values=cache, attention_mask=mask)

    for _ in range(3):
        step()
    assert _graphs(cache) == 1
    with no_synchronisation():
        for _ in range(50):
            step()
    cache.check_integrity()


def test_two_thousand_tokens_with_eviction() -> None:
    model = build_model("llama").cuda().eval()
    model.config.max_position_embeddings = 1 << 16
    cache = SpinCache(model, "shadowkv", budget=64, recent_window=16, gpu_memory=300_000)
    output = generate_short(model, cache, padded=True, max_new_tokens=2000, min_new_tokens=2000, eos_token_id=None)
    assert output.sequences.shape == (2, 2090)
    stats = cache.stats()
    assert stats.evictions > 2000
    assert stats.gpu_bytes <= 300_000
    assert _graphs(cache) == 1
    cache.check_integrity()


def test_captured_and_eager_steps_select_the_same() -> None:
    model = build_model("llama").cuda().eval()
    options: dict[str, Any] = {"method": "shadowkv", "budget": 24, "recent_window": 8, "gpu_memory": 100_000}
    eager = SpinCache(model.config, **options)
    expected = generate_short(model, eager, padded=True, disable_compile=True)
    cache = SpinCache(model, **options)
    actual = generate_short(model, cache, padded=True)
    assert torch.equal(actual.sequences, expected.sequences)
    assert torch.equal(torch.stack(actual.logits), torch.stack(expected.logits))
    assert str(cache.stats()) == str(eager.stats())


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_dense_steps_become_sparse(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As reading everything takes longer than selecting: another graph goes on, and sees what the dense steps appended."""
    model, inputs = build_model("llama").cuda().eval(), padded_inputs(padded)
    tune(monkeypatch, dense_factor=1)
    whole = (
        2 * (16 + 16) * 4 * (2 * 120 - 24)
    )  # bytes of one sequence for which selecting saves 2 * 96 tokens, as of two here
    monkeypatch.setattr(device_limits, "bytes_per_us", lambda device: (whole + 1) / ShadowKV().recipe.overhead_us)
    logits = []
    for given in (model.config, model):  # eager, captured
        cache = SpinCache(given, "shadowkv", budget=24, recent_window=8)
        mask, token = inputs["attention_mask"], torch.full((2, 1), 5, device="cuda")
        model(**inputs, past_key_values=cache)
        steps = []
        for _ in range(70):
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            steps.append(model(token, past_key_values=cache, attention_mask=mask).logits)
        logits.append(torch.cat(steps, 1))
        assert cache.stats().sparse_queries == 40 * 2 * 2 * model.config.num_hidden_layers
        cache.check_integrity()
    assert _graphs(cache) == 2
    assert torch.equal(*logits)


@pytest.mark.parametrize("dense_below", [0, 4096])
def test_steps_are_compiled_while_a_prompt_is_read(dense_below: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then they do the same. Behind a prompt that steps read whole, kernels that select pages are not waited for."""
    sequences = []
    for early in (False, True):
        tune(monkeypatch, compiles_early=early)
        model = build_model("llama").cuda().eval()
        cache = SpinCache(model, budget=24, recent_window=8, dense_below=dense_below)
        sequences.append(generate_short(model, cache, padded=True).sequences)
        (kernels,) = kernels_of(cache)
        assert bool(kernels.early) == early
        assert bool(kernels.compiling) == (early and dense_below > 0)
        cache.check_integrity()
    assert torch.equal(*sequences)


@torch.no_grad()
def test_caches_side_by_side_and_one_dropped() -> None:
    model = build_model("llama").cuda().eval()
    tokens = torch.randint(3, 100, (3, 24), generator=torch.Generator().manual_seed(3)).cuda()
    prompts = [padded_inputs()["input_ids"], padded_inputs(length=70)["input_ids"], padded_inputs()["input_ids"][:1]]

    def run(caches: list[Any]) -> list[torch.Tensor]:
        logits: list[list[torch.Tensor]] = [[] for _ in caches]
        for cache, prompt in zip(caches, prompts, strict=True):
            model(prompt, past_key_values=cache)
        for step in range(24):
            if step == 12 and isinstance(caches[0], SpinCache):
                caches[0] = None
                gc.collect()
            for index, (cache, prompt) in enumerate(zip(caches, prompts, strict=True)):
                if index or step < 12:
                    token = tokens[index, step].expand(prompt.shape[0], 1)
                    logits[index].append(model(token, past_key_values=cache).logits)
        return [torch.cat(each, 1) for each in logits]

    expected = run([DynamicCache(config=model.config) for _ in prompts])
    actual = run([SpinCache(model, **FULL) for _ in prompts])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_nothing_is_leaked() -> None:
    model = build_model("llama").cuda().eval()
    generate_short(model, SpinCache(model, **FULL))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        generate_short(model, SpinCache(model, **FULL))
    gc.collect()
    assert torch.cuda.memory_allocated() <= before
    assert "forward" not in model.__dict__


def test_a_forward_that_asks_the_host_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    model = build_model("llama").cuda().eval()
    expected = generate_short(model, DynamicCache(config=model.config))
    mlp, forward = model.model.layers[0].mlp, model.model.layers[0].mlp.forward
    mlp.forward = lambda states: forward(states) if bool(states.isfinite().all()) else states
    cache = SpinCache(model, **FULL)
    with caplog.at_level(logging.WARNING, logger="spin_hf"):
        actual = generate_short(model, cache)
    assert torch.equal(actual.sequences, expected.sequences)
    assert ["capturing failed" in record.getMessage() for record in caplog.records] == [True]
    cache.check_integrity()
    assert torch.equal(generate_short(model, DynamicCache(config=model.config)).sequences, expected.sequences)


def test_enable_streaming_and_hooks_on_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    class Tokenizer:
        def decode(self, ids: Any, **_: Any) -> str:
            return " ".join(map(str, torch.as_tensor(ids).flatten().tolist())) + "\n"

    model = build_model("llama").cuda().eval()
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *args: calls.append(1))
    row = {name: given[:1] for name, given in padded_inputs().items()}
    with enable(model, **FULL):
        ours = model.generate(**row, max_new_tokens=20, do_sample=False, streamer=TextStreamer(Tokenizer()))
    handle.remove()
    theirs = model.generate(**row, max_new_tokens=20, do_sample=False)
    assert torch.equal(ours, theirs)
    assert len(calls) == 20
    assert capsys.readouterr().out


@pytest.mark.parametrize("sampling", [False, True])
def test_generate_reads_late_whether_to_stop(sampling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With evictions all the time, an end of the sequence and another turn, as if every step had been waited for."""
    model = build_model("llama").cuda().eval()
    options: dict[str, Any] = {"do_sample": sampling, "max_new_tokens": 60, "pad_token_id": PAD_TOKEN_ID}
    asked: list[bool] = []
    supports = model_calls.reads_late
    monkeypatch.setattr(model_calls, "reads_late", lambda *args: asked.append(supports(*args)) or asked[-1])
    results, eos = [], None
    for devices in ((), (), ("cuda",)):  # the first one finds tokens to end at
        monkeypatch.setattr(model_calls, "_LATE_DEVICES", devices)
        cache = SpinCache(model, "shadowkv", budget=24, recent_window=8, gpu_memory=120_000)
        first = generate_short(model, cache, eos_token_id=eos, **options).sequences
        held = cache.get_seq_length()
        cache.check_integrity()
        ids = torch.cat([first, first[:, :5]], 1)
        second = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False, max_new_tokens=20,
            pad_token_id=PAD_TOKEN_ID,
        )  # fmt: skip
        assert cache.stats().evictions
        cache.check_integrity()
        results.append((first.tolist(), held, second.tolist(), cache.get_seq_length()))
        eos = eos or [int(first[0, 110]), int(first[1, 121])]
    assert results[1] == results[2]
    assert results[1][1] < results[0][1]
    assert asked == [False] * 4 + [True] * 2
