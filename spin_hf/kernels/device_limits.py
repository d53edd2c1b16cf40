"""What launches ask of the GPU that they are for; on a CPU, where kernels are interpreted, the answers serve all of them."""

from __future__ import annotations

from typing import Any

import torch


def multiplies(device: torch.device) -> bool:
    """Whether Triton multiplies on tensor cores: on Ampere or later.

    Before, it does so number by number, from registers and shared memory that hold both operands: of large ones neither does.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use, less some for reductions."""
    if device.type != "cuda":
        return 48 << 10
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin) - 4096
