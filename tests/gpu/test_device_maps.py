"""Models that accelerate has placed on several devices: captured in one graph, exact, with frames on each GPU.

The first tests need one GPU, those behind them two.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import nn
from transformers import DynamicCache

from spin_hf import SpinCache, plan
from spin_hf.graph.recorder import Recorder
from tests.support.inspection import kernels_of, unpaged_layers
from tests.support.memory import with_tight_gpu_memory
from tests.support.padded_pair import FULL, generate_short, padded_inputs
from tests.support.synchronisation import no_synchronisation
from tests.support.zoo import build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
SPARSE: dict[str, Any] = {"budget": 24, "recent_window": 8}


def _map(model: Any, first: int | str, second: int | str, at: int = 1) -> dict[str, int | str]:
    """Decoder layers from `at` on, norms and head on the second device, the rest on the first."""
    decoder, places = model.get_decoder(), dict[str, int | str]()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList):
            places.update({f"{prefix}.{name}.{i}": first if i < at else second for i in range(len(child))})
        else:
            places[f"{prefix}.{name}"] = second if name == "norm" else first
    places.update({name: second for name, _ in model.named_children() if name != prefix})
    return places


def _placed(family: str, first: int | str = 0, second: int | str = 1, **options: Any) -> Any:
    model = build_model(family).eval()
    places = _map(model, first, second)
    main = first if isinstance(first, int) else second
    skipped = {"past_key_values", "cache", *(model._skip_keys_device_placement or ())}
    model.hf_device_map = places
    return dispatch_model(model, places, main_device=main, skip_keys=list(skipped), **options)


def _of_one_gpu(family: str, padded: bool = False) -> Any:
    model = build_model(family).cuda().eval()
    return generate_short(model, DynamicCache(config=model.config), padded)


def _graphs(cache: SpinCache) -> int:
    steps = cache.calls.steps
    assert steps is not None
    return sum(step is not None for step in steps.captured.values())


def _assert_same(actual: Any, expected: Any) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    a, b = torch.stack(actual.logits), torch.stack(expected.logits).to(actual.logits[0].device)
    finite = torch.isfinite(b)
    assert float((a - b)[finite].abs().max() / b[finite].abs().max()) < 1e-4


@contextmanager
def _warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    found: list[str] = []
    with caplog.at_level(logging.WARNING, "spin_hf"):
        yield found
    found += [record.getMessage() for record in caplog.records if record.name == "spin_hf"]


def test_hooks_on_one_gpu_are_captured() -> None:
    expected = _of_one_gpu("llama")
    model = _placed("llama", 0, 0, force_hooks=True)
    cache = SpinCache(model, **FULL)
    _assert_same(generate_short(model, cache), expected)
    assert _graphs(cache) == 1, cache.calls.steps.refused


def test_layers_in_host_memory_decode_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    expected = _of_one_gpu("llama")
    model = _placed("llama", 0, "cpu")
    cache = SpinCache(model, **FULL)
    with _warnings(caplog) as messages:
        _assert_same(generate_short(model, cache), expected)
    assert [message for message in messages if "accelerate loads the weights of model.layers.1" in message]
    assert _graphs(cache) == 0
    assert {layer.store.device for layer in cache.paged_layers if layer.store is not None} == {torch.device("cuda:0")}
    cache.check_integrity()


def test_inputs_on_the_cpu_decode_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    """accelerate moves them at every call."""
    model = _placed("llama", 0, 0, force_hooks=True)
    cache = SpinCache(model, **FULL)
    ids = padded_inputs()["input_ids"].cpu()
    with torch.no_grad(), _warnings(caplog) as messages:
        for piece in (ids[:, :80], *ids[:, 80:84].split(1, 1)):
            assert model(piece, past_key_values=cache).logits.device.type == "cpu"
    assert any("its argument input_ids is on cpu; move it to cuda:0" in message for message in messages)


# ------------------------------------------------------------------------------------------------------ on two GPUs


@two_gpus
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss", "gemma3_text", "qwen3_next"])
def test_two_gpus_equal_dynamic_cache(family: str, padded: bool) -> None:
    """Windows and linear states of the second GPU's layers are static tensors there."""
    expected = _of_one_gpu(family, padded)
    model = _placed(family)
    cache = SpinCache(model, **FULL)
    _assert_same(generate_short(model, cache, padded), expected)
    assert _graphs(cache) == 1, cache.calls.steps.refused
    for layer in cache.paged_layers:
        assert layer.store is not None
        assert layer.store.device.index == (0 if layer.layer_idx < 1 else 1)
    for layer in unpaged_layers(cache):
        assert getattr(layer, "keys", None) is None or layer.keys.device.type == "cuda"
    cache.check_integrity()


