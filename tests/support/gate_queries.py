"""Gate queries of the kernel compared with the formulas in float64, on any device."""

from __future__ import annotations

from typing import Any

import torch

from spin_hf.attention.methods.seer_gates import rotate
from tests.support.cache_driver import poisoned_memory

SHAPES: list[dict[str, Any]] = [
    dict(),
    dict(group=1, dim=64, gate_dim=64),
    dict(interleaved=True),
    dict(turned=3),
    dict(turned=3, interleaved=True),
    dict(turned=0, turns=False),
    dict(group=7, dim=20, gate_dim=6),
    dict(heads=1, group=3, dim=80, gate_dim=34, interleaved=True),
    dict(dtype=torch.float16, heads=3, dim=128, gate_dim=128),
]
"""Groups, sizes that are no powers of two, and rotations: by halves or neighbours, of a part of the channels, of none."""


def compare_gate_queries(
    device: torch.device, *, heads: int = 2, group: int = 4, dim: int = 32, gate_dim: int = 32, turned: int | None = None,
    turns: bool = True, interleaved: bool = False, dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    """For states that lie in a larger tensor, at positions up to half a million that lie apart, as in the plan of a step."""
    from spin_hf.kernels.decode.gate_queries import gate_queries

    generator = torch.Generator().manual_seed(dim)
    pairs = dim // 2 if turned is None else turned
    weights = (torch.randn((heads, group, dim, gate_dim), generator=generator) / dim**0.5).to(device)
    frequencies = (10000.0 ** (-torch.arange(pairs) / max(1, pairs))).to(device)
    own = (0.3 ** torch.arange(gate_dim // 2) * turns).to(device)
    states = torch.randn((3, heads, group, 2, dim), generator=generator).to(device, dtype)[:, :, :, 1]
    positions = torch.tensor([[0, 7], [999, 7], [524_287, 7]], dtype=torch.int32, device=device)[:, 0]
    before = rotate(states.double(), positions[:, None, None], frequencies, interleaved=interleaved, undo=True)
    projected = torch.einsum("bhgi,hgio->bho", before, weights.double())
    exact = rotate(projected, positions[:, None], own, interleaved=False) / gate_dim**0.5
    with poisoned_memory():
        asked = gate_queries(
            states, positions, weights, frequencies, own, interleaved=interleaved, scale=gate_dim**-0.5
        )
    assert asked.dtype == torch.float32
    torch.testing.assert_close(asked.double(), exact, rtol=0.0, atol=2e-6 * float(exact.abs().max()))
