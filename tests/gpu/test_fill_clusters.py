"""RetroInfer's clustering by kernels on a GPU: as good as the formulas, deterministic, with few launches and no waiting."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import spin_hf.kernels
from spin_hf import RetroInfer
from spin_hf.kernels import fill_clusters, unit_vectors
from spin_hf.storage.token_permutation import tiles
from tests.support.synchronisation import no_synchronisation

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

KINDS = [(torch.bfloat16, 128), (torch.float16, 80), (torch.bfloat16, 256), (torch.float32, 64), (torch.float32, 128)]


def topics(dtype: torch.dtype, dim: int, count: int = 2072, spans: int = 2) -> Tensor:
    """Keys [S, 2, count, dim] about 80 directions for each head, as noisy as these are long, all far from zero."""
    generator = torch.Generator().manual_seed(dim)
    directions = torch.randn((spans, 2, 80, dim), generator=generator)
    label = torch.randint(0, 80, (spans, 2, count, 1), generator=generator).expand(-1, -1, -1, dim)
    noise = torch.randn((spans, 2, count, dim), generator=generator)
    return (directions.gather(2, label) + noise + 2).cuda().to(dtype)


def alike(keys: Tensor, order: Tensor) -> float:
    """Mean length of the mean of a page of unit vectors."""
    points = unit_vectors(keys, torch.float32)
    points = points.gather(2, order.unsqueeze(-1).expand_as(points))
    return float(points.unflatten(2, (-1, 8)).mean(3).norm(dim=-1).mean())


@pytest.mark.parametrize(("dtype", "dim"), KINDS)
def test_clusters_are_as_good_as_those_of_the_formulas(
    dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = topics(dtype, dim)
    made = RetroInfer().form_clusters(keys, None)
    places = torch.arange(keys.shape[2], device="cuda").expand(keys.shape[:3])
    assert torch.equal(made.order.sort(2).values, places)
    assert made.pages_per_cluster is not None
    assert tiles(made.pages_per_cluster)
    with monkeypatch.context() as patch:
        patch.setattr(spin_hf.kernels, "launchers", lambda device: None)
        expected = RetroInfer().form_clusters(keys, None)
    found, wanted, consecutive = (alike(keys, order) for order in (made.order, expected.order, places))
    assert wanted > 1.3 * consecutive
    assert abs(found - wanted) < 0.03 * (wanted - consecutive)
    again = RetroInfer().form_clusters(keys, None)
    assert torch.equal(made.order, again.order)
    assert torch.equal(made.pages_per_cluster, again.pages_per_cluster)  # type: ignore[arg-type]


def test_most_points_go_where_the_formulas_put_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where hardly a point lies between two clusters."""
    keys = topics(torch.float32, 64, count=512)
    made = RetroInfer().form_clusters(keys, None)
    monkeypatch.setattr(spin_hf.kernels, "launchers", lambda device: None)
    expected = RetroInfer().form_clusters(keys, None)
    assert float((made.order == expected.order).float().mean()) > 0.9


def test_strided_keys() -> None:
    """As they lie in pages, between values."""
    keys = topics(torch.bfloat16, 128)
    apart = torch.full((*keys.shape[:3], 256), float("nan"), dtype=keys.dtype, device="cuda")[..., 64:192]
    apart.copy_(keys)
    made, expected = unit_vectors(apart, torch.float16), unit_vectors(keys, torch.float16)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-3)  # sums may be rounded in another order
    assert (
        float(
            (RetroInfer().form_clusters(apart, None).order == RetroInfer().form_clusters(keys, None).order)
            .float()
            .mean()
        )
        > 0.5
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_keys_that_are_no_numbers(bad: float) -> None:
    """They spoil only their own head and span."""
    keys = topics(torch.bfloat16, 128)
    expected = RetroInfer().form_clusters(keys, None)
    keys[0, 1, 3, 5] = bad
    made = RetroInfer().form_clusters(keys, None)
    assert torch.equal(made.order.sort(2).values, torch.arange(keys.shape[2], device="cuda").expand(keys.shape[:3]))
    assert made.pages_per_cluster is not None
    assert tiles(made.pages_per_cluster)
    assert torch.equal(made.order[1], expected.order[1])
    assert torch.equal(made.order[0, 0], expected.order[0, 0])


def test_few_launches_and_no_waiting() -> None:
    """About 21 kernels and two sorts, which take several launches each."""
    keys = topics(torch.bfloat16, 128)
    RetroInfer().form_clusters(keys, None)
    with no_synchronisation():
        RetroInfer().form_clusters(keys, None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        RetroInfer().form_clusters(keys, None)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 21 <= len(kernels) < 60


def test_more_numbers_than_thirty_two_bits_address() -> None:
    """17 million points of 128 numbers: the last row is clustered as it is alone."""
    points = torch.nn.functional.normalize(torch.randn((1, 8192, 128), device="cuda"), dim=-1).half()
    alone = fill_clusters(points, 16, 8)
    for made, expected in zip(fill_clusters(points.repeat(2100, 1, 1), 16, 8), alone, strict=True):
        assert torch.equal(made[[0, -1]], expected.expand(2, -1))
