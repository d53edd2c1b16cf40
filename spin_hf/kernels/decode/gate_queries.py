"""SeerAttention's gate queries in one launch. The specification is `LayerGate.of_queries` in `attention/methods/seer_gates.py`.

    a group's queries [G, D] -> undo RoPE -> x weights [G, D, E] -> RoPE with the gate's own frequencies -> [E]

The time is that of reading the weights: 2 MiB per layer for eight KV heads of 128 numbers. A program therefore takes few
columns, so that enough programs have loads in flight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compile_ahead import launch_now

_TILE = 8  # columns of either half: 32 bytes of each row of weights, one memory sector


def gate_queries(
    states: Tensor, positions: Tensor, weights: Tensor, frequencies: Tensor, gate_frequencies: Tensor, *,
    interleaved: bool, scale: float,
) -> Tensor:  # fmt: skip
    """Compute the gate's query of each KV head.

    Args:
        states: [B, H, G, D], floating point, after RoPE; the last dimension is contiguous.
        positions: [B], int32 or int64.
        weights: [H, G, D, E], float32, contiguous.
        frequencies: [R], float32, R <= D / 2: of the model's RoPE, which is undone.
        interleaved: how the model pairs channels, as in `seer_gates.rotate`.
        gate_frequencies: [E / 2], float32: of the gate's RoPE, which pairs channel i with i + E / 2.
        scale: factor of the result.
    Returns:
        [B, H, E], float32.
    """
    (batch, heads, group, dim), half = states.shape, weights.shape[3] // 2
    projected = torch.empty((batch, heads, 2 * half), dtype=torch.float32, device=states.device)
    launch_now(
        gate_queries_kernel, (batch * heads, triton.cdiv(half, _TILE)),
        states, *states.stride()[:3], positions, positions.stride(0), weights, frequencies, gate_frequencies, projected,
        scale, INTERLEAVED=interleaved, H=heads, G=group, D=dim, BLOCK_D=triton.next_power_of_2(dim),
        PAIRS=len(frequencies), HALF=half, TILE=_TILE,
        AT_ONCE=max(1, min(group, 512 // triton.next_power_of_2(dim))), num_warps=4,
    )  # fmt: skip
    return projected


@triton.jit(do_not_specialize_on_alignment=["positions"])  # a column of the plan, at any alignment
def gate_queries_kernel(
    states, states_b, states_h, states_g, positions, positions_b, weights, frequencies, gate_frequencies, projected, scale,
    INTERLEAVED: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, i) writes columns [i * TILE, (i + 1) * TILE) of both halves of `projected`.

    Args:
        states, weights, frequencies, gate_frequencies, scale: as for `gate_queries`.
        positions: integers, one for each sequence, `positions_b` apart.
        projected: float32 [B, H, 2 * HALF]. Written.
    """
    bh = tl.program_id(0)
    b = (bh // H).to(tl.int64)
    h = bh % H
    position = tl.load(positions + b * positions_b).to(tl.float32)
    channel = tl.arange(0, BLOCK_D)
    if INTERLEAVED:
        pair, other, is_first = channel // 2, channel ^ 1, channel % 2 == 0
    else:
        is_first = channel < PAIRS
        pair, other = tl.where(is_first, channel, channel - PAIRS), tl.where(is_first, channel + PAIRS, channel - PAIRS)
    turned = channel < 2 * PAIRS
    angle = position * tl.load(frequencies + pair, mask=turned, other=0.0)  # other channels: no rotation
    cos = tl.cos(angle)
    sin = tl.where(is_first, tl.sin(angle), -tl.sin(angle))
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < HALF
    mask = (channel < D)[:, None] & inside[None, :]
    low = tl.zeros([BLOCK_D, TILE], tl.float32)
    high = tl.zeros([BLOCK_D, TILE], tl.float32)
    source = states + b * states_b + h.to(tl.int64) * states_h
    rows = weights + h.to(tl.int64) * (G * D * 2 * HALF) + channel[:, None] * (2 * HALF) + column[None, :]
    for start in range(0, G, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            g = start + i
            here = g < G
            own = tl.load(source + g * states_g + channel, mask=here & (channel < D), other=0.0).to(tl.float32)
            pairs = tl.load(source + g * states_g + other, mask=here & turned, other=0.0).to(tl.float32)
            before = (own * cos + pairs * sin)[:, None]
            row = rows + g * (D * 2 * HALF)
            low += before * tl.load(row, mask=here & mask, other=0.0)
            high += before * tl.load(row + HALF, mask=here & mask, other=0.0)
    first, second = tl.sum(low, 0), tl.sum(high, 0)
    angle = position * tl.load(gate_frequencies + column, mask=inside, other=0.0)
    cos = tl.cos(angle)
    sin = tl.sin(angle)
    to = projected + bh.to(tl.int64) * (2 * HALF) + column
    tl.store(to, (first * cos - second * sin) * scale, mask=inside)
    tl.store(to + HALF, (second * cos + first * sin) * scale, mask=inside)
