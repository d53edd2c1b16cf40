"""Replaces CUDA graphs on the CPU: the recorded function runs again at every replay, into the same outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import spin_hf.cache
from spin_hf.graph import runner
from tests.support.cluster_by_formulas import cluster_by_formulas
from tests.support.tuning import tune


class FakeRecorder:
    """Recording runs the function, so the first replay does nothing."""

    replays = 0

    def record(self, step: Callable[[], Any]) -> Any:
        self.step, self.fresh = step, True
        self.outputs = step()
        return self.outputs

    def replay(self) -> None:
        FakeRecorder.replays += 1
        if not self.fresh:
            for static, new in zip(*map(pytree.tree_leaves, (self.outputs, self.step())), strict=True):
                if isinstance(static, torch.Tensor):
                    static.copy_(new)
        self.fresh = False


_eager: set[int] = set()


@contextmanager
def eagerly(model: Any) -> Iterator[None]:
    """Caches of `model` that are made in this block do not capture its steps."""
    _eager.add(id(model))
    yield
    _eager.remove(id(model))


def capture_on_cpu(monkeypatch: pytest.MonkeyPatch) -> type[FakeRecorder]:
    """Run interpreted kernels on the CPU, and capture the steps of every cache."""
    from spin_hf.kernels.triton_launchers import launchers  # needs triton

    monkeypatch.setattr(spin_hf.kernels, "launchers", lambda device: launchers)
    cluster_by_formulas(monkeypatch)
    tune(monkeypatch, programs=4)
    monkeypatch.setattr(spin_hf.graph.model_calls, "may_be_captured", lambda model: id(model) not in _eager)
    monkeypatch.setattr(runner, "Recorder", FakeRecorder)
    FakeRecorder.replays = 0
    return FakeRecorder
