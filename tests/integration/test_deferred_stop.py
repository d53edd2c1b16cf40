"""Reading the stop decision late: when it is done, and that neither the result of `generate` nor the cache shows it."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.generation import utils
from transformers.generation.streamers import BaseStreamer

from spin_hf import SpinCache
from spin_hf.graph import model_calls
from spin_hf.integration import deferred_stop
from tests.support.graph_recorder import FakeRecorder, capture_on_cpu
from tests.support.inspection import state_of
from tests.support.stale_graph import OPTIONS, small_model
from tests.support.zoo import build_model

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu captures graphs"),
]


class NoEvent:
    """On a CPU everything has happened."""

    def __init__(self, **_: Any) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Listener(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None: ...


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Has the CPU count as a device whose steps are captured; returns what decided when to stop."""
    capture_on_cpu(monkeypatch)
    monkeypatch.setattr(model_calls, "_LATE_DEVICES", ("cpu",))
    monkeypatch.setattr(torch, "Event", NoEvent)
    made: list[Any] = []
    for kind in (utils.StopCheck, utils.DeferredStopCheck):
        original = kind.__init__

        def noting(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> None:
            made.append(type(self))
            original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", noting)
    return made


def _generate(model: Any, cache: Any, prompt: torch.Tensor, streamer: Any = None, **options: Any) -> torch.Tensor:
    torch.manual_seed(5)
    return model.generate(
        prompt, past_key_values=cache, attention_mask=torch.ones_like(prompt), streamer=streamer, pad_token_id=0,
        **{"do_sample": False, "max_new_tokens": 8, **options},
    )  # fmt: skip


def test_who_gets_it(checks: list[Any]) -> None:
    cpu, users = torch.device("cpu"), deferred_stop._users  # other tests may still hold caches
    model = small_model()
    cache = SpinCache(model, **OPTIONS)
    windows = SpinCache(build_model("gemma3_text"), **OPTIONS)

    def supported(asked: Any, assistant: bool = False) -> bool:
        return utils.DeferredStopCheck.is_supported(cpu, asked, True, is_assistant=assistant)

    assert supported(cache)
    assert not supported(cache, assistant=True)
    assert not supported(windows)
    assert not supported(SpinCache(model.config, **OPTIONS))
    assert not supported(DynamicCache(config=model.config))
    assert not supported(None)
    assert not model_calls.reads_late(cache, torch.device("meta"))
    assert deferred_stop._users == users + 2
    del cache, windows
    assert deferred_stop._users == users


@pytest.mark.parametrize("changed", [False, True])
def test_the_last_cache_puts_back_what_stood_there(changed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless another library has replaced it since."""

    class Check:
        @staticmethod
        def is_supported(device: torch.device, cache: Any, cache_is_returned: bool, is_assistant: bool) -> bool:
            return cache == "theirs"

    original = Check.is_supported
    monkeypatch.setattr(deferred_stop, "_CHECK", Check)
    monkeypatch.setattr(deferred_stop, "_users", 0)
    monkeypatch.setattr(deferred_stop, "_previous", None)
    for _ in range(2):
        deferred_stop.acquire(model_calls.reads_late)
    assert Check.is_supported is not original
    assert Check.is_supported(torch.device("cpu"), "theirs", True, is_assistant=False)
    assert not Check.is_supported(torch.device("cpu"), "another", True, is_assistant=False)
    deferred_stop.release()
    assert Check.is_supported is not original
    if changed:
        Check.is_supported = staticmethod(foreign := lambda *args, **kwargs: True)
    deferred_stop.release()
    assert Check.is_supported is (foreign if changed else original)


@pytest.mark.sweep(keep=[2, 4])
@pytest.mark.parametrize(
    ("ends_at", "new_tokens", "sampling"), [(None, 6, False), (3, 6, False), (3, 6, True), (5, 6, False), (0, 1, False)]
)
def test_the_same_as_waiting(
    ends_at: int | None, new_tokens: int, sampling: bool, checks: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    prompt = torch.randint(3, 100, (1, 41), generator=torch.Generator().manual_seed(1))
    options = {"do_sample": sampling, "max_new_tokens": new_tokens}
    results = []
    eos = None
    for devices in ((), (), ("cpu",)):  # the first one finds a token to end at
        monkeypatch.setattr(model_calls, "_LATE_DEVICES", devices)
        cache, listener = SpinCache(model, **OPTIONS), Listener()
        first = _generate(model, cache, prompt, listener, eos_token_id=eos, **options)
        held = cache.get_seq_length()
        cache.check_integrity()
        options["max_new_tokens"] = min(3, new_tokens)
        second = _generate(model, cache, torch.cat([first, prompt[:, :5]], 1), **options)  # another turn
        options["max_new_tokens"] = new_tokens
        results.append((first.tolist(), held, listener.tokens, second.tolist(), cache.get_seq_length()))
        if ends_at is not None and eos is None:
            eos = int(first[0, min(41 + ends_at, first.shape[1] - 1)])
    assert results[1] == results[2]
    assert utils.DeferredStopCheck in checks
    assert FakeRecorder.replays or new_tokens == 1


def test_a_batch_whose_sequences_end_at_different_times(checks: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    prompt = torch.randint(3, 100, (3, 41), generator=torch.Generator().manual_seed(2))
    free = _generate(model, SpinCache(model, **OPTIONS), prompt)[:, 41:]
    eos = [int(free[0, 1]), int(free[1, 4]), int(free[2, 2])]
    results = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(model_calls, "_LATE_DEVICES", devices)
        cache = SpinCache(model, **OPTIONS)
        results.append((_generate(model, cache, prompt, eos_token_id=eos).tolist(), cache.get_seq_length()))
        cache.check_integrity()
    assert results[0] == results[1]


def test_cropping_nothing_changes_nothing(checks: list[Any]) -> None:
    """It happens after every token, and a changed past would cost every step its uploaded descriptor."""
    model = small_model()
    cache = SpinCache(model, **OPTIONS)
    _generate(model, cache, torch.full((1, 41), 5))
    sequences = state_of(cache).sequences
    before = (sequences.past_version, sequences.memory_version, sequences.length)
    cache.crop(0)
    assert (sequences.past_version, sequences.memory_version, sequences.length) == before
