"""`generate` compiles the forward: one graph for all steps and caches, in whose replays no Python of the package runs.

The backend replaces CUDA graphs: from the second call on it runs the compiled forward with every op as its launches alone.
"""

from __future__ import annotations

import os
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache

import spin_hf.kernels
from spin_hf import Bisection, SpinCache
from spin_hf.layer import SpinLayer
from tests.support.clustering_methods import clustering_often, little_slack
from tests.support.graph_recorder import capture_on_cpu
from tests.support.seer_gates import gates_for
from tests.support.zoo import PAD_TOKEN_ID, build_model

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="tests/gpu compiles for a GPU"),
]

PROMPT = 25
OPTIONS: dict[str, Any] = {"method": "shadowkv", "budget": 16, "recent_window": 8}


class Replays:
    """A backend whose graphs launch and do nothing else, once they have run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        capture_on_cpu(monkeypatch)
        monkeypatch.setattr(spin_hf.graph.model_calls, "may_be_captured", lambda model: False)
        monkeypatch.setattr(spin_hf.kernels, "on_gpu", lambda: True)
        self.patch, self.count, self.graphs = monkeypatch, 0, 0
        torch._dynamo.reset()
        counters.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Replays:
        return self

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        calls = 0

        def run(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                return module(*args)
            self.count += 1
            with self.patch.context() as patch:
                patch.setattr(SpinLayer, "launch", _only_launch)
                return module(*args)

        return run

    @property
    def config(self) -> CompileConfig:
        config = CompileConfig(fullgraph=True, backend=self, mode=None)
        config._compile_all_devices = True
        return config


def _only_launch(
    self: SpinLayer, query: Any, key: Any, value: Any, sinks: Any, out: Any, append: Any, *rest: Any
) -> None:
    call = spin_hf.layer.Call(query.unflatten(1, (key.shape[1], -1)), *rest, sinks)
    self._launch(call, key, value, append, out)


def _inputs(padded: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 100, (1 + padded, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :9], mask[0, :9] = PAD_TOKEN_ID, 0
    return {"input_ids": ids, "attention_mask": mask}


def _model() -> Any:
    model = build_model("llama").eval()
    del model.model.layers[2:]  # interpreted kernels are slow
    model.config.num_hidden_layers = 2
    return model


def _generate(model: Any, cache: Any, padded: bool = False, **options: Any) -> Any:
    return model.generate(
        **_inputs(padded), past_key_values=cache, return_dict_in_generate=True, output_logits=True,
        **{"max_new_tokens": 4, "do_sample": False} | options,
    )  # fmt: skip


def test_tokens_are_clustered_between_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that the steps complete are summarised after them. One graph serves all of it."""
    method, model = clustering_often(Bisection, 16, 8)(2), _model()
    reference = SpinCache(model.config, **OPTIONS | {"method": method})
    with little_slack():
        expected = _generate(model, reference, max_new_tokens=18)
        replays = Replays(monkeypatch)
        cache = SpinCache(model.config, **OPTIONS | {"method": method})
        assert cache.is_compileable
        actual = _generate(model, cache, compile_config=replays.config, max_new_tokens=18)
    assert (replays.graphs, replays.count) == (1, 16)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)
    assert len(cache._shared.sequences.stretches.stops) > 1
    cache.check_integrity()


@pytest.mark.sweep(keep=[1])
@pytest.mark.parametrize("padded", [False, True])
def test_generate_compiles_once(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    replays, model = Replays(monkeypatch), _model()
    caches, outputs = [], []
    for options in ({"disable_compile": True}, {"compile_config": replays.config}):
        cache = SpinCache(model.config, **OPTIONS)
        assert cache.is_compileable
        outputs.append(_generate(model, cache, padded, **options))
        cache.check_integrity()
        caches.append(cache)
    assert (replays.graphs, replays.count) == (1, 2)
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert torch.equal(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits))
    assert str(caches[0].stats()) == str(caches[1].stats())
    assert caches[1].get_seq_length() == PROMPT + 3


def test_one_graph_serves_one_cache_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    replays, model = Replays(monkeypatch), _model()
    sequences = []
    for _ in range(3):
        cache = SpinCache(model.config, **OPTIONS)
        sequences.append(_generate(model, cache, compile_config=replays.config).sequences)
        cache.check_integrity()
        del cache
    assert replays.graphs == 1
    assert replays.count == 3 * 3 - 1
    assert torch.equal(sequences[0], sequences[1])
    assert torch.equal(sequences[0], sequences[2])


