"""The Triton kernels, interpreted on the CPU, against the reference backend: same tokens, same logits, same selection."""

from __future__ import annotations

import os
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch

from spin_hf import Bisection, Fitted, RetroInfer, ShadowKV, SpinCache
from spin_hf.attention.methods import bisection
from spin_hf.kernels.descriptor_fields import LOAD_MARK, PlanField, StepField
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.clustering_methods import clustering_often, little_slack
from tests.support.inspection import kernels_of, state_of
from tests.support.interpreted_kernels import forward_steps, interpret_kernels, prompt_inputs
from tests.support.tuning import tune
from tests.support.zoo import build_model

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]

TIGHT = 60_000  # bytes: fewer page frames than the prompt below has pages
STEPS = 3
OFTEN = clustering_often(Bisection, 32, 16)(2)
CODED = clustering_often(Fitted, 32, 16)()


class FixedBasis(clustering_often(Fitted, 32, 16)):  # type: ignore[misc]
    """A basis of eight pages has directions that the last bits of a key decide, and gpt_oss has other last bits in each run."""

    def fit(self, measured: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        keys, values = measured["key_mean"], measured["value_mean"]
        fixed = self.unfitted(keys.shape[-1], values.shape[-1], keys.device)
        return {name: tensor.expand(*keys.shape[:2], *tensor.shape) for name, tensor in fixed.items()}


def _run(model: Any, padding: str, **options: Any) -> tuple[Any, SpinCache]:
    cache = SpinCache(model, **{"method": "shadowkv", "recent_window": 8, **options})
    output = model.generate(
        **prompt_inputs(padding), past_key_values=cache, max_new_tokens=STEPS, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return output, cache


@pytest.mark.sweep(keep=[1, 3, 5, 7, 8])
@pytest.mark.parametrize(
    ("family", "padding", "options"),
    [
        ("llama", "none", {"budget": 24}),
        ("llama", "left", {"budget": 24}),
        ("llama", "left", {"budget": 0.3}),
        ("llama", "holes", {"budget": 16, "recent_window": 1, "num_sink_tokens": 1}),
        ("llama", "none", {"budget": 16, "method": ShadowKV(outlier_pages_per_1024=0)}),
        ("llama", "none", {"budget": 24, "gpu_memory": TIGHT}),
        ("llama", "left", {"budget": 1 << 20, "gpu_memory": TIGHT}),
        ("gpt_oss", "none", {"budget": 16}),  # attention sinks; outliers of positive cosine
        ("gemma3_text", "none", {"budget": 16}),
    ],
)
def test_kernels_do_what_the_reference_does(
    family: str, padding: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(family).eval()
    expected, reference = _run(model, padding, **options)
    reference.check_integrity()
    counted = reference.stats()
    del reference
    launched = interpret_kernels(monkeypatch)
    actual, cache = _run(model, padding, **options)
    assert launched
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)
    stats = cache.stats()
    cache.check_integrity()
    if counted.sparse_queries:
        assert stats.sparse_queries == counted.sparse_queries
        assert stats.attended_tokens == counted.attended_tokens
    if "gpu_memory" in options:
        assert stats.loads > 0
        assert stats.gpu_bytes <= TIGHT


@pytest.mark.sweep(keep=[3, 6, 9, 12])
@pytest.mark.parametrize(
    ("family", "padding", "options"),
    [
        ("llama", "none", {"budget": 16, "method": OFTEN}),
        ("llama", "left", {"budget": 0.2, "method": OFTEN}),
        ("llama", "holes", {"budget": 8, "recent_window": 1, "num_sink_tokens": 1, "method": OFTEN}),
        ("llama", "left", {"budget": 16, "gpu_memory": 140_000, "method": OFTEN}),
        ("gpt_oss", "none", {"budget": 8, "method": clustering_often(Bisection, 32, 16)(1)}),  # sink logits
        ("llama", "holes", {"budget": 16, "method": clustering_often(RetroInfer, 32, 16)()}),
        ("gemma2", "none", {"budget": 0.2, "method": clustering_often(RetroInfer, 32, 16)(1.0)}),
        ("gemma2", "left", {"budget": 8, "method": OFTEN}),  # softcap
        ("llama", "none", {"budget": 16, "method": CODED}),
        ("llama", "holes", {"budget": 8, "recent_window": 1, "num_sink_tokens": 1, "method": CODED}),
        ("llama", "left", {"budget": 16, "gpu_memory": 140_000, "method": CODED}),
        ("gpt_oss", "none", {"budget": 8, "method": FixedBasis()}),
        ("gemma2", "left", {"budget": 0.2, "method": CODED}),
    ],
)
def test_kernels_of_methods_that_cluster(
    family: str, padding: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several spans, and pages that the steps complete: they become candidates and are estimated."""
    model = build_model(family).eval()
    steps = [1] * 4 + [3] + [1] * 3
    with little_slack():
        cache = SpinCache(model, **{"recent_window": 8, **options})
        expected = forward_steps(model, cache, padding, steps)
        counted = cache.stats()
        assert state_of(cache).sequences.spans.num_pages > 3
        launched = interpret_kernels(monkeypatch)
        cache = SpinCache(model, **{"recent_window": 8, **options})
        atol = 5e-4 if isinstance(options["method"], Fitted) else 1e-4  # products with codes have queries of 16 bits
        torch.testing.assert_close(forward_steps(model, cache, padding, steps), expected, rtol=0, atol=atol)
    assert launched
    stats = cache.stats()
    cache.check_integrity()
    assert counted.sparse_queries
    assert stats.sparse_queries == counted.sparse_queries
    assert stats.attended_tokens == counted.attended_tokens
    if "gpu_memory" in options:
        assert stats.loads > 0


def test_a_rerank_adds_no_more_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The correction of estimates is limited, where keys are so long that the tokens of a page differ by many nats."""
    model = build_model("llama").eval()
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data *= 12
    options: dict[str, Any] = {"budget": 8, "recent_window": 8, "method": OFTEN}
    with little_slack():
        expected = forward_steps(model, SpinCache(model, **options), "left", [1] * 3)
        with monkeypatch.context() as patch:
            patch.setattr(bisection, "MAX_CORRECTION_NATS", 100.0)
            unbounded = forward_steps(model, SpinCache(model, **options), "left", [1] * 3)
        interpret_kernels(monkeypatch)
        actual = forward_steps(model, SpinCache(model, **options), "left", [1] * 3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert float((unbounded - expected).abs().max()) > 1e-3


@pytest.mark.sweep(keep=[0, 1, 2, 3, 5])
@pytest.mark.parametrize(
    ("padding", "sizes", "options", "constants"),
    [
        ("left", [3, 1], {"budget": 16, "recent_window": 1}, {}),  # a page that fills is a candidate in the same call
        (
            "none",
            [1],
            {"budget": 16, "recent_window": 8},
            {"BIN_TILE_PAGES": 2, "_SELECT_TILE": 2, "_TILE_LISTS": 1},
        ),  # several tiles
        (
            "left",
            [1, 1],
            {"budget": 24, "recent_window": 8},
            {"_FLOOR_FACTOR": 0, "_SELECT_TILE": 4, "BINS_PER_NAT": 2},
        ),  # too few are kept
        (
            "none",
            [1],
            {"budget": 24, "recent_window": 8},
            {"_FEW_TIED": 1, "_TIED_TILE": 2, "NUM_BINS": 4},
        ),  # many in one bin
        (
            "left",
            [1] * 4,
            {"budget": 8, "recent_window": 8, "method": OFTEN},
            {"_COUNTED": 0},
        ),  # too few are counted for a reranking
        (
            "none",
            [1] * 3,
            {"budget": 8, "recent_window": 8, "method": OFTEN},
            {
                "_COUNTED": 1,
                "BIN_TILE_PAGES": 4,
                "_RERANKED_TILE": 4,
                "_RERANKED_FEW_TILE": 2,
                "_LIST_TILE": 4,
            },
        ),
    ],
)
def test_steps_do_what_the_reference_does(
    padding: str, sizes: list[int], options: dict[str, Any], constants: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("llama").eval()
    expected = forward_steps(model, SpinCache(model, **{"method": "shadowkv", **options}), padding, sizes)
    interpret_kernels(monkeypatch, **constants)
    cache = SpinCache(model, **{"method": "shadowkv", **options})
    torch.testing.assert_close(forward_steps(model, cache, padding, sizes), expected, rtol=0, atol=1e-4)
    cache.check_integrity()


@pytest.mark.sweep(keep=[1])
@torch.no_grad()
@pytest.mark.parametrize(("tile", "options"), [(512, {}), (4, {"gpu_memory": 2 * TIGHT})])
def test_pages_of_padding_are_not_listed(tile: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each listed page is read: those before a short sequence of a long batch would cost as much as real ones."""
    model = build_model("llama").eval()
    interpret_kernels(monkeypatch, _LIST_TILE=tile)
    ids = torch.randint(3, 100, (3, 161), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :130], mask[1, :41], mask[1, 60:99], mask[1, 145:158] = 0, 0, 0, 0
    cache = SpinCache(model, "shadowkv", budget=16, recent_window=12, **options)
    model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    mask = torch.cat([mask, mask.new_ones((3, 1))], 1)
    model(input_ids=ids[:, :1], attention_mask=mask, past_key_values=cache)
    assert bool(options) == (cache.stats().cpu_bytes > 0)
    (step,) = kernels_of(cache)
    real = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8)).any(2)
    lists = step.scratch[StepField.LIST_PAGE] & ~LOAD_MARK
    for stream, count in enumerate(step.buffers.list_count[:, 0].tolist()):
        of_sequence, pages = real[stream // step.num_heads], lists[stream, :count]
        assert len(pages.unique()) == count
        assert bool(of_sequence[pages].all())
        assert int(pages.max()) == len(of_sequence) - 1
        assert count <= 2 + 1 + 6, "what the budget, sinks and the recent window can take"
    cache.check_integrity()


@torch.no_grad()
def test_a_copy_shares_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama").eval()
    interpret_kernels(monkeypatch)
    alone, cache = (SpinCache(model, "shadowkv", budget=16, recent_window=8) for _ in range(2))
    for each in (alone, cache):
        forward_steps(model, each, "none", [1])
    one, other = torch.tensor([[5], [6]]), torch.tensor([[7], [8]])
    expected = [model(input_ids=token, past_key_values=alone).logits for token in (one, other)]
    twin = deepcopy(cache)
    actual = [model(input_ids=one, past_key_values=cache).logits]
    model(input_ids=other, past_key_values=twin)  # must not write to where `one` stands
    actual.append(model(input_ids=other, past_key_values=cache).logits)
    assert torch.equal(torch.cat(actual), torch.cat(expected))
    for each in (cache, twin):
        each.check_integrity()


@pytest.mark.sweep
@pytest.mark.parametrize(("length", "programs"), [(300, 8), (1300, 2), (1300, 8)])
@pytest.mark.parametrize("digits", [True, False])
def test_products_with_int8_landmarks_are_exact(
    digits: bool, length: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries as two digits of base 256 are off by a thousandth of a percent of their largest number.

    Contexts of one segment and of several, in one split and in several.
    """
    interpret_kernels(monkeypatch)
    tune(monkeypatch, programs=programs)
    shape = Shape(kv_heads=2, group=3, key_dim=64, value_dim=64)
    driver = CacheDriver(shape, budget=32, recent_window=8, summary_dtype="int8")
    kv = RandomKV.random(shape, 1, length + 1, seed=4)
    driver.step(kv, 0, length)
    layer = driver.cache.layers[0]
    step, store = layer.backend, layer.store
    step.multiplies_int8 = digits
    driver.step(kv, length, length + 1)
    query = kv.queries[0][:, :, length].unflatten(1, (kv.shape.kv_heads, -1))
    exact = query.double() @ store.summary("landmark").double().transpose(-1, -2) * driver.scale
    first, stop = step.zone_plan[0, 0, PlanField.FIRST], step.zone_plan[0, 0, PlanField.STOP]
    exact = exact[..., first:stop]
    held = step.scratch[StepField.LOGITS].view(*query.shape[:3], -1)[..., first:stop].double()
    largest = query.abs().amax(-1, keepdim=True) * store.summary("landmark").abs().sum(-1).unsqueeze(2) * driver.scale
    assert stop - first > 20
    assert bool(((held - exact).abs() <= largest[..., first:stop] * 2e-5).all())
    splits, columns = step.buffers.splits.score, 4 if digits else 8
    stats = step.buffers.stats.flatten()[: shape.kv_heads * splits * 2 * columns]
    most, total = stats.view(shape.kv_heads, splits, 2, columns)[..., : shape.group].double().unbind(2)
    sums = (most + total.log()).logsumexp(1)
    torch.testing.assert_close(sums, exact[0].logsumexp(-1), rtol=0, atol=1e-4)


@pytest.mark.sweep(keep=[0])
@pytest.mark.parametrize("tile", [2, 512])
def test_pages_are_evicted(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("llama").eval()
    interpret_kernels(monkeypatch, _HAND_TILE=tile, _SLOT_TILE=max(4, tile))
    cache = SpinCache(model, "shadowkv", budget=24, recent_window=8, gpu_memory=TIGHT)
    forward_steps(model, cache, "none", [1] * 4)
    stats = cache.stats()
    assert stats.evictions > 0
    assert 0 < stats.hit_rate < 1
    cache.check_integrity()


@pytest.mark.parametrize("method", ["shadowkv", "bisection"])
def test_buffers_of_each_layer_begin_at_multiples_of_16_bytes(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles a kernel anew for other addresses, which the first layer does not show."""
    model = build_model("llama").eval()
    interpret_kernels(monkeypatch)
    cache = SpinCache(model, method, budget=24, recent_window=8)
    forward_steps(model, cache, "none", [1])
    (step,) = kernels_of(cache)
    assert len(step.layer_buffers) > 1
    for buffers in step.layer_buffers:
        held = (buffers.descriptor, buffers.floors, buffers.rerank_floors, buffers.hands, buffers.counters)
        assert all(tensor.data_ptr() % 16 == 0 for tensor in held)
