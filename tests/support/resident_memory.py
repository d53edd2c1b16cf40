"""What of a mapping is in memory, as the system says."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest

needs_smaps = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux only")


def smaps(address: int) -> tuple[int, set[str]]:
    """Resident bytes and flags of the mapping that holds `address`."""
    inside, resident = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("Rss:"):
            resident = int(line.split()[1]) * 1024
        elif inside and line.startswith("VmFlags:"):
            return resident, set(line.split()[1:])
    raise AssertionError("not mapped")


def resident_bytes(address: int, num_bytes: int) -> int:
    """How much of a range is in memory: bit 63 of each page's entry."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(address // mmap.PAGESIZE * 8)
        entries = memoryview(file.read(num_bytes // mmap.PAGESIZE * 8)).cast("Q")
    return sum(entry >> 63 for entry in entries) * mmap.PAGESIZE
