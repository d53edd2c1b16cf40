"""For tests of decode steps: tokens are clustered by the PyTorch formulas. The kernels for it have tests of their own.

Where numbers tie, rounding decides how tokens are clustered, and interpreted kernels would take minutes.
"""

from __future__ import annotations

import pytest

from spin_hf.attention.methods import bisection, four_bit_keys, retroinfer


def cluster_by_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the kernels by formulas until the end of the test."""
    monkeypatch.setattr(bisection, "bisect", bisection.bisect_by_formulas)
    monkeypatch.setattr(four_bit_keys, "encode_pages", four_bit_keys.encode_by_formulas)
    monkeypatch.setattr(retroinfer, "fill_clusters", retroinfer.fill_clusters_by_formulas)
