"""For tests of decode steps: tokens are arranged by the formulas, whose kernels have tests of their own.

Where numbers tie, rounding decides how tokens are arranged; and interpreted, the kernels take minutes.
"""

from __future__ import annotations

import pytest

import spin_hf.kernels
from spin_hf.attention.methods import four_bit_keys
from spin_hf.kernels import reference_clustering


def arrange_by_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of the test."""
    monkeypatch.setattr(spin_hf.kernels, "bisect", reference_clustering.bisect)
    monkeypatch.setattr(four_bit_keys, "encode_pages", four_bit_keys.encode_by_formulas)
    monkeypatch.setattr(spin_hf.kernels, "fill_clusters", reference_clustering.fill_clusters)
