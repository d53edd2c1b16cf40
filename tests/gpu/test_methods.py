"""Every method that kernels serve, on a GPU: captured steps against the formulas of the same method, and against dense."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import spin_hf.kernels
from spin_hf import Bisection, Fitted, Quest, RetroInfer, SeerAttention, SpinCache
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.cluster_by_formulas import cluster_by_formulas
from tests.support.clustering_methods import clustering_often, little_slack
from tests.support.inspection import counted_by_kernels, state_of
from tests.support.padded_pair import generate, padded_inputs
from tests.support.seer_gates import gates_for
from tests.support.synchronisation import no_synchronisation
from tests.support.zoo import build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

METHODS = [
    clustering_often(Bisection, 64, 32)(2), clustering_often(RetroInfer, 64, 32)(), Quest(1), Quest(0), SeerAttention(),
    SeerAttention(threshold=0.25), clustering_often(Fitted, 64, 32)(),
]  # fmt: skip
OPTIONS: dict[str, Any] = {"budget": 24, "recent_window": 8}


@pytest.fixture
def model() -> Any:
    return build_model("llama").cuda().eval()


@pytest.fixture(params=METHODS, ids=repr)
def method(request: pytest.FixtureRequest, model: Any, tmp_path: Path) -> Any:
    """A method that kernels serve; SeerAttention with random gates."""
    if not isinstance(request.param, SeerAttention):
        return request.param
    gates_for(model, tmp_path)
    return replace(request.param, gates=tmp_path)


@pytest.mark.parametrize("method", METHODS[:-1], ids=repr, indirect=True)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("gpu_memory", ["auto", 220_000])
def test_captured_steps_do_what_the_formulas_do(
    model: Any, method: Any, gpu_memory: Any, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**OPTIONS, "method": method, "gpu_memory": gpu_memory}
    cluster_by_formulas(monkeypatch)
    with little_slack():
        with monkeypatch.context() as patch:
            patch.setattr(spin_hf.kernels, "launchers", lambda device: None)
            reference = SpinCache(model.config, **options)
            expected = generate(model, reference, padded)
            counted = reference.stats()
        cache = SpinCache(model, **options)
        actual = generate(model, cache, padded)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=0, atol=1e-3)
    assert sum(step is not None for step in cache.calls.steps.captured.values()) >= 1, cache.calls.steps.refused
    stats = cache.stats()
    cache.check_integrity()
    assert stats.sparse_queries == counted.sparse_queries > 0
    assert stats.attended_tokens == counted.attended_tokens
    if gpu_memory != "auto":
        assert stats.loads > 0


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("gpu_memory", ["auto", 220_000])
def test_captured_steps_over_codes_do_what_the_formulas_do(
    model: Any, gpu_memory: Any, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step from the same state, as its queries have 16 bits: where two pages are nearly alike, another one is selected."""
    inputs, differences = padded_inputs(padded, 150), []
    mask, ids = (
        inputs["attention_mask"],
        torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(2)).cuda(),
    )
    with little_slack():
        cache = SpinCache(model, method=clustering_often(Fitted, 64, 32)(), gpu_memory=gpu_memory, **OPTIONS)
        model(**inputs, past_key_values=cache)
        for token in ids.split(1, 1):
            mask, twin = torch.cat([mask, torch.ones_like(token)], 1), deepcopy(cache)
            actual = model(token, past_key_values=cache, attention_mask=mask).logits
            with monkeypatch.context() as patch:
                patch.setattr(spin_hf.kernels, "launchers", lambda device: None)
                expected = model(token, past_key_values=twin, attention_mask=mask).logits
            differences.append(float((actual - expected).abs().max()))
    assert sum(step is not None for step in cache.calls.steps.captured.values()) >= 1, cache.calls.steps.refused
    off = torch.tensor(differences)
    assert float(off.median()) < 5e-4
    assert float((off > 2e-3).float().mean()) < 0.25
    cache.check_integrity()


@torch.no_grad()
def test_a_basis_that_is_fitted_while_steps_are_captured(model: Any) -> None:
    """The prompt has too few tokens to be clustered. The graph goes on with the basis of the cache as it is."""
    method = clustering_often(Fitted, 64, 32)()
    ids = torch.randint(3, 100, (2, 200), generator=torch.Generator().manual_seed(1)).cuda()
    logits = []
    for at_once in (False, True):  # one cache replays, one decodes eagerly
        with little_slack():
            cache = SpinCache(model if at_once else model.config, method=method, **OPTIONS)
            steps = [model(ids[:, :30], past_key_values=cache)]
            assert all(layer.fitted is None for layer in state_of(cache).layers)
            steps += [model(ids[:, at : at + 1], past_key_values=cache) for at in range(30, 200)]
        assert all(layer.fitted is not None for layer in state_of(cache).layers)
        logits.append(torch.cat([step.logits for step in steps], 1))
        cache.check_integrity()
    torch.testing.assert_close(*logits, rtol=0, atol=5e-3)


def test_a_budget_for_all_is_exact(model: Any, method: Any) -> None:
    expected = generate(model, DynamicCache(config=model.config), True)
    with little_slack():
        cache = SpinCache(model, budget=1 << 20, recent_window=8, method=method)
        actual = generate(model, cache, True)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=0, atol=1e-3)
    cache.check_integrity()


@torch.no_grad()
def test_no_step_waits_for_the_host(model: Any, method: Any) -> None:
    """Steps before which tokens are clustered do wait; there is none of them here."""
    cache = SpinCache(model, budget=24, recent_window=8, method=method)
    length = 185 if isinstance(method, Fitted) else 150  # tokens are clustered in units
    ids = torch.randint(3, 100, (2, length), generator=torch.Generator().manual_seed(1)).cuda()
    model(ids, past_key_values=cache)
    token = torch.full((2, 1), 5, device="cuda")
    for _ in range(4):
        model(token, past_key_values=cache)
    with no_synchronisation():
        for _ in range(20):
            model(token, past_key_values=cache)
    cache.check_integrity()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key_dim", [128, 64, 80])
@pytest.mark.parametrize("given", [Bisection(), RetroInfer(), Quest(0), Fitted()], ids=repr)
def test_real_sizes_in_sixteen_bits(
    given: Any, key_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 summaries, several segments and spans. Ties may differ, so outputs are only nearly the same.

    Both use the same clusters: on a GPU the order of sums varies, so another cache may have other clusters.
    """
    shape, length = Shape(kv_heads=2, group=4, key_dim=key_dim, value_dim=key_dim), 9000
    kv = RandomKV.random(shape, 1, length + 5, seed=7).to("cuda", dtype)
    driver = CacheDriver(shape, method=given, budget=512, recent_window=64)
    driver.steps(kv, 0, [length, length + 1])
    twin = deepcopy(driver.cache)
    actual = torch.cat(driver.steps(kv, length + 1, range(length + 2, length + 6)), 1).float()
    driver.cache.check_integrity()
    assert counted_by_kernels(driver.cache)["QUERIES"] > 0
    driver.cache = twin
    monkeypatch.setattr(spin_hf.kernels, "launchers", lambda device: None)
    expected = torch.cat(driver.steps(kv, length + 1, range(length + 2, length + 6)), 1).float()
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.mean()) < 0.02
    assert float(error.max()) < 0.15
