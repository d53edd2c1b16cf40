"""Single launches of a step against their specification: the buffers of a step that was taken are read back."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_hf import Bisection, Quest, RetroInfer, ShadowKV
from spin_hf.attention.methods import four_bit_keys
from spin_hf.kernels import reference
from spin_hf.kernels.descriptor_fields import NUM_BINS, LayerField, PlanField, Rating, StepField
from spin_hf.kernels.recipe import KernelRecipe
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.interpreted_kernels import interpret_kernels

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu runs the kernels themselves"),
]

LENGTH = 203


class Weighing(RetroInfer):
    """A page counts as often as it has tokens."""

    @property
    def recipe(self) -> KernelRecipe:
        return KernelRecipe(Rating.MEAN, weighs_tokens=True)


def one_step(method: Any, monkeypatch: pytest.MonkeyPatch, shape: Shape, padded: bool, dtype: torch.dtype) -> Any:
    """Two sequences, a prompt and a step: the step's kernels, the driver and the query [B, H, G, Dk] of the last layer."""
    interpret_kernels(monkeypatch)
    world = RandomKV.random(shape, 2, LENGTH + 1, seed=5)
    world = RandomKV(shape, *([x.to(dtype) for x in part] for part in (world.keys, world.values, world.queries)))
    driver = CacheDriver(shape, method=method, budget=40, recent_window=16)
    for start, stop in ((0, LENGTH), (LENGTH, LENGTH + 1)):
        driver.step(world, start, stop, mask(stop) if padded else None)
    layer = driver.cache.layers[shape.layers - 1]
    query = world.queries[-1][:, :, LENGTH].unflatten(1, (shape.kv_heads, -1)).float()
    return layer.backend, driver, query


def mask(length: int) -> Tensor:
    """Padding in front of one sequence and in the middle of the other."""
    valid = torch.ones((2, length), dtype=torch.bool)
    valid[0, :27] = False
    valid[1, 50:75] = False
    return valid


def valid_per_page(length: int, page_size: int, padded: bool) -> Tensor:
    valid = mask(length) if padded else torch.ones((2, length), dtype=torch.bool)
    return torch.nn.functional.pad(valid, (0, -length % page_size)).unflatten(1, (-1, page_size)).sum(2)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("budget", "dense_below"), [(40, 0), (0, 0), (40, 150)])
