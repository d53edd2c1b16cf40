"""int8 pages: their error against float64, that tokens are bytes, and that no other byte changes."""

from __future__ import annotations

import pytest
import torch

from spin_hf.storage.page_layout import Int8Layout, PageLayout, page_layouts

SIZES = [(8, 128, 128), (8, 64, 64), (16, 80, 48), (4, 3, 2), (1, 5, 1), (32, 192, 128)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tokens(form: PageLayout, num_pages: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [pages, P, D] of very different sizes, some channels much larger than others, one vector of zeros."""
    generator = torch.Generator().manual_seed(seed)

    def draw(dim: int) -> torch.Tensor:
        states = torch.randn((num_pages, form.page_size, dim), generator=generator)
        states *= 10 ** torch.empty((num_pages, form.page_size, 1)).uniform_(-3, 2, generator=generator)
        states[..., 0] *= 20
        states[0, 0] = 0
        return states.to(form.dtype)

    return draw(form.key_dim), draw(form.value_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("page_size", "key_dim", "value_dim"), SIZES)
def test_round_trip(page_size: int, key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    """Off by half a scale (a 254th of the vector's largest number), and by the rounding of the scale and of the dtype."""
    form = Int8Layout(page_size, key_dim, value_dim, dtype)
    given = tokens(form, 50)
    rows = form.join(form.encode(*given))
    assert rows.dtype == torch.int8
    assert rows.shape == (50, form.row_elements)
    for exact, held in zip(given, form.take(rows), strict=True):
        assert held.dtype == dtype
        assert held.shape == exact.shape
        exact = exact.double()
        largest = exact.abs().amax(-1, keepdim=True)
        finfo = torch.finfo(dtype)
        allowed = (
            largest / 254 * (1 + 1e-5) + finfo.eps / 2 * largest * (1 + 1 / 127) + finfo.smallest_normal * finfo.eps
        )
        assert bool(((held.double() - exact).abs() <= allowed).all())
        assert not held[0, 0].any()


@pytest.mark.parametrize(("page_size", "key_dim", "value_dim"), SIZES)
def test_layout(page_size: int, key_dim: int, value_dim: int) -> None:
    """As the module's head draws it; the kernels find scales from the row's end."""
    form = Int8Layout(page_size, key_dim, value_dim, torch.float16)
    keys, values = tokens(form, 3)
    rows = form.join(form.encode(keys, values))
    assert form.row_bytes == rows.shape[1] * rows.element_size()
    assert form.row_bytes % 16 == 0
    assert form.row_bytes - 16 < page_size * (key_dim + value_dim + 8) <= form.row_bytes
    scales = rows[:, -8 * page_size :].contiguous().view(torch.float32)
    codes = rows[:, : page_size * key_dim].view(3, page_size, key_dim)
    torch.testing.assert_close(
        codes.float() * scales[:, :page_size, None], keys.float(), rtol=0, atol=float(keys.abs().max()) / 250
    )
    codes = rows[:, page_size * key_dim :][:, : page_size * value_dim].view(3, page_size, value_dim)
    torch.testing.assert_close(
        codes.float() * scales[:, page_size:, None], values.float(), rtol=0, atol=float(values.abs().max()) / 250
    )
    assert int(codes.abs().max()) == 127


def test_half_of_sixteen_bits() -> None:
    as_it_is, int8 = page_layouts(8, 128, 128, torch.bfloat16, int8=True)
    assert (as_it_is.row_bytes, int8.row_bytes) == (4096, 2112)
    assert page_layouts(8, 128, 128, torch.bfloat16, int8=False)[1] == as_it_is


def test_tokens_are_bytes() -> None:
    """A token is encoded alone, is written without touching its neighbours, and moves as it is."""
    form = Int8Layout(8, 16, 8, torch.float32)
    keys, values = tokens(form, 4)
    rows = form.join(form.encode(keys, values))
    alone = [part[2:3, 5:6] for part in form.encode(keys, values)]
    for part, whole in zip(form.encode(keys[2:3, 5:6], values[2:3, 5:6]), alone, strict=True):
        assert torch.equal(part, whole)
    written = rows.clone()
    for place, part in zip(form.split(written), form.encode(-keys, -values), strict=True):
        place[:, 5] = part[:, 5]
    for index in range(8):
        same = all(
            torch.equal(a[:, index], b[:, index]) for a, b in zip(form.split(written), form.split(rows), strict=True)
        )
        assert same == (index != 5)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    moved = form.join([part[:, order] for part in form.split(rows)])
    for part, whole in zip(form.take(moved), form.take(rows), strict=True):
        assert torch.equal(part, whole[:, order])
    assert torch.equal(form.join([part[:, order.argsort()] for part in form.split(moved)]), rows)


@pytest.mark.parametrize("exponent", [-126, -20, 0, 20, 100])
def test_what_int8_holds_exactly(exponent: int) -> None:
    """Multiples of a power of two up to 127 of it."""
    form = Int8Layout(8, 255, 3, torch.float32)
    keys = torch.arange(-127.0, 128.0).expand(1, 8, 255) * 2.0**exponent
    values = torch.tensor([127.0, -3.0, 0.0]).expand(1, 8, 3) * 2.0**exponent
    held = form.take(form.join(form.encode(keys, values)))
    assert torch.equal(held[0], keys)
    assert torch.equal(held[1], values)


def test_vectors_that_are_not_ordinary() -> None:
    """Too small for a scale: zeros. Not finite: not finite either, and no other vector."""
    form = Int8Layout(4, 8, 8, torch.float32)
    keys, values = torch.ones(1, 4, 8), torch.ones(1, 4, 8)
    keys[0, 1], keys[0, 2, 3], values[0, 3, 0] = 1e-45, float("nan"), float("inf")
    held_keys, held_values = form.take(form.join(form.encode(keys, values)))
    assert not held_keys[0, 1].any()
    assert not held_keys[0, 2].isfinite().any()
    assert not held_values[0, 3].isfinite().any()
    held_keys[0, 2], held_values[0, 3] = 1.0, 1.0
    assert torch.equal(held_values, torch.ones_like(values))
    assert torch.equal(held_keys[0, [0, 2, 3]], torch.ones(3, 8))
