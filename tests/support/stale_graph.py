"""For tests of optimistic replay: graphs that are worse than real ones when they are stale, and a small model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_hf.graph import runner
from tests.support.graph_recorder import FakeRecorder, capture_on_cpu
from tests.support.zoo import build_model

OPTIONS: dict[str, Any] = {"method": "shadowkv", "budget": 16, "recent_window": 8}


class StaleRecorder(FakeRecorder):
    """A graph is stale if `now` has grown since it was recorded. Its replay writes wrong keys and values, and returns NaN."""

    now = 0
    model: Any = None

    def record(self, step: Callable[[], Any]) -> Any:
        self.made = StaleRecorder.now
        return super().record(step)

    def replay(self) -> None:
        if self.made == StaleRecorder.now:
            return super().replay()
        embedding = StaleRecorder.model.get_input_embeddings().weight
        with torch.no_grad():
            embedding.copy_(embedding.flip(0))
            super().replay()
            embedding.copy_(embedding.flip(0))
            for leaf in self.outputs:
                leaf.fill_(float("nan"))


def capture_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_cpu(monkeypatch)
    monkeypatch.setattr(runner, "Recorder", StaleRecorder)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def small_model() -> Any:
    model = build_model("llama").eval()
    del model.model.layers[2:]  # interpreted kernels are slow
    model.config.num_hidden_layers = 2
    return model
