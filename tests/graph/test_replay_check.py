"""Optimistic replay: whatever was wrongly assumed, the caller gets the result of an eager forward.

Graphs here are worse than real ones: a graph that was recorded before the model changed feeds wrong tokens to it, and returns
NaN. Expected results come from the reference operations.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spin_hf import SpinCache
from spin_hf.graph.eligibility import ModelGuard
from tests.support.graph_recorder import FakeRecorder, capture_on_cpu
from tests.support.stale_graph import OPTIONS, StaleRecorder, assert_same, capture_stale, small_model
from tests.support.zoo import build_model

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu captures graphs"),
]

TWO_TIERS: dict[str, Any] = {"gpu_memory": 36_000}


class Adapted(nn.Module):
    """As PEFT's layers: an addition that can be switched off."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.more = base, nn.Linear(base.in_features, base.out_features, bias=False)
        self._disable_adapters, self.active_adapters, self.merged_adapters = False, ["one"], []

    def forward(self, states: Tensor) -> Tensor:
        more = 0 if self._disable_adapters else self.more(states)
        return self.base(states) + more


def _replace_parameter(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)


def _replace_buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5


def _replace_module(model: Any) -> None:
    model.model.layers[1].mlp = nn.Identity()


def _toggle_adapter(model: Any) -> None:
    model.model.layers[0].self_attn.v_proj._disable_adapters = True


def _train_a_part(model: Any) -> None:
    part = model.model.layers[0].mlp
    part.train()
    forward = part.forward
    part.forward = lambda states: forward(states) * (2 if part.training else 1)


def _swap_data(model: Any) -> None:
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data * 2


def _move(model: Any) -> None:
    model.double()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.float()


def _hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, output: output * 2)


def _train(model: Any) -> None:
    _train_a_part(model)
    model.train()


def _patch_forward(model: Any) -> None:
    part = model.model.layers[0].mlp
    part.forward = lambda states: type(part).forward(part, states) * 2


BEHIND = [_replace_parameter, _replace_buffer, _replace_module, _toggle_adapter, _train_a_part, _patch_forward]
BEFORE = [_swap_data, _move, _hook, _train]


def test_a_hook_on_all_modules_is_called_and_one_that_is_removed_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    handles = []

    def hook(model: Any) -> None:
        part = model.model.layers[0].mlp
        handles.append(
            nn.modules.module.register_module_forward_hook(
                lambda module, given, output: output * 2 if module is part else None
            )
        )

    def run(source: str) -> tuple[Tensor, list[int]]:
        try:
            logits, _, replays = _conversation(source, 38, hook)
            return logits, replays
        finally:
            handles.pop().remove()

    expected, _ = run("config")
    capture_stale(monkeypatch)
    actual, replays = run("model")
    assert_same(actual, expected)
    assert replays == [0, 1, 1, 0, 0, 0]

    model = small_model()
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, given, output: output)
    cache = SpinCache(model, **OPTIONS)
    with torch.no_grad():
        model(torch.full((1, 40), 5), past_key_values=cache)
        model(torch.tensor([[5]]), past_key_values=cache)
        assert cache.calls.steps.refused
        handle.remove()
        before = FakeRecorder.replays
        for _ in range(3):
            model(torch.tensor([[5]]), past_key_values=cache)
    assert not cache.calls.steps.refused
    assert FakeRecorder.replays == before + 2


@torch.no_grad()
def _conversation(
    source: str, prompt: int, change: Callable[[Any], None], **options: Any
) -> tuple[Tensor, SpinCache, list[int]]:
    """A prompt, three tokens, a change, and three tokens: the logits, and the replays of each of the six."""
    torch.manual_seed(3)
    model = small_model()
    model.model.layers[0].self_attn.v_proj = Adapted(model.model.layers[0].self_attn.v_proj)
    StaleRecorder.model = model
    ids = torch.randint(3, 100, (1, prompt + 6), generator=torch.Generator().manual_seed(1))
    cache = SpinCache(model if source == "model" else model.config, **OPTIONS, **options)
    logits = [model(ids[:, :prompt], past_key_values=cache).logits[:, -1:]]
    replays = []
    for place in range(prompt, prompt + 6):
        if place == prompt + 3:
            change(model)
            StaleRecorder.now += 1
        before = FakeRecorder.replays
        mask = torch.ones((1, place + 1), dtype=torch.int64)
        logits.append(model(ids[:, place : place + 1], past_key_values=cache, attention_mask=mask).logits)
        replays.append(FakeRecorder.replays - before)
        assert cache.get_seq_length() == place + 1
    cache.check_integrity()
    return torch.cat(logits, 1), cache, replays


