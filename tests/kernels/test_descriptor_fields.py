"""Kernels read the fields that the host writes."""

from __future__ import annotations

from enum import IntEnum

import pytest

from spin_hf.kernels import common
from spin_hf.kernels.descriptor_fields import Counter, LayerField, PlanField, StepField


@pytest.mark.parametrize("fields", [StepField, LayerField, PlanField, Counter])
def test_constants_of_kernels_are_the_fields_of_the_same_name(fields: type[IntEnum]) -> None:
    assert {field.name: getattr(common, field.name).value for field in fields} == {f.name: f.value for f in fields}
