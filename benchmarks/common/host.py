"""How much host memory a benchmark may take for keys and values.

room = what the system says is available, or what the user says the machine has less what this process holds
       - MARGIN for slabs made ahead of need, chunks not quite full, and everybody else
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.common.timing import resident_bytes

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
    """Bytes that could be taken now: `MemAvailable`, or what the control group leaves if that is less."""
    found = _fields(root / "proc/meminfo")["MemAvailable"] << 10
    group = root / "sys/fs/cgroup"
    limit = group / "memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        held = int((group / "memory.current").read_text()) - _fields(group / "memory.stat")["inactive_file"]
        found = min(found, int(limit.read_text()) - held)
    return found


def _fields(file: Path) -> dict[str, int]:
    """`name: number unit` or `name number` of each line."""
    words = (line.replace(":", " ").split() for line in file.read_text().splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}