@pytest.mark.sweep(keep=[0, 3, 6, 8])
@pytest.mark.parametrize("change", [*BEHIND, *BEFORE])
def test_a_changed_model_gives_what_it_gives_eagerly(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _, none = _conversation("config", 38, change)
    capture_stale(monkeypatch)
    actual, _, replays = _conversation("model", 38, change)
    assert not any(none)
    assert_same(actual, expected)
    caught_behind = int(change in BEHIND)
    again = 0 if change in (_hook, _train) else 1  # those keep it from being captured
    assert replays == [0, 1, 1, caught_behind, again, again]


@pytest.mark.sweep(keep=[1, 3])
@pytest.mark.parametrize(
    ("place", "options"),
    [(40, {}), (47, {}), (40, TWO_TIERS), (44, TWO_TIERS), (47, TWO_TIERS), (256, {})],
    ids=[
        "opens a page",
        "fills a page",
        "opens, in two tiers",
        "inside, in two tiers",
        "fills, in two tiers",
        "segment",
    ],
)
def test_a_step_that_is_taken_back_leaves_nothing(
    place: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = place - 3  # the fourth token is rolled back
    expected, eager, _ = _conversation("config", prompt, _replace_parameter, **options)
    capture_stale(monkeypatch)
    actual, cache, replays = _conversation("model", prompt, _replace_parameter, **options)
    assert_same(actual, expected)
    assert replays[3] == 1
    assert (cache.stats().cpu_bytes > 0) == bool(options)
    assert (cache.stats().tokens, cache.stats().pages) == (eager.stats().tokens, eager.stats().pages)


@torch.no_grad()
def test_every_cache_of_a_model_sees_the_change(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = []
    for source in ("config", "model"):
        if source == "model":
            capture_stale(monkeypatch)
        model = StaleRecorder.model = small_model()
        ids = torch.randint(3, 100, (1, 30), generator=torch.Generator().manual_seed(1))
        caches = [SpinCache(model if source == "model" else model.config, **OPTIONS) for _ in range(2)]
        for cache, prompt in zip(caches, (ids, ids.flip(1)), strict=True):
            model(prompt, past_key_values=cache)
            for token in (5, 6, 7):
                model(torch.full((1, 1), token), past_key_values=cache)
        _replace_parameter(model)
        StaleRecorder.now += 1
        for token in (8, 9):
            for cache in caches:
                logits.append(model(torch.full((1, 1), token), past_key_values=cache).logits)
                cache.check_integrity()
    assert_same(torch.cat(logits[4:]), torch.cat(logits[:4]))


# ------------------------------------------------------------------------------------------------- waits and failures


@torch.no_grad()
def test_nothing_waits_for_the_device_before_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_cpu(monkeypatch)
    model = small_model()
    cache = SpinCache(model, **OPTIONS)
    ids = torch.randint(3, 100, (1, 30), generator=torch.Generator().manual_seed(1))
    model(ids, past_key_values=cache)
    launched, replay = [], FakeRecorder.replay

    def launch(self: FakeRecorder) -> None:
        launched.append(1)
        with monkeypatch.context() as patch:
            for name, original in waits.items():
                patch.setattr(torch.Tensor, name, original)
            replay(self)

    waits = {name: getattr(torch.Tensor, name) for name in ("__bool__", "__int__", "item", "tolist", "nonzero", "cpu")}
    monkeypatch.setattr(FakeRecorder, "replay", launch)

    def forward(place: int) -> None:
        mask = torch.ones((1, place + 1), dtype=torch.int64)
        model(torch.full((1, 1), 5), past_key_values=cache, attention_mask=mask)

    for place in (30, 31):
        forward(place)
    for place in (32, 33, 34):  # a page begins at 32
        launched.clear()
        with monkeypatch.context() as patch:
            for name, original in waits.items():
                patch.setattr(torch.Tensor, name, _only_after(launched, name, original))
            forward(place)
        assert launched == [1]
    cache.check_integrity()


def _only_after(launched: list[int], name: str, original: Any) -> Any:
    def wait(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert launched, f"{name} waits for the device before the launch"
        return original(self, *args, **kwargs)

    return wait


@torch.no_grad()
def test_nothing_but_addresses_is_looked_at_before_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_cpu(monkeypatch)
    model = small_model()
    cache = SpinCache(model, **OPTIONS)
    model(torch.full((1, 30), 5), past_key_values=cache)
    order: list[str] = []
    for owner, name in ((ModelGuard, "unchanged"), (FakeRecorder, "replay")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, n=name, f=original: (order.append(n), f(*a))[1])
    for _ in range(4):
        model(torch.full((1, 1), 5), past_key_values=cache)
    assert order == ["unchanged", "replay", *["replay", "unchanged"] * 2]


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_next"])
@torch.no_grad()
def test_what_cannot_be_taken_back_is_looked_at_first(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_cpu(monkeypatch)
    model = build_model(family).eval()
    cache = SpinCache(model, **OPTIONS)
    model(torch.full((1, 41), 5), past_key_values=cache)
    for _ in range(3):
        model(torch.full((1, 1), 5), past_key_values=cache)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)
    before = FakeRecorder.replays
    assert before == 2
    model(torch.full((1, 1), 5), past_key_values=cache)
    assert FakeRecorder.replays == before
    cache.check_integrity()


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [(FakeRecorder, "replay", RuntimeError), (ModelGuard, "unchanged", KeyboardInterrupt)],
)
@torch.no_grad()
def test_a_failure_on_trust_loses_nothing(
    owner: Any, name: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(3, 100, (1, 38), generator=torch.Generator().manual_seed(1))
    logits = []

    def fail(*args: Any) -> None:
        raise error("in the middle")

    for source in ("config", "model"):
        if source == "model":
            capture_on_cpu(monkeypatch)
        model = small_model()
        cache = SpinCache(model if source == "model" else model.config, **OPTIONS)
        model(ids[:, :32], past_key_values=cache)
        parts = [model(token, past_key_values=cache).logits for token in ids[:, 32:35].split(1, 1)]
        for count in (1, 2):  # after it another replay, or a forward of several tokens
            place = cache.get_seq_length()
            if source == "model":
                with monkeypatch.context() as patch, pytest.raises(error, match="in the middle"):
                    patch.setattr(owner, name, fail)
                    model(ids[:, place : place + 1], past_key_values=cache)
                assert cache.get_seq_length() == place
            parts.append(model(ids[:, place : place + count], past_key_values=cache).logits)
            cache.check_integrity()
        assert cache.get_seq_length() == 38
        logits.append(torch.cat(parts, 1))
    assert_same(logits[1], logits[0])
