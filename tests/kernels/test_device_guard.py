"""Kernels are launched while the GPU of their tensors is current, and one GPU costs nothing."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import spin_hf.kernels
from spin_hf.kernels import device_guard

FOLDER = Path(spin_hf.kernels.__file__).parent
GUARDS = {"on_device_of", "on_device_of_arguments"}


def _unguarded(node: ast.AST, guarded: bool = False) -> Iterator[int]:
    """Lines of launches `kernel[grid](...)` outside of a guard."""
    if isinstance(node, ast.With):
        calls = [item.context_expr for item in node.items]
        guarded |= any(isinstance(call, ast.Call) and getattr(call.func, "id", "") in GUARDS for call in calls)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and not guarded:
        launched = node.func.value
        if isinstance(launched, ast.Name) and launched.id.endswith("kernel"):
            yield node.lineno
    for child in ast.iter_child_nodes(node):
        yield from _unguarded(child, guarded)


def test_every_launch_is_guarded() -> None:
    found = {
        f"{file.name}:{line}"
        for file in FOLDER.rglob("*.py")
        for line in _unguarded(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert not found, f"expected `with on_device_of(tensor):` around each launch, missing at {sorted(found)}"


def test_the_search_finds_launches() -> None:
    source = "with on_device_of(a):\n    one_kernel[1](a)\nother_kernel[1](a)"
    assert list(_unguarded(ast.parse(source))) == [3]


def test_one_gpu_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_guard, "several_gpus", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_of", None)
    tensor = torch.zeros(1)
    assert device_guard.on_device_of(tensor) is device_guard.on_device_of_arguments([tensor])


@pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only")
def test_with_several_gpus_the_first_tensor_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    from spin_hf.kernels.compile_ahead import launch_now

    monkeypatch.setattr(device_guard, "several_gpus", lambda: True)
    entered, tensor = [], torch.zeros(1)

    @contextmanager
    def device_of(given: torch.Tensor) -> Iterator[None]:
        entered.append(given)
        yield
        entered.append(None)

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: entered.append(grid)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    launch_now(Kernel(), (2,), 5, tensor, torch.ones(2))
    assert entered[0] is tensor
    assert entered[1:] == [(2,), None]
    assert isinstance(device_guard.on_device_of_arguments([1, 2]), AbstractContextManager)
