"""int8 pages on a GPU: kernels against the formulas in 16 bits, captured steps, and pages that move between them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

import spin_hf.kernels
from spin_hf import Bisection, Quest, RetroInfer, ShadowKV, SpinCache, plan
from spin_hf.storage.page_layout import Int8Layout
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.inspection import counted_by_kernels
from tests.support.padded_pair import generate
from tests.support.synchronisation import no_synchronisation
from tests.support.zoo import build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

OPTIONS: dict[str, Any] = {"method": "shadowkv", "budget": 24, "recent_window": 8, "cpu_dtype": "int8"}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key_dim", [128, 64, 80])
@pytest.mark.parametrize("method", [ShadowKV(), Quest(0), Bisection(), RetroInfer()], ids=repr)
def test_real_sizes_in_sixteen_bits(
    method: Any, key_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes in the backing store, and nearly the same outputs: ties of pages may differ."""
    shape, length = Shape(kv_heads=2, group=4, key_dim=key_dim, value_dim=key_dim), 9000
    kv = RandomKV.random(shape, 1, length + 9, seed=7).to("cuda", dtype)
    whole = plan(
        shape.config(), context_length=length + 9, dtype=dtype, method=method, budget=512, recent_window=64
    ).gpu_bytes
    driver = CacheDriver(
        shape, method=method, budget=512, recent_window=64, gpu_memory=whole * 6 // 10, cpu_dtype="int8"
    )
    driver.steps(kv, 0, [length, length + 1])
    twin = deepcopy(driver.cache)
    stops = [length + 2, length + 3, length + 6, length + 7, length + 8, length + 9]
    actual = torch.cat(driver.steps(kv, length + 1, stops), 1).float()
    driver.cache.check_integrity()
    stats, ours = driver.cache.stats(), _parts(driver)
    assert counted_by_kernels(driver.cache)["QUERIES"] > 0
    assert stats.loads > 0
    assert stats.hit_rate > 0
    driver.cache = twin
    monkeypatch.setattr(spin_hf.kernels, "launchers", lambda device: None)
    expected = torch.cat(driver.steps(kv, length + 1, stops), 1).float()
    for mine, theirs in zip(ours, _parts(driver), strict=True):
        assert torch.equal(mine, theirs)
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.mean()) < 0.02
    assert float(error.max()) < 0.2


def _parts(driver: CacheDriver) -> list[torch.Tensor]:
    """Codes and scales of all tokens in the backing store."""
    store, length = driver.cache.layers[0].store, driver.cache.get_seq_length()
    assert isinstance(store.backing_layout, Int8Layout)
    rows = store.rows(0, store.sequences.num_pages)
    torch.cuda.synchronize()
    return [part.flatten(2, 3)[:, :, :length] for part in store.backing_layout.split(store.backing.take(rows))]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_number_of_page_frames_changes_nothing(dtype: torch.dtype) -> None:
    """Bit for bit: a load gives what the frame would hold. Lists of pages are the same, so are sums."""
    shape, length = Shape(kv_heads=2, group=4, key_dim=128, value_dim=128), 3000
    kv = RandomKV.random(shape, 1, length + 20, seed=8).to("cuda", dtype)
    options: dict[str, Any] = dict(method="shadowkv", budget=256, recent_window=64)
    made = plan(shape.config(), context_length=length + 20, dtype=dtype, **options)
    outputs, loads = [], []
    for cap in (made.smallest_gpu_memory, made.gpu_bytes // 2, made.gpu_bytes * 3 // 4):
        driver = CacheDriver(shape, **options, gpu_memory=cap, cpu_dtype="int8")
        outputs.append(torch.cat(driver.steps(kv, 0, [length, *range(length + 1, length + 21)])[1:], 1))
        driver.cache.check_integrity()
        loads.append(driver.cache.stats().loads)
    assert loads[0] > loads[1] >= loads[2] > 0
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[1], outputs[2])


@pytest.fixture
def model() -> Any:
    return build_model("llama").cuda().eval()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("moves", [False, True])
def test_captured_steps_do_what_eager_ones_do(model: Any, moves: bool, padded: bool) -> None:
    """Also where pages move to the cpu tier on the way: a graph captured before is not replayed after."""
    small = plan(model, context_length=150, batch_size=2, **OPTIONS)
    cap = small.gpu_bytes * 9 // 10 if not moves else small.gpu_bytes
    assert plan(model, context_length=350, batch_size=2, gpu_memory=cap, **OPTIONS).cpu_bytes > 0
    caches = [SpinCache(model, **OPTIONS, gpu_memory=cap) for _ in range(2)]
    caches[0].calls.steps.refused = "the test wants eager steps"
    caches[0].calls.steps._guard_of = lambda model: None
    expected, actual = (generate(model, cache, padded, 180) for cache in caches)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=0, atol=1e-3)
    assert not caches[0].calls.steps.captured
    assert sum(step is not None for step in caches[1].calls.steps.captured.values()) == 1 + moves, caches[
        1
    ].calls.steps.refused
    for cache in caches:
        assert cache.stats().cpu_bytes > 0
        assert cache.stats().loads > 0
        cache.check_integrity()


@torch.no_grad()
def test_no_step_waits_for_the_host(model: Any) -> None:
    made = plan(model, context_length=220, batch_size=2, **OPTIONS)
    cache = SpinCache(model, **OPTIONS, gpu_memory=made.gpu_bytes * 7 // 10)
    ids = torch.randint(3, 100, (2, 150), generator=torch.Generator().manual_seed(1)).cuda()
    model(ids, past_key_values=cache)
    token = torch.full((2, 1), 5, device="cuda")
    for _ in range(4):
        model(token, past_key_values=cache)
    with no_synchronisation():
        for _ in range(20):
            model(token, past_key_values=cache)
    assert cache.stats().cpu_bytes > 0
    cache.check_integrity()


def test_compiled_steps(model: Any) -> None:
    """`generate` compiles the step; pages move on the way. Compiled norms round otherwise, which int8 may show later on."""
    torch._dynamo.reset()
    small = plan(model, context_length=150, batch_size=2, **OPTIONS)
    compiled, captured = (SpinCache(given, **OPTIONS, gpu_memory=small.gpu_bytes) for given in (model.config, model))
    actual, expected = (generate(model, cache, False, 130) for cache in (compiled, captured))
    assert torch.equal(actual.sequences[:, :160], expected.sequences[:, :160])
    assert compiled.stats().cpu_bytes == captured.stats().cpu_bytes > 0
    for cache in (compiled, captured):
        cache.check_integrity()
