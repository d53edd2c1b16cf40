"""PEFT adapters under captured decode steps, with a fake graph that becomes stale as a real one would."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from spin_hf import SpinCache
from spin_hf.graph import runner
from tests.support.graph_recorder import FakeRecorder, capture_on_cpu
from tests.support.zoo import random_tokens

pytest.importorskip("peft")

from tests.support.adapters import CHANGES, PROMPT, Change, adapted_model, saved_adapter, steps_around_changes

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu captures graphs"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT says what merging does
]

FULL: dict[str, Any] = {"method": "shadowkv", "budget": 1 << 20}
NOTHING: tuple[Change, Change] = (lambda model, folder: None, lambda model, folder: None)


class StaleRecorder(FakeRecorder):
    """Replays with the modules, their attributes and the addresses of parameters that the recorded call found."""

    model: nn.Module

    def record(self, step: Callable[[], Any]) -> Any:
        modules = list(self.model.modules())
        self.found = [(module, _copied(module.__dict__)) for module in modules]
        self.data = [(parameter, parameter.data) for parameter in self.model.parameters()]
        return super().record(step)

    def replay(self) -> None:
        with self._as_recorded():
            super().replay()

    @contextmanager
    def _as_recorded(self) -> Iterator[None]:
        now = [module.__dict__ for module, _ in self.found]
        data = [parameter.data for parameter, _ in self.data]
        for module, attributes in self.found:
            module.__dict__ = attributes  # type: ignore[method-assign]
        for parameter, recorded in self.data:
            parameter.data = recorded
        try:
            yield
        finally:
            for (parameter, _), present in zip(self.data, data, strict=True):
                parameter.data = present
            for (module, _), attributes in zip(self.found, now, strict=True):
                module.__dict__ = attributes  # type: ignore[method-assign]


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value.copy() if isinstance(value, (dict, list)) else value for name, value in attributes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_adapter(tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[FakeRecorder]:
    capture_on_cpu(monkeypatch)
    monkeypatch.setattr(runner, "Recorder", StaleRecorder)
    return FakeRecorder


@pytest.fixture
def model(recorder: type[FakeRecorder], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A PeftModel whose steps are captured."""
    model = adapted_model()
    StaleRecorder.model = model.get_base_model()
    return model


def _close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((actual - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.sweep
@pytest.mark.parametrize("given", ["peft model", "base model", "config"])
@pytest.mark.parametrize("caller", ["peft model", "base model"])
def test_generate(model: Any, given: str, caller: str) -> None:
    subjects = {"peft model": model, "base model": model.get_base_model(), "config": model.get_base_model().config}
    inputs = random_tokens(2, PROMPT, 3)
    options: dict[str, Any] = dict(
        attention_mask=torch.ones_like(inputs), max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    twin = adapted_model()
    expected = twin.generate(input_ids=inputs, past_key_values=DynamicCache(config=twin.config), **options)
    cache = SpinCache(subjects[given], **FULL)
    actual = subjects[caller].generate(input_ids=inputs, past_key_values=cache, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    assert _close(torch.stack(actual.logits), torch.stack(expected.logits))
    assert FakeRecorder.replays == 4
    cache.check_integrity()


@pytest.mark.sweep(keep=[0, 1, 5, 9])
@pytest.mark.parametrize("name", ["nothing", *CHANGES])
def test_no_stale_step_is_replayed(name: str, model: Any, folder: Path) -> None:
    change = NOTHING if name == "nothing" else CHANGES[name]
    twin = adapted_model()
    expected = steps_around_changes(twin, DynamicCache(config=twin.config), change, folder, lambda: None)
    cache, replays = SpinCache(model, **FULL), [0]
    actual = steps_around_changes(model, cache, change, folder, lambda: replays.append(FakeRecorder.replays))
    assert _close(actual, expected)
    cache.check_integrity()
    groups = [after - before for before, after in itertools.pairwise(replays)]
    if name == "nothing":
        assert groups == [2, 3, 3]
    else:
        assert groups[0] == 2
        assert groups[2] >= (name != "hooked")  # of a hook that is gone the watch need not hear


@torch.no_grad()
def test_an_adapter_for_each_sequence(model: Any) -> None:
    """PEFT chooses them by hooks that live for one call, which are not to be captured."""
    tokens, twin = random_tokens(2, PROMPT + 6, 3), adapted_model()
    logits: list[list[torch.Tensor]] = [[], []]
    caches = [SpinCache(model, **FULL), DynamicCache(config=twin.config)]
    for subject, cache, out in zip((model, twin), caches, logits, strict=True):
        subject(tokens[:, :PROMPT], past_key_values=cache)
        for index, token in enumerate(tokens[:, PROMPT:].split(1, 1)):
            names = {"adapter_names": ["other", "__base__"]} if index in (2, 3) else {}
            out.append(subject(token, past_key_values=cache, **names).logits)
    assert _close(*(torch.cat(each, 1) for each in logits))
    assert FakeRecorder.replays >= 1
    caches[0].check_integrity()
