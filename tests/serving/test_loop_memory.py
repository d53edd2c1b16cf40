"""A loop with `gpu_memory="auto"` on a GPU that is only counted: admission, caches that share it, and what can never fit."""

from __future__ import annotations

import pytest

from spin_hf import CapacityError, RequestLoop, SpinCache
from spin_hf.serving import admission
from tests.support.fake_gpu import FakeGpu, fake_gpu
from tests.support.loop_schedules import generated_alone
from tests.support.zoo import build_model, random_tokens

MODEL = build_model("llama")
FULL = dict(method="shadowkv", budget=4096)
SPARSE = dict(method="shadowkv", budget=32, recent_window=16)
PROMPTS = [random_tokens(1, length, seed=length)[0].tolist() for length in (500, 130, 470, 260, 600, 40)]


def run(
    gpu: FakeGpu, prompts: list[list[int]], new: int, **options: object
) -> tuple[list[list[int]], RequestLoop, int]:
    """Tokens of each request, the loop, and the least memory that was free."""
    loop = RequestLoop(MODEL, max_rows=4, max_slowdown=None, max_wait_s=None, share_prefixes=False, **options)  # type: ignore[arg-type]
    make, least = loop.scheduler.make_cache, gpu.total

    def counted() -> SpinCache:
        cache = make()
        gpu.caches.append(cache)
        return cache

    loop.scheduler.make_cache = counted
    requests = [loop.unchecked(prompt, max_new_tokens=new) for prompt in prompts]
    for request in requests:
        loop.check(request)
        loop.scheduler.waiting.append(request)
    more = True
    while more:
        more = loop.scheduler.turn()
        living = {id(cache) for cache, _ in loop.scheduler.held()} | {id(cache) for cache in loop.scheduler.idle()}
        gpu.caches[:] = [cache for cache in gpu.caches if id(cache) in living]
        least = min(least, gpu.free)
    return [request.handle.outcome(0).tokens for request in requests], loop, least


@pytest.mark.parametrize("share", [4.0, 1.2])
def test_requests_share_a_gpu(share: float) -> None:
    """With room for four at once, and with little more than the longest one takes."""
    expected = [generated_alone(MODEL, prompt, FULL, max_new_tokens=10) for prompt in PROMPTS]
    resident = RequestLoop(MODEL, **FULL).scheduler.admission.needs(700).resident
    with fake_gpu(int(share * resident / 0.8)) as gpu:
        tokens, loop, least = run(gpu, PROMPTS, 10, **FULL)
        rows = loop.stats().mean_rows
    assert tokens == expected
    assert least >= 0
    assert rows > 2.0 if share > 2 else rows < 2.0


def test_more_requests_fit_if_each_needs_few_pages() -> None:
    """What `DynamicCache` would hold of one is room for several, as pages move to the cpu tier."""
    needs = RequestLoop(MODEL, **SPARSE).scheduler.admission.needs(700)
    prompts = [random_tokens(1, 600, seed=seed)[0].tolist() for seed in range(4)]
    with fake_gpu(int((2 * needs.minimum + needs.resident) / 0.7)) as gpu:
        tokens, loop, least = run(gpu, prompts, 8, **SPARSE)
        stats = loop.stats()
    assert [len(each) for each in tokens] == [8] * 4
    assert least >= 0
    assert stats.mean_rows >= 1.0
    assert stats.ended == {"length": 4}


def test_a_request_waits_for_a_running_one_that_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else pages of all that run move to the cpu tier, which takes time too."""
    needs = RequestLoop(MODEL, **SPARSE).scheduler.admission.needs(700)
    prompts = [random_tokens(1, 600, seed=seed)[0].tolist() for seed in range(4)]
    rows = []
    for rate in (1.0, 1e12):  # bytes per second
        monkeypatch.setattr(admission, "_MOVED_BYTES_PER_S", rate)
        with fake_gpu(int(2.6 * needs.resident / 0.8)) as gpu:
            _, loop, _ = run(gpu, prompts, 90, **SPARSE)
            rows.append(loop.stats().mean_rows)
        assert loop.scheduler.admission.moving_s(700) == needs.resident / rate
    assert rows[0] < 2.5 < rows[1]


def test_what_can_never_fit() -> None:
    with fake_gpu(60_000):
        loop = RequestLoop(MODEL, **FULL)
        with pytest.raises(CapacityError, match="GPU memory for one step"):
            loop.check(loop.unchecked(PROMPTS[0], max_new_tokens=10))
