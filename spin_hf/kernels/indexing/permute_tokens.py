"""Permutation and averaging of tokens in stored pages. Each takes one pass over the bytes.

    move_tokens    permutes the tokens of pages, in their storage layout
    page_means     the mean of each page over its valid tokens

The specifications are `reference.move_tokens` and `reference.page_means`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_ahead import launch_now
from ..device_guard import on_device_of

_TILE = 32


def move_tokens(content: Tensor, order: Tensor, page_size: int, fields: tuple[tuple[int, int], ...]) -> Tensor:
    """As `reference.move_tokens`."""
    content, order = content.contiguous(), order.contiguous()
    moved = torch.empty_like(content)
    count, rows = order.shape[2], order.shape[0] * order.shape[1]
    if not moved.numel():
        return moved
    with on_device_of(content):
        for (first, width), *others in _pairs(fields):
            launch_now(
                move_tokens_kernel, (triton.cdiv(count, _TILE), rows, 1 + len(others)), content, order, moved, count,
                FIRST=first, STEP=others[0][0] - first if others else 0, WIDTH=width,
                COLUMNS=triton.next_power_of_2(width), PAGE=page_size, ELEMENTS=content.shape[3], TILE=_TILE,
            )  # fmt: skip
    return moved


def _pairs(fields: tuple[tuple[int, int], ...]) -> Iterator[tuple[tuple[int, int], ...]]:
    """Fields, two together if they are neighbours of one width: keys and values, and their scales."""
    while fields:
        number = 2 if len(fields) > 1 and fields[0][1] == fields[1][1] else 1
        yield fields[:number]
        fields = fields[number:]


def page_means(states: Tensor, valid: Tensor) -> Tensor:
    """As `reference.page_means`, for `valid` [B, 1, n, P]. Copies `states` unless its last two dimensions are contiguous."""
    batch_size, num_heads, count, page_size, dim = states.shape
    means = torch.empty((batch_size, num_heads, count, dim), dtype=torch.float32, device=states.device)
    valid = valid.expand(batch_size, 1, count, page_size).contiguous()
    if not means.numel():
        return means
    if states.stride(3) != dim or states.stride(4) != 1:
        states = states.contiguous()
    tile = 1 << max(0, (_TILE // page_size).bit_length() - 1)
    with on_device_of(states):
        launch_now(
            page_means_kernel, (triton.cdiv(count, tile), batch_size * num_heads), states, valid.view(torch.uint8), means,
            count, *states.stride()[:3], H=num_heads, D=dim, BLOCK_D=triton.next_power_of_2(dim), PAGE=page_size,
            BLOCK_P=triton.next_power_of_2(page_size), TILE=tile,
        )  # fmt: skip
    return means


@triton.jit(do_not_specialize=["count"])
def move_tokens_kernel(
    content, order, moved, count,
    FIRST: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PAGE: tl.constexpr,
    ELEMENTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Program (tile of places, row, i) moves a stored field: WIDTH elements per token, from FIRST + i * STEP of each page on.

    Args:
        content, moved: [rows, count / PAGE, ELEMENTS], contiguous. `moved` is written.
        order: int64 [rows, count].
    """
    row = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, COLUMNS)
    inside = place < count
    token = tl.load(order + row * count + place, mask=inside, other=0)
    base = row * (count // PAGE) * ELEMENTS + FIRST + tl.program_id(2) * STEP
    mask = inside[:, None] & (column < WIDTH)[None, :]
    source = base + token // PAGE * ELEMENTS + token % PAGE * WIDTH
    to = base + (place // PAGE).to(tl.int64) * ELEMENTS + place % PAGE * WIDTH
    tl.store(
        moved + to[:, None] + column[None, :],
        tl.load(content + source[:, None] + column[None, :], mask=mask), mask=mask,
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "stride_b", "stride_h", "stride_n"])
def page_means_kernel(
    states, valid, means, count, stride_b, stride_h, stride_n,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK_P: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Program (tile of pages, b * H + h) averages TILE pages.

    Args:
        states: [B, H, count, PAGE, D], with these strides; valid: uint8 [B, 1, count, PAGE].
        means: float32 [B, H, count, D]. Written.
    """
    b = (tl.program_id(1) // H).to(tl.int64)
    h = (tl.program_id(1) % H).to(tl.int64)
    page = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    token = tl.arange(0, BLOCK_P)
    column = tl.arange(0, BLOCK_D)
    here = (page < count)[:, None] & (token < PAGE)[None, :]
    real = tl.load(valid + (b * count + page)[:, None] * PAGE + token[None, :], mask=here, other=0) != 0
    first = states + b * stride_b + h * stride_h + page * stride_n
    x = tl.load(
        first[:, None, None] + (token * D)[None, :, None] + column[None, None, :],
        mask=real[:, :, None] & (column < D)[None, None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    total = tl.sum(x, 1)
    many = tl.maximum(tl.sum(real.to(tl.int32), 1), 1).to(tl.float32)
    mean = tl.div_rn(total, tl.broadcast_to(many[:, None], total.shape))
    to = ((b * H + h) * count + page)[:, None] * D + column[None, :]
    tl.store(means + to, mean, mask=(page < count)[:, None] & (column < D)[None, :])
