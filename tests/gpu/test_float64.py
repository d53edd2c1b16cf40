"""The compiled kernels against float64: head sizes, groups, lengths, several queries, softcap, sinks, padding, paging."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from spin_hf.layer import SpinLayer
from tests.support import oracle
from tests.support.cache_driver import Shape, poisoned_memory, smallest_gpu_memory
from tests.support.conversation import without_near_ties
from tests.support.float64_bound import ALL, BOXES, DTYPES, MARGINS, SOME, Case, check_against_float64
from tests.support.oracle import PAGE_SIZE, Rules

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


SELECTIONS = [(ALL, dtype) for dtype in DTYPES] + [(SOME, torch.float32), (SOME, torch.float16)]
"""In bfloat16 pages of random data tie everywhere, and either of two is right."""


@pytest.fixture
def device() -> Iterator[torch.device]:
    """New memory is NaN."""
    with poisoned_memory():
        assert bool(torch.empty(1, device="cuda").isnan())
        yield torch.device("cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (256, 256), (192, 128)])
def test_head_sizes(key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    check_against_float64(Case(Shape(kv_heads=1, group=4, key_dim=key_dim, value_dim=value_dim), dtype), device)


@pytest.mark.parametrize("group", [1, 4, 7])
def test_groups(group: int, device: torch.device) -> None:
    check_against_float64(Case(Shape(group=group, key_dim=128, value_dim=128), torch.bfloat16), device)


@pytest.mark.parametrize("prompt", [PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 63, 200])
def test_context_lengths(prompt: int, device: torch.device) -> None:
    check_against_float64(Case(Shape(kv_heads=1, key_dim=64, value_dim=64), torch.bfloat16, lengths=(prompt,)), device)


@pytest.mark.parametrize("prompt", [1300, 9000])
def test_contexts_of_several_segments(prompt: int, device: torch.device) -> None:
    """And of several splits and tiles of all kernels."""
    shape = Shape(kv_heads=2, group=3, key_dim=128, value_dim=128)
    without_near_ties(
        lambda seed: check_against_float64(Case(shape, torch.float16, SOME, (1, 1), lengths=(prompt,)), device, seed)
    )


@pytest.mark.parametrize("rules", [ALL, SOME])
@pytest.mark.parametrize("sizes", [(1, 3), (16,), (1, 16)])
def test_several_queries(sizes: tuple[int, ...], rules: Rules, device: torch.device) -> None:
    shape = Shape(kv_heads=1, key_dim=64, value_dim=64)

    def run(seed: int) -> None:
        check_against_float64(Case(shape, torch.float16, rules, sizes, lengths=(123,)), device, seed)

    without_near_ties(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(50.0, False), (None, True), (1.5, True)])
def test_softcap_and_sinks(softcap: float | None, with_sinks: bool, dtype: torch.dtype, device: torch.device) -> None:
    logits = (0.5, -1.0, 3.0, 1.0) if with_sinks else ()
    shape = Shape(key_dim=64, value_dim=64)
    check_against_float64(
        Case(shape, dtype, replace(ALL, softcap=softcap), lengths=(43, 31), sink_logits=logits), device
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("key_dim", [64, 128])
def test_boxes(key_dim: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "_MARGIN", MARGINS[dtype])
    case = Case(Shape(group=3, key_dim=key_dim, value_dim=64), dtype, BOXES, (1, 3), lengths=(1300, 1270))
    without_near_ties(lambda seed: check_against_float64(case, device, seed) and None)


@pytest.mark.parametrize(("rules", "dtype"), SELECTIONS)
def test_left_padding(rules: Rules, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "_MARGIN", MARGINS[dtype])
    case = Case(Shape(key_dim=64, value_dim=64), dtype, rules, (1, 3), lengths=(123, 100))
    without_near_ties(lambda seed: check_against_float64(case, device, seed) and None)


@pytest.mark.parametrize("int8_pages", [False, True])
@pytest.mark.parametrize(("rules", "dtype"), SELECTIONS)
def test_paging(
    rules: Rules, dtype: torch.dtype, int8_pages: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the fewest page frames that a step needs, misses are read from the backing store, and frames are right."""
    monkeypatch.setattr(oracle, "_MARGIN", MARGINS[dtype])
    case = Case(Shape(key_dim=80, value_dim=64), dtype, rules, (1, 3, 1), lengths=(123, 100), int8_pages=int8_pages)

    def run(seed: int) -> None:
        cap = smallest_gpu_memory(lambda cap: check_against_float64(case, device, seed, gpu_memory=cap))
        stats = check_against_float64(case, device, seed, gpu_memory=cap + 30000).cache.stats()
        assert stats.loads > 0
        assert stats.cpu_bytes > 0

    without_near_ties(run)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(80, 80), (192, 128)])
def test_summaries(key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Landmarks and lowest cosines of complete pages, of a prompt and of single tokens, padding left out."""
    case = Case(Shape(key_dim=key_dim, value_dim=value_dim), dtype, sizes=(1, 3), lengths=(43, 31))
    layer = check_against_float64(case, device).cache.layers[0]
    assert isinstance(layer, SpinLayer)
    assert layer.store is not None
    total = case.prompt + sum(case.sizes)
    pages = total // PAGE_SIZE
    keys = case.kv(0, device).keys[0].double()[:, :, : pages * PAGE_SIZE].unflatten(2, (pages, PAGE_SIZE))
    valid = torch.tensor(case.valid(pages * PAGE_SIZE), device=device).view(-1, 1, pages, PAGE_SIZE)
    weight = valid.unsqueeze(-1).double()
    mean = (keys * weight).sum(3) / weight.sum(3).clamp(min=1)
    cosine = torch.cosine_similarity(keys, mean.unsqueeze(3), dim=-1).masked_fill(~valid, 1.0).amin(3)
    for name, exact in {"landmark": mean, "min_cosine": cosine}.items():
        held = layer.store.summary(name)[:, :, :pages].double()
        sums = (
            16 * torch.finfo(torch.float32).eps * max(1.0, float(keys.abs().max()))
        )  # of 8 tokens, or a head's columns
        rounding = torch.finfo(dtype).eps * exact.abs()
        if layer.store.summaries[name].quantized:
            rounding = 0.501 * exact.abs().amax(-1, keepdim=True) / 127
        assert bool(((held - exact).abs() <= rounding + sums).all()), name
