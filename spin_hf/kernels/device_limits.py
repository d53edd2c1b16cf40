"""Device limits that launches depend on. On a CPU (Triton interpreter) fixed defaults are returned."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


def multiplies(device: torch.device) -> bool:
    """Whether Triton multiplies matrices on tensor cores, which needs Ampere or later.

    On older GPUs `tl.dot` keeps both operands in registers and shared memory, which large tiles do not fit.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def overlaps_launches(device: torch.device) -> bool:
    """Whether a kernel can be launched while the previous one still runs: programmatic dependent launch, from Hopper on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def bytes_per_us(device: torch.device) -> float:
    """About how many bytes of its memory a GPU reads in a microsecond: 85 % of what clock and bus width say. 0 if unknown."""
    if device.type != "cuda":
        return 0.0
    return _bytes_per_us(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _bytes_per_us(index: int) -> float:
    """As `bytes_per_us`. Kept, as steps ask for it and the driver takes 0.2 ms to tell a clock rate."""
    properties: Any = torch.cuda.get_device_properties(index)
    clock, width = getattr(properties, "memory_clock_rate", 0), getattr(properties, "memory_bus_width", 0)
    return 0.85 * 2 * clock * 1e3 * width / 8 / 1e6  # two transfers per clock


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use, less 4 KiB for reductions."""
    if device.type != "cuda":
        return 48 << 10
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) - 4096