def test_one_graph_serves_caches_of_the_same_gates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A graph reads gates where they are: others, in the same file, have another."""
    monkeypatch.setattr(
        "spin_hf.attention.methods.seer_gate_file._SETTLED_NS", -1
    )  # files are remembered as soon as they are written
    replays, model = Replays(monkeypatch), _model()
    method = gates_for(model, tmp_path)
    expected = _generate(model, SpinCache(model.config, method), disable_compile=True).sequences
    for graphs in (1, 1, 2):
        if graphs == 2:
            gates_for(model, tmp_path, seed=1)
        cache = SpinCache(model.config, method)
        assert torch.equal(_generate(model, cache, compile_config=replays.config).sequences, expected)
        assert replays.graphs == graphs
        cache.check_integrity()
        del cache


def _mask(model: Any, cache: SpinCache) -> Any:
    """What `generate` does before a step: the mask of one more token."""
    ones = torch.ones((1, cache.get_seq_length() + 1), dtype=torch.int64)
    inputs = model.prepare_inputs_for_generation(TOKEN, past_key_values=cache, attention_mask=ones, use_cache=True)
    return inputs["attention_mask"]


TOKEN = torch.tensor([[7]])


@torch.no_grad()
def test_what_a_compiled_forward_did_counts_only_if_it_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches in turn, a forward that fails, one that never comes, one that comes twice, and one of several tokens."""
    replays, model = Replays(monkeypatch), _model()
    forward = torch.compile(model.forward, fullgraph=True, backend=replays)
    ids = _inputs()["input_ids"]
    parts: dict[str, list[torch.Tensor]] = {}
    for name in ("eager", "compiled"):
        step = forward if name == "compiled" else model.forward
        one, two = SpinCache(model.config, **OPTIONS), SpinCache(model.config, **OPTIONS)
        logits = [model(prompt, past_key_values=cache).logits for cache, prompt in ((one, ids), (two, ids.flip(1)))]
        for cache in (one, two, one, two):
            logits.append(step(TOKEN, attention_mask=_mask(model, cache), past_key_values=cache).logits)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="in the middle"):
            patch.setattr(SpinLayer, "_launch", _fail)
            step(TOKEN, attention_mask=_mask(model, one), past_key_values=one)
        assert one.get_seq_length() == PROMPT + 2
        _mask(model, one)
        mask = _mask(model, one)  # the one before was for nothing
        logits.append(step(TOKEN, attention_mask=mask, past_key_values=one).logits)
        logits.append(step(TOKEN, attention_mask=mask, past_key_values=one).logits)
        _mask(model, two)
        two.crop(-1)
        assert two.get_seq_length() == PROMPT + 1
        _mask(model, two)
        logits.append(model(ids[:, :3], past_key_values=two).logits)
        for cache, length in ((one, PROMPT + 4), (two, PROMPT + 4)):
            assert cache.get_seq_length() == length
            cache.check_integrity()
        parts[name] = logits
    for call, (ours, theirs) in enumerate(zip(parts["compiled"], parts["eager"], strict=True)):
        assert torch.equal(ours, theirs), call
    assert replays.count > 0


def _dense(mask: torch.Tensor) -> torch.Tensor:
    """As `generate` hands a mask to a compiled forward: with strides that stay."""
    return mask.clone(memory_format=torch.contiguous_format)


@pytest.mark.sweep(keep=[1])
@torch.no_grad()
@pytest.mark.parametrize(("heads", "graphs"), [("right", 1), ("wrong", 2), ("unknown", 2)])
def test_a_cache_that_was_taken_over_or_copied(heads: str, graphs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first step is compiled as all later ones; a config that is wrong about its heads costs another graph, no more."""
    replays, model = Replays(monkeypatch), _model()
    forward = torch.compile(model.forward, fullgraph=True, backend=replays)
    source = DynamicCache(config=model.config)
    model(_inputs()["input_ids"], past_key_values=source)
    logits = []
    for step in (forward, model.forward):  # in this order: kernels that an earlier cache leaves behind have buffers
        cache = SpinCache.from_cache(source, model.config, **OPTIONS)
        if step is forward:
            cache._shared.query_heads *= {"right": 1, "wrong": 2, "unknown": 0}[heads]
        parts = [
            step(TOKEN, attention_mask=_dense(_mask(model, cache)), past_key_values=cache).logits for _ in range(4)
        ]
        if step is forward:
            assert replays.graphs == graphs
        cache.check_integrity()
        twin = deepcopy(cache)
        parts += [step(TOKEN, attention_mask=_dense(_mask(model, twin)), past_key_values=twin).logits for _ in range(2)]
        twin.check_integrity()
        logits.append(torch.cat(parts, 1))
        del cache, twin
    assert torch.equal(*logits)


def _fail(*args: Any) -> None:
    raise RuntimeError("in the middle")
