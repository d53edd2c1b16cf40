"""Two versions of the package side by side: rows that both have, on one machine."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.speed.compare_sources import compared


def result(**times: float | None) -> dict[str, Any]:
    rows = [
        {"tokens": int(name[1:]), "cache": "spin", "gpu_memory": "auto", "tpot_ms": ms} for name, ms in times.items()
    ]
    return {"gpu": "one", "method": "shadowkv", "rows": rows}


def test_rows_that_both_have() -> None:
    found = compared(result(t8=8.0, t32=10.0), result(t8=8.2, t32=None, t128=12.0))
    assert found == [{"method": "shadowkv", "tokens": 8, "before_ms": 8.0, "after_ms": 8.2, "ratio": 1.025}]


def test_two_machines_are_refused() -> None:
    with pytest.raises(SystemExit, match="gpu"):
        compared(result(t8=8.0), result(t8=8.0) | {"gpu": "another"})
