"""How much host memory a benchmark may take for keys and values.

room = what the system says is available, or what the user says the machine has less what this process holds
       - MARGIN for slabs made ahead of need, chunks not quite full, and everybody else
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.common.timing import resident_bytes
from spin_hf.memory.host_memory import free_host_memory

MARGIN_BYTES, SLACK_BYTES = 8 << 30, 2 << 30
"""What is left of host memory by a plan, and how much of that a cache may use all the same: memory changes between the two."""


def room(host_gib: float | None = None) -> int:
    """Bytes of keys and values that host memory holds, at least 0.

    Args:
        host_gib: host memory of the machine in GiB, for machines that do not say (memory that comes only when it is used);
            None to ask the system.
    """
    found = available() if host_gib is None else int(host_gib * 2**30) - resident_bytes()
    return max(0, found - MARGIN_BYTES)


def available(root: Path = Path("/")) -> int:
    """Bytes that could be taken now.

    Raises:
        RuntimeError: the machine does not say.
    """
    found = free_host_memory(root)
    if found is None:
        raise RuntimeError("expected a machine that says how much memory is available; pass --host-memory")
    return found
