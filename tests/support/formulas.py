"""For tests of decode steps: tokens are arranged by the formulas, whose kernels have tests of their own.

Where numbers tie, rounding decides how tokens are arranged; and interpreted, the kernels take minutes.
"""

from __future__ import annotations

import pytest

from spin_hf.attention import bisection, lowbit, retroinfer


def arrange_by_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of the test."""
    monkeypatch.setattr(bisection, "bisect", bisection.bisect_by_formulas)
    monkeypatch.setattr(lowbit, "encode_pages", lowbit.encode_by_formulas)
    monkeypatch.setattr(retroinfer, "fill_clusters", retroinfer.fill_clusters_by_formulas)
