"""A model on two devices, as accelerate places it: no operation of the cache mixes tensors of both, whatever the cache does.

By PyTorch, and by interpreted kernels as on GPUs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import DynamicCache

from spin_hf import Bisection, Fitted, RetroInfer, SpinCache
from tests.support.clustering_methods import clustering_often, little_slack
from tests.support.graph_recorder import capture_on_cpu
from tests.support.inspection import kernels_of, state_of
from tests.support.stale_graph import small_model
from tests.support.tagged_devices import FIRST, SECOND, MixedDevicesError, devices_are_told_apart, put
from tests.support.zoo import random_tokens

IDS = random_tokens(2, 70, seed=3)
OPTIONS: dict[str, Any] = {"budget": 16, "recent_window": 8}
METHODS: dict[str, Any] = {
    "shadowkv": "shadowkv",
    "quest": "quest",
    "fitted": clustering_often(Fitted, 32, 16)(),
    "bisection": clustering_often(Bisection, 32, 16)(2),
    "retroinfer": clustering_often(RetroInfer, 32, 16)(),
}


class _Moves(AlignDevicesHook):
    """accelerate's hook, except that it leaves the parameters where they are."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, skip_keys=["past_key_values", "cache"])

    def init_hook(self, module: Any) -> Any:
        return module


def _placed() -> Any:
    model = put(small_model(), FIRST)
    for part in (*model.model.layers[1:], model.model.norm, model.lm_head):
        add_hook_to_module(put(part, SECOND), _Moves(SECOND))
    return model


class _Reads:
    """Forwards of a placed model."""

    def __init__(self, padded: bool) -> None:
        self.model, self.ids, self.mask = _placed(), put(IDS.clone(), FIRST), torch.ones_like(IDS)
        self.mask[0, :11] = int(not padded)
        put(self.mask, FIRST)

    @torch.no_grad()
    def __call__(self, cache: Any, first: int, stop: int, **options: Any) -> torch.Tensor:
        ids, mask = self.ids[:, first:stop], self.mask[:, :stop]
        return self.model(ids, attention_mask=mask, past_key_values=cache, **options).logits


def test_what_is_mixed_is_found() -> None:
    one, other = put(torch.ones(2), FIRST), put(torch.ones(2), SECOND)
    with devices_are_told_apart():
        assert (one * 2).device == FIRST
        assert one.to(SECOND).device == (one.to(other.device) + other).device == SECOND
        assert torch.zeros(1, device=other.device).device == SECOND
        assert other.new_zeros(1).device == SECOND
        with pytest.raises(MixedDevicesError):
            one + other
        with pytest.raises(MixedDevicesError):
            torch.stack([one, other])


@pytest.mark.sweep(keep=[0, 5])
@pytest.mark.parametrize(
    ("method", "padded", "options"),
    [
        ("fitted", True, {"gpu_memory": "100kB", "prefill_chunk_size": 20}),
        ("fitted", False, {}),
        ("shadowkv", True, {"gpu_memory": "100kB", "cpu_dtype": "int8"}),
        ("bisection", True, {}),
        ("quest", True, {"prefill": "sparse"}),
        ("retroinfer", True, {"gpu_memory": "100kB"}),
    ],
)
def test_by_pytorch(method: str, padded: bool, options: dict[str, Any], tmp_path: Path) -> None:
    read, options = _Reads(padded), OPTIONS | options
    with devices_are_told_apart(), little_slack():
        cache = SpinCache(read.model, METHODS[method], **options)
        read(cache, 0, 50)
        for at in range(50, 58):
            logits = read(cache, at, at + 1)
        assert logits.device == SECOND
        assert [layer.store.device for layer in cache.paged_layers if layer.store is not None] == [FIRST, SECOND]
        twin = cache.fork()
        read(twin, 58, 59)
        cache.crop(-5)
        read(cache, 53, 56)  # several tokens at once
        cache.save_pretrained(tmp_path)
        cache.reorder_cache(torch.tensor([1, 0]))
        read(cache, 56, 57)
        if method not in ("shadowkv", "quest"):
            assert state_of(cache).sequences.spans.stops
        cache.check_integrity()
        cache.stats()
        cache.reset()
        read(cache, 0, 40)
        loaded = SpinCache.from_pretrained(tmp_path, read.model, METHODS[method])
        read(loaded, 56, 57)
        read(loaded, 57, 58, output_attentions=True)
        loaded.release_gpu_memory()
        dense = DynamicCache(config=read.model.config)
        read(dense, 0, 50)
        taken = SpinCache.from_cache(dense, read.model, METHODS[method], attention_mask=read.mask[:, :50], **options)
        read(taken, 50, 51)


@pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs interpreted kernels")
@pytest.mark.sweep(keep=[0])
@pytest.mark.parametrize("method", ["shadowkv", "fitted", "bisection", "quest", "retroinfer"])
def test_by_kernels(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An eager step, then captured ones, with a fake graph."""
    recorder, read = capture_on_cpu(monkeypatch), _Reads(padded=True)
    with devices_are_told_apart(), little_slack():
        cache = SpinCache(read.model, METHODS[method], gpu_memory="100kB", **OPTIONS)
        read(cache, 0, 41)
        for at in range(41, 46):
            read(cache, at, at + 1)
        assert [step.device for step in kernels_of(cache)] == [FIRST, SECOND]
        assert recorder.replays >= 3
        read(cache.fork(), 46, 47)
        cache.check_integrity()
