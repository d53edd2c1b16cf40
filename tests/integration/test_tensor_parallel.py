"""Distributed models that are refused, and what is known of a model without its process group."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from spin_hf import SpinCache, UnsupportedModelError
from spin_hf.integration import tensor_parallel
from spin_hf.integration.tensor_parallel import local_shapes, splits_heads, tp_size
from tests.support.zoo import build_model


def distributed(
    size: int = 2, mesh: dict[str, int] | None = None, plan: dict[str, str] | None = None, **settings: Any
) -> Any:
    """A model that looks as if transformers had distributed it."""
    model = build_model("llama")
    sizes = {"tp": size} if mesh is None else mesh
    model._tp_size = sizes.get("tp", 1)
    model._tp_plan = {"layers.*.self_attn.k_proj": "colwise"} if plan is None else plan
    model._device_mesh = SimpleNamespace(
        mesh_dim_names=tuple(sizes), size=lambda index: list(sizes.values())[index], ndim=len(sizes)
    )
    model.config.distributed_config = {"tp_size": model._tp_size, **settings}
    return model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mesh": {"pp": 2, "tp": 1}}, "runs in 2 pipeline stages"),
        ({"mesh": {"tp": 1}, "pp_size": 4}, "runs in 4 pipeline stages"),
        ({"mesh": {"cp": 2, "tp": 2}}, r"splits sequences over ranks \(cp=2\)"),
        ({"plan": {"layers.*.input_layernorm": "sequence_parallel"}}, "layernorm: sequence_parallel"),
        ({"enable_sequence_parallel": True}, "enable_sequence_parallel"),
        ({"size": 4}, "expected KV heads that 4 ranks divide, got 2"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    """Before any process is spoken to, and with the way that works."""
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        SpinCache(distributed(**arguments))
    assert any(remedy in str(caught.value) for remedy in ('tp_plan="auto"', "colwise_gather_output"))


def test_heads_of_a_rank() -> None:
    shapes = tensor_parallel.layer_shapes(build_model("llama").config, [0, 1])
    assert shapes is not None
    split, gathered = distributed(), distributed(plan={"layers.*.self_attn.k_proj": "colwise_gather_output"})
    assert [splits_heads(model) for model in (split, gathered, build_model("llama"))] == [True, False, False]
    assert tp_size(gathered) == 2
    assert [shape.num_heads for shape in local_shapes(shapes, split) or ()] == [1, 1]
    assert local_shapes(shapes, gathered) == shapes
    assert local_shapes(None, split) is None


def test_a_model_on_one_rank_is_left_alone() -> None:
    model = build_model("llama")
    model.config.distributed_config = {"tp_size": 1, "pp_size": 1}
    assert tensor_parallel.ranks_of(model) is None
    assert tensor_parallel.ranks_of(model.config) is None
    SpinCache(model)