@two_gpus
@pytest.mark.parametrize("tiers", ["one", "two"])
@pytest.mark.parametrize("method", ["shadowkv", "fitted", "bisection", "quest", "retroinfer"])
def test_two_gpus_equal_one(method: str, tiers: str) -> None:
    """Sparse steps: a replay across the GPUs selects, loads and attends as one on a single GPU does.

    A cap is for each GPU, so half of it gives the same frames, as each has half of the layers.
    """

    def run(model: Any, gpu_memory: Any) -> tuple[SpinCache, torch.Tensor]:
        cache = SpinCache(model, method, gpu_memory=gpu_memory, **SPARSE)
        return cache, generate_short(model, cache, max_new_tokens=60).sequences

    def one_gpu(gpu_memory: Any) -> tuple[Any, SpinCache, torch.Tensor]:
        return gpu_memory, *run(_placed("llama", 0, 0, force_hooks=True), gpu_memory)

    cap, one, expected = one_gpu("auto") if tiers == "one" else with_tight_gpu_memory(one_gpu)
    two, actual = run(_placed("llama"), cap if cap == "auto" else -(-cap // 2))
    assert torch.equal(actual, expected)
    assert _graphs(two) >= 1, two.calls.steps.refused
    assert [step.device.index for step in kernels_of(two)] == [0, 1]
    for name in ("pages", "tokens", "mandatory_frames", "buffer_frames"):
        assert getattr(two.stats(), name) == getattr(one.stats(), name), name
    assert (two.stats().loads > 0) == (tiers == "two")
    for cache in (one, two):
        cache.check_integrity()


@two_gpus
@torch.no_grad()
def test_no_step_waits_for_the_host() -> None:
    model = _placed("llama")
    cache = SpinCache(model, "shadowkv", **SPARSE)
    model(**padded_inputs(), past_key_values=cache)
    token = torch.full((2, 1), 5, device="cuda:0")
    for _ in range(3):
        model(token, past_key_values=cache)
    assert _graphs(cache) == 1, cache.calls.steps.refused
    with no_synchronisation():
        for _ in range(50):
            model(token, past_key_values=cache)
    cache.check_integrity()


@two_gpus
@torch.no_grad()
def test_replays_follow_what_each_gpu_does_in_between() -> None:
    """Long work on either GPU's stream delays neither inputs nor descriptors past the replay."""
    logits = []
    for busy in (False, True):
        model = _placed("llama")
        cache = SpinCache(model, "shadowkv", **SPARSE)
        inputs = padded_inputs()
        model(**inputs, past_key_values=cache)
        big = [torch.rand(4096, 4096, device=f"cuda:{index}") for index in range(2)]
        for at in range(30):
            if busy:
                for matrix in big:
                    for _ in range(4):
                        matrix.copy_((matrix @ matrix).clamp(-1, 1))
            token = inputs["input_ids"][:, at : at + 1]
            logits.append(model(token, past_key_values=cache).logits)
    half = len(logits) // 2
    torch.testing.assert_close(torch.stack(logits[half:]), torch.stack(logits[:half]), rtol=0, atol=1e-4)


@two_gpus
@pytest.mark.parametrize("places", [(1, 0), (1, 1)])
def test_the_current_device_does_not_matter(places: tuple[int, int]) -> None:
    """The inputs may be on the second GPU, and so may the whole model. `padded_inputs` are on the first."""
    expected = _of_one_gpu("llama")
    model = _placed("llama", *places) if places[0] != places[1] else build_model("llama").to("cuda:1").eval()
    cache = SpinCache(model, **FULL)
    given = {name: tensor.to("cuda:1") for name, tensor in padded_inputs().items()}
    actual = model.generate(
        **given,
        past_key_values=cache,
        max_new_tokens=40,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    actual.sequences = actual.sequences.to("cuda:0")
    _assert_same(actual, expected)
    assert _graphs(cache) == 1, cache.calls.steps.refused


@two_gpus
def test_later_caches_and_forks_replay_the_same_graph() -> None:
    model = _placed("llama")
    first = SpinCache(model, "shadowkv", **SPARSE)
    expected = generate_short(model, first)
    second = SpinCache(model, "shadowkv", **SPARSE)
    _assert_same(generate_short(model, second), expected)
    assert _graphs(second) == 1
    token = torch.full((2, 1), 5, device="cuda:0")
    with torch.no_grad():
        twin = second.fork()
        torch.testing.assert_close(
            model(token, past_key_values=twin).logits, model(token, past_key_values=second).logits, rtol=0, atol=1e-4
        )
    twin.check_integrity()


@two_gpus
@pytest.mark.parametrize("gpu_memory", ["auto", "50kB"])
def test_a_saved_cache_goes_on_on_two_gpus(gpu_memory: str, tmp_path: Path) -> None:
    whole, model = build_model("llama").cuda().eval(), _placed("llama")
    token = torch.full((2, 1), 5, device="cuda:0")

    @torch.no_grad()
    def steps(model: Any, cache: SpinCache) -> torch.Tensor:
        return torch.cat([model(token, past_key_values=cache).logits.to("cuda:0") for _ in range(6)], 1)

    cache = SpinCache(whole, "shadowkv", **SPARSE)
    with torch.no_grad():
        whole(**padded_inputs(), past_key_values=cache)
    cache.save_pretrained(tmp_path / "one")
    expected = steps(whole, cache)
    loaded = SpinCache.from_pretrained(tmp_path / "one", model, gpu_memory=gpu_memory)
    loaded.save_pretrained(tmp_path / "two")
    torch.testing.assert_close(steps(model, loaded), expected, rtol=0, atol=1e-4)
    assert [layer.store.device.index for layer in loaded.paged_layers if layer.store is not None] == [0, 1]
    back = SpinCache.from_pretrained(tmp_path / "two", whole, gpu_memory="auto")
    torch.testing.assert_close(steps(whole, back), expected, rtol=0, atol=1e-4)
    loaded.check_integrity()


@two_gpus
def test_memory_is_planned_and_given_back_by_device() -> None:
    model = _placed("llama")
    made = plan(model, context_length=150, batch_size=2)
    assert set(made.device_parts) == {"cuda:0", "cuda:1"}
    cache = SpinCache(model, "shadowkv", **SPARSE)
    generate_short(model, cache)
    assert cache.release_gpu_memory() > 0
    token = torch.full((2, 1), 5, device="cuda:0")
    with torch.no_grad():
        for _ in range(4):
            model(token, past_key_values=cache)
    cache.check_integrity()


@two_gpus
def test_a_capture_that_fails_decodes_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that is broken in the middle, while streams of both GPUs are captured. The next model is captured."""
    model = _placed("llama")
    expected = generate_short(model, SpinCache(model, **FULL))
    broken, record = _placed("llama"), Recorder.record

    def reads(self: Recorder, step: Any) -> Any:
        return record(self, lambda: (step(), torch.cuda.synchronize()))

    monkeypatch.setattr(Recorder, "record", reads)
    cache = SpinCache(broken, **FULL)
    with _warnings(caplog) as messages:
        _assert_same(generate_short(broken, cache), expected)
    assert len([message for message in messages if "capturing failed" in message]) == 1
    monkeypatch.setattr(Recorder, "record", record)
    again = _placed("llama")
    cache = SpinCache(again, **FULL)
    _assert_same(generate_short(again, cache), expected)
    assert _graphs(cache) == 1, cache.calls.steps.refused
