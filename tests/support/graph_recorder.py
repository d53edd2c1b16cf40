"""Replaces CUDA graphs on the CPU: the recorded function runs again at every replay, into the same outputs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import spin_hf.cache
from spin_hf.graph import runner
from tests.support.cluster_by_formulas import cluster_by_formulas
from tests.support.inspection import forward_of
from tests.support.tuning import tune


class FakeRecorder:
    """Recording runs the function, so the first replay does nothing."""

    replays = 0

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = devices

    def record(self, step: Callable[[], Any]) -> Any:
        self.step, self.fresh = step, True
        outputs = step()
        self.outputs = _tensors_of(outputs)
        return outputs

    def replay(self) -> None:
        FakeRecorder.replays += 1
        if not self.fresh:
            for static, new in zip(self.outputs, _tensors_of(self.step()), strict=True):
                static.copy_(new)
        self.fresh = False


def _tensors_of(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


class FakeCapturedStep(runner.CapturedStep):
    """Runs for the cache that replays it, as a graph serves any cache that has written the descriptors."""

    def capture(self, forward: Callable[..., Any], cache: dict[str, Any], passes: Any) -> None:
        self.function, self.owner = (
            getattr(forward, "__func__", forward),
            weakref.ref(getattr(forward, "__self__", forward)),
        )
        (self.name,) = cache
        super().capture(forward, cache, passes)
        del self.recorder.step  # type: ignore[attr-defined]  # it holds the cache, which a graph does not

    def replay(self, inputs: dict[str, Any], cache: Any) -> Any:
        def step() -> Any:
            model = self.owner()
            call = self.function if model is self.function else MethodType(self.function, model)
            with forward_of(cache).capturing(self.device):
                outputs = call(**self.inputs, **self.fixed, **{self.name: cache})
            self.state.bind(cache.layers)
            return outputs

        self.recorder.step = step  # type: ignore[attr-defined]
        try:
            return super().replay(inputs, cache)
        finally:
            del self.recorder.step  # type: ignore[attr-defined]


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
    monkeypatch.setattr(runner, "CapturedStep", FakeCapturedStep)
    FakeRecorder.replays = 0
    return FakeRecorder