def test_zones(budget: int, dense_below: int, padded: bool) -> None:
    """Of three queries; a budget of 0 stands for the fraction in the step descriptor."""
    from spin_hf.kernels.triton_launchers import launchers

    step, sinks, window, page = torch.zeros(len(StepField), dtype=torch.int64), 5, 19, 8
    known = mask(LENGTH - 30).to(torch.uint8)
    upto = torch.nn.functional.pad(known.cumsum(1, dtype=torch.int32), (1, 0)).contiguous()
    step[StepField.POSITION], step[StepField.BASE_TOKENS] = LENGTH, known.shape[1]
    step[StepField.UPTO] = upto.data_ptr()
    step[StepField.BUDGET_FRACTION] = torch.tensor(0.3, dtype=torch.float64).view(torch.int64)
    plan = torch.full((4, 2, len(PlanField)), -1, dtype=torch.int32)
    launchers.plan_zones(
        launchers.launch_now, step, plan, num_queries=3, num_sink_tokens=sinks, recent_window=window, budget=budget,
        dense_below=dense_below, outliers_per_1024=48, page_size=page, padded=padded,
    )  # fmt: skip
    assert (plan[3] == -1).all()
    for i in range(3):
        per_page = valid_per_page(LENGTH + i + 1, page, padded)
        fixed, candidates = reference.page_zones(per_page, sinks, window)
        held, num_pages = per_page.sum(1), per_page.shape[1]
        wanted = torch.full_like(held, budget) if budget else (held * 0.3).ceil().long()
        wanted = torch.where(held <= wanted.clamp(min=dense_below), num_pages * page, wanted)
        for row in range(2):
            found = {field: int(plan[i, row, field]) for field in PlanField}
            inside = torch.zeros(num_pages, dtype=torch.bool)
            inside[found[PlanField.FIRST] : found[PlanField.STOP]] = True
            assert torch.equal(inside & (per_page[row] > 0), candidates[row])
            assert fixed[row, : found[PlanField.FIRST]].sum() == found[PlanField.FIRST] - found[PlanField.LEADING]
            assert not per_page[row, : found[PlanField.LEADING]].any()
            assert found[PlanField.NUM_PAGES] == num_pages
            assert found[PlanField.CANDIDATES] == candidates[row].sum()
            assert found[PlanField.OWN_POSITION] == held[row] - 1
            assert found[PlanField.NUM_SELECTED] == -(-int(wanted[row]) // page)
            assert found[PlanField.NUM_OUTLIERS] == max(1, round(int(wanted[row]) * 48 / 1024))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "method", [ShadowKV(), ShadowKV(outlier_pages_per_1024=0), Quest(0), RetroInfer(0), Weighing(0)], ids=range(5)
)
def test_scores_and_their_histogram(method: Any, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(kv_heads=2, group=3, key_dim=48, value_dim=32)
    step, _, _ = one_step(method, monkeypatch, shape, padded, torch.float32)
    recipe: KernelRecipe = method.recipe
    num_pages, rows = -(-(LENGTH + 1) // method.page_size), (2, shape.kv_heads)
    logits = step.scratch[StepField.LOGITS].view(*rows, shape.group, -1)[..., :num_pages]
    scores = step.scratch[StepField.SCORES].view(*rows, -1)[..., :num_pages]
    _, candidates = reference.page_zones(valid_per_page(LENGTH + 1, method.page_size, padded), 4, 16)
    stop = int(step.zone_plan[0, :, PlanField.STOP].min())
    logits, scores, candidates = logits[..., :stop], scores[..., :stop], candidates[:, :stop]
    tokens = valid_per_page(LENGTH + 1, method.page_size, padded)[:, :stop].clamp(min=1).log()
    expected = reference.group_scores(logits, candidates, recipe.rating, tokens if recipe.weighs_tokens else None)
    outliers = scores == float("inf")
    wanted = step.zone_plan[0, :, PlanField.NUM_OUTLIERS] if recipe.outliers_per_1024 else torch.zeros(2)
    assert torch.equal(outliers.sum(2), wanted[:, None].expand(rows).long())
    torch.testing.assert_close(scores[~outliers], expected[~outliers], rtol=0, atol=1e-4)
    bins = reference.score_bins(scores)
    counted = torch.stack([
        torch.bincount(own[real], minlength=NUM_BINS)
        for own, real in zip(bins.flatten(0, 1), candidates.repeat_interleave(rows[1], 0), strict=True)
    ])  # fmt: skip
    assert torch.equal(step.buffers.histogram.long(), counted), "at the first step all candidates are kept"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_operands_of_reranking(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiplied with any bytes they give the product of the rotated query and the levels that these stand for."""
    shape = Shape(kv_heads=2, group=3, key_dim=48, value_dim=32)
    step, driver, query = one_step(Bisection(), monkeypatch, shape, False, dtype)
    codes = torch.randint(0, 256, (64, shape.key_dim // 2), dtype=torch.uint8)
    exact = four_bit_keys.rotate(query) @ four_bit_keys.decode(codes, shape.key_dim).T * driver.scale
    digits, columns = dtype != torch.float32, 4 if dtype != torch.float32 else 8
    rows = columns * (2 if digits else 1)
    operands = step.buffers.operands.double().view(4, 2, rows, -1)
    factors = step.buffers.factors.double().view(4, 4, columns)[..., : shape.group, None]
    parts = torch.stack([codes & 15, (codes ^ 128).view(torch.int8)]).double()  # low levels, bytes less 128
    products = operands[..., : parts.shape[-1]] @ parts.mT
    if digits:
        products = products.unflatten(2, (columns, 2))
        products = products[..., 0, :] * 256 + products[..., 1, :]
    low, byte = products[:, :, : shape.group].unbind(1)
    found = low * factors[:, 0] + byte * factors[:, 1] + factors[:, 2]
    bound = 2e-3 if digits else 1e-4
    torch.testing.assert_close(found.view_as(exact), exact.double(), rtol=0, atol=bound * float(exact.abs().max()))


@pytest.mark.parametrize("padded", [False, True])
def test_a_page_of_several_layers(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken from all layers and put back changed, while all other pages stay."""
    shape = Shape(layers=3, kv_heads=2, group=1, key_dim=10, value_dim=6)
    step, driver, _ = one_step(RetroInfer(), monkeypatch, shape, padded, torch.float32)
    layers = [driver.cache.layers[number].state for number in (2, 0)]
    stores = [layer.store for layer in layers]
    addresses = torch.stack([step.layer_addresses[layer.number] for layer in layers])
    held = [store.backing.chunks for store in stores]
    for chunk in (chunk for chunks in held for chunk in chunks):
        chunk.nan_to_num_()  # pages that were never written hold anything
    before = [[chunk.clone() for chunk in chunks] for chunks in held]
    page = 11
    rows = stores[0].rows(page, page + 1)
    packed = torch.full((4, shape.kv_heads, 1, *stores[0].backing.row_shape), float("nan"))
    arguments: dict[str, Any] = {"page": page, "field": LayerField.BACKING, "shape": step.shape(layers[0])}
    step.launchers.copy_page(step.step, addresses, packed, put=False, **arguments)
    assert torch.equal(packed, torch.cat([reference.take_rows(chunks, rows) for chunks in before]))
    step.launchers.copy_page(step.step, addresses, -packed, put=True, **arguments)
    for chunks, expected, content in zip(held, before, packed.chunk(2), strict=True):
        reference.put_rows(expected, rows, -content)
        assert all(torch.equal(a, b) for a, b in zip(chunks, expected, strict=True))
