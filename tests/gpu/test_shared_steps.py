"""CUDA graphs that caches of one model take over from each other: exact, and replayed from the first step on."""

from __future__ import annotations

import gc
from copy import deepcopy
from typing import Any

import pytest
import torch

from spin_hf import SpinCache
from spin_hf.graph.runner import CapturedStep
from tests.support.inspection import kernels_of
from tests.support.threads import in_threads
from tests.support.zoo import PAD_TOKEN_ID, build_model, random_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

PROMPT, STEPS = 700, 24
OPTIONS: dict[str, Any] = {"budget": 64, "recent_window": 16}
MODES: dict[str, dict[str, Any]] = {
    "fitted": {},
    "bisection": {"method": "bisection"},
    "shadowkv": {"method": "shadowkv"},
    "retroinfer": {"method": "retroinfer"},
    "quest": {"method": "quest"},
    "tiered": {"method": "shadowkv", "gpu_memory": "1MB"},
    "bisection tiered": {"method": "bisection", "gpu_memory": "1MB"},
    "fitted tiered": {"gpu_memory": "1MB"},
}


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each replay."""
    made: list[int] = []
    replay = CapturedStep.replay

    def counted(self: CapturedStep, *args: Any) -> Any:
        made.append(1)
        return replay(self, *args)

    monkeypatch.setattr(CapturedStep, "replay", counted)
    return made


def _ids(seed: int, length: int = PROMPT + STEPS) -> torch.Tensor:
    return random_tokens(2, length, seed=seed).cuda()


@torch.no_grad()
def _read(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, length: int = PROMPT, **options: Any
) -> SpinCache:
    cache = SpinCache(model, **OPTIONS | options)
    model(ids[:, :length], past_key_values=cache, attention_mask=mask)
    return cache


@torch.no_grad()
def _steps(model: Any, cache: SpinCache, ids: torch.Tensor, start: int = PROMPT, count: int = STEPS) -> torch.Tensor:
    steps = (ids[:, at : at + 1] for at in range(start, start + count))
    return torch.cat([model(step, past_key_values=cache).logits for step in steps], 1)


def _alone(ids: torch.Tensor, mask: torch.Tensor | None = None, length: int = PROMPT, **options: Any) -> torch.Tensor:
    """Logits of the steps of a cache that shares nothing: of a copy of the model."""
    model = build_model("llama").cuda().eval()
    return _steps(model, _read(model, ids, mask, length, **options), ids, length, ids.shape[1] - length)


@pytest.mark.parametrize("mode", MODES)
def test_a_second_cache_needs_no_capture(mode: str, replays: list[int]) -> None:
    """Also one that is longer than the first, whose scratch does not suffice; and the first goes on afterwards."""
    model, options = build_model("llama").cuda().eval(), MODES[mode]
    first = _read(model, _ids(1), **options)
    whole = [_steps(model, first, _ids(1), count=STEPS // 2)]
    other = _ids(2, 3 * PROMPT + STEPS)
    before = len(replays)
    second = _read(model, other, length=3 * PROMPT, **options)
    actual = _steps(model, second, other, 3 * PROMPT)
    assert len(replays) == before + STEPS
    torch.testing.assert_close(actual, _alone(other, length=3 * PROMPT, **options), rtol=0, atol=1e-4)
    whole.append(_steps(model, first, _ids(1), PROMPT + STEPS // 2, STEPS // 2))
    torch.testing.assert_close(torch.cat(whole, 1), _alone(_ids(1), **options), rtol=0, atol=1e-4)
    for cache in (first, second):
        cache.check_integrity()
        assert (
            cache.stats().sparse_queries
            == STEPS * 2 * model.config.num_key_value_heads * model.config.num_hidden_layers
        )


def test_padded_caches(replays: list[int]) -> None:
    model, ids = build_model("llama").cuda().eval(), _ids(3)
    masks = []
    for columns in (100, 31):
        padded = torch.ones_like(ids[:, :PROMPT])
        padded[0, :columns] = 0
        masks.append(padded)
    prompts = [torch.where(torch.nn.functional.pad(mask, (0, STEPS), value=1) > 0, ids, PAD_TOKEN_ID) for mask in masks]
    for mask, prompt in zip(masks, prompts, strict=True):
        before = len(replays)
        actual = _steps(model, _read(model, prompt, mask), prompt)
        assert len(replays) >= before + STEPS - 1
        torch.testing.assert_close(actual, _alone(prompt, mask), rtol=0, atol=1e-4)


def test_caches_in_turn() -> None:
    model = build_model("llama").cuda().eval()
    ids = [_ids(seed) for seed in (4, 5, 6)]
    caches = [_read(model, each) for each in ids]
    got: list[list[torch.Tensor]] = [[] for _ in ids]
    for at in range(PROMPT, PROMPT + STEPS):
        for index, cache in enumerate(caches):
            got[index].append(_steps(model, cache, ids[index], at, 1))
    assert len({kernels_of(cache)[0] for cache in caches}) == 3
    for each, logits in zip(ids, got, strict=True):
        torch.testing.assert_close(torch.cat(logits, 1), _alone(each), rtol=0, atol=1e-4)


def test_forks_and_copies(replays: list[int]) -> None:
    model, ids = build_model("llama").cuda().eval(), _ids(7)
    document, expected = _read(model, ids), _alone(ids)
    _steps(model, document.fork(), ids, count=3)
    for make in (document.fork, lambda: deepcopy(document), document.fork):
        before, twin = len(replays), make()
        torch.testing.assert_close(_steps(model, twin, ids), expected, rtol=0, atol=1e-4)
        assert len(replays) == before + STEPS
    document.check_integrity()


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next", "gpt_oss"])
def test_windows_and_linear_states(family: str, replays: list[int]) -> None:
    """Of three caches, which take over the kernels from each other; each goes on afterwards."""
    models = [build_model(family).cuda().eval() for _ in range(4)]
    for model in models:
        if hasattr(model.config, "num_experts_per_tok"):  # as `generate` does: the default one waits for the host
            model.set_experts_implementation("batched_mm")
    ids, caches, got = [_ids(seed) for seed in (11, 12, 13)], [], []
    for each in ids:
        before, cache = len(replays), _read(models[3], each)
        got.append([_steps(models[3], cache, each, count=STEPS // 2)])
        assert len(replays) == before + STEPS // 2 - (not caches)  # the first step of all is eager
        caches.append(cache)
    for number, cache in enumerate(caches):
        got[number].append(_steps(models[3], cache, ids[number], PROMPT + STEPS // 2, STEPS // 2))
        alone = _steps(models[number], _read(models[number], ids[number]), ids[number])
        torch.testing.assert_close(torch.cat(got[number], 1), alone, rtol=0, atol=1e-4)


def test_memory_of_a_cache_that_ends() -> None:
    """Its pages are freed. What stays for the next cache is small."""
    model, ids = build_model("llama").cuda().eval(), _ids(8, 40_000)
    for rounds in range(3):
        cache = _read(model, ids, length=39_900)
        _steps(model, cache, ids, 39_900, 3)
        held = cache.stats().gpu_bytes
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        del cache
        gc.collect()
        torch.cuda.synchronize()
        assert before - torch.cuda.memory_allocated() > 0.9 * held, rounds


def test_threads_with_one_model() -> None:
    """Each with its cache: kernels are not taken within a forward."""
    model, count = build_model("llama").cuda().eval(), 4
    ids = [_ids(number) for number in range(count)]
    expected = [_alone(each) for each in ids]
    _steps(model, _read(model, ids[0]), ids[0], count=3)
    got: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                got[number] = _steps(model, _read(model, ids[number]), ids[number]).cpu()

    in_threads(count, work)
    for number in range(count):
        torch.testing.assert_close(got[number], expected[number].cpu(), rtol=0, atol=1e-4)
    cache = _read(model, ids[0])
    _steps(model, cache, ids[0], count=1)
    assert cache.calls.steps is not None
    assert cache.calls.steps.refused is None
