"""For tests of decode steps: tokens are clustered by the PyTorch formulas. The kernels for it have tests of their own.

Where numbers tie, rounding decides how tokens are clustered, and interpreted kernels would take minutes.
"""

from __future__ import annotations

import pytest

import spin_hf.kernels
from spin_hf.attention.methods import fitted_codes, four_bit_keys
from spin_hf.kernels import reference_clustering


def cluster_by_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the kernels by formulas until the end of the test."""
    monkeypatch.setattr(spin_hf.kernels, "bisect", reference_clustering.bisect)
    for codes in (four_bit_keys, fitted_codes):
        monkeypatch.setattr(codes, "encode_pages", codes.encode_by_formulas)
    monkeypatch.setattr(spin_hf.kernels, "fill_clusters", reference_clustering.fill_clusters)
