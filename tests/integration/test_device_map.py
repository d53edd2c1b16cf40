"""Where accelerate's hooks place layers, read from models on the CPU: hooks name GPUs without moving anything there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, SequentialHook

from spin_hf.graph.eligibility import launch_devices
from spin_hf.graph.model_calls import may_be_captured
from spin_hf.integration import device_map
from spin_hf.integration.modules import modules_of
from tests.support.tiny_llama import tiny_llama
from tests.support.zoo import build_model

GPU = [torch.device("cuda", index) for index in range(3)]


def _hooked(*devices: Any) -> Any:
    """A model with a hook on each decoder layer that says where it is executed. Nothing is called or moved."""
    model = tiny_llama()
    for layer, device in zip(model.model.layers, devices, strict=False):
        layer._hf_hook = AlignDevicesHook(device)
    return model


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ((0, "cuda:1"), [GPU[0], GPU[1]]),
        ((torch.device("cuda", 2), "cpu"), [GPU[2], torch.device("cpu")]),
        ((1,), [GPU[1], torch.device("cpu")]),  # the second layer is where its parameters are
    ],
)
def test_layers_are_where_hooks_execute_them(devices: tuple[Any, ...], expected: list[torch.device]) -> None:
    assert device_map.layer_devices(_hooked(*devices), 2) == expected


def test_the_hook_among_several_that_names_a_device() -> None:
    model = tiny_llama()
    model.model.layers[1]._hf_hook = SequentialHook(AlignDevicesHook(io_same_device=True), AlignDevicesHook(2))
    assert device_map.layer_devices(model, 2) == [torch.device("cpu"), GPU[2]]
    assert device_map.gpus_of(model) == [GPU[2]]


def test_the_gpus_of_a_model() -> None:
    assert device_map.gpus_of(tiny_llama()) == []
    model = _hooked(1, 0)
    assert device_map.gpus_of(model) == [GPU[1], GPU[0]]
    assert device_map.uses_a_gpu(model)
    assert may_be_captured(model)
    assert not may_be_captured(tiny_llama())


def test_the_device_of_the_inputs_is_the_first_that_is_launched_on() -> None:
    inputs = {"input_ids": torch.zeros((1, 1), dtype=torch.int64), "use_cache": True}
    assert launch_devices(_hooked(0, 1), inputs) == [torch.device("cpu"), GPU[0], GPU[1]]


def test_hooks_that_load_weights_are_found(tmp_path: Path) -> None:
    model = build_model("llama").eval()
    names = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    places = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    dispatch_model(model, places, offload_dir=tmp_path)
    found = [name for name, hook in device_map.other_hooks(model) if device_map.is_mover(hook)]
    assert found
    assert all(name.startswith("model.layers.1") for name in found)
    assert device_map.layer_devices(model, 2) == [torch.device("cpu")] * 2


def test_placements_change_with_a_hook() -> None:
    model = _hooked(0, 1)
    placed = [module for module in model.modules() if device_map.is_placed(module)]
    before = device_map.placements(placed)
    assert device_map.placements(placed) == before
    placed[1]._hf_hook.execution_device = 0
    assert device_map.placements(placed) != before


def test_an_embedded_model_without_hooks() -> None:
    assert device_map.layer_devices(None, 3) == [torch.get_default_device()] * 3


def test_a_model_that_was_moved_or_changed_is_noticed() -> None:
    """Nothing is remembered of a model between two caches."""
    model = tiny_llama()
    assert device_map.layer_devices(model, 2) == [torch.device("cpu")] * 2
    model.model.layers[1].to("meta")  # where parameters are to be loaded
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(2, 2))
    assert device_map.layer_devices(model, 2) == [torch.device("cpu")] * 2
    assert not device_map.uses_a_gpu(model)
    model.model.layers[0]._hf_hook = AlignDevicesHook(1)
    assert device_map.layer_devices(model, 2) == [GPU[1], torch.device("cpu")]
    assert device_map.uses_a_gpu(model)
    del model.model.layers[0]._hf_hook
    model.model.layers[0].mlp.register_buffer("table", torch.zeros(1, device="meta"))
    assert not device_map.uses_a_gpu(model)


def test_all_modules_of_a_model() -> None:
    model = tiny_llama()
    model.shared = model.model.layers[0].mlp
    model.missing = None
    model.model.layers[1].register_module("none", None)
    model.model.layers[1].inner = torch.nn.Sequential(torch.nn.Linear(2, 2), model.shared)
    model.shared.owner = model.model  # a cycle
    found = modules_of(model)
    assert found[0] is model
    assert len(found) == len(set(found))
    assert set(found) == set(model.modules())
