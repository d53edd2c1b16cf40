"""Host memory that can still be taken."""

from __future__ import annotations

from pathlib import Path


def free_host_memory(root: Path = Path("/")) -> int | None:
    """Bytes that could be taken now: `MemAvailable`, or what the control group leaves if that is less; None if unknown."""
    try:
        found = _fields(root / "proc/meminfo")["MemAvailable"] << 10
        group = root / "sys/fs/cgroup"
        limit = group / "memory.max"
        if limit.exists() and limit.read_text().strip() != "max":
            held = int((group / "memory.current").read_text()) - _fields(group / "memory.stat")["inactive_file"]
            found = min(found, int(limit.read_text()) - held)
    except (OSError, KeyError, ValueError):
        return None  # not Linux, or a machine that does not say
    return max(0, found)


def _fields(file: Path) -> dict[str, int]:
    """`name: number unit` or `name number` of each line."""
    parts = (line.replace(":", "").split() for line in file.read_text().splitlines())
    return {name: int(number) for name, number, *_ in parts}
