"""Distillation: the loss against loops over float64, stopped runs that continue exactly, and what trained gates select."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from spin_hf import SeerAttention, SpinCache
from spin_hf.attention.methods.seer_gate_file import load_gates
from spin_hf.distill.teacher import LayerAttention, Teacher
from spin_hf.distill.train import Settings, _draw, distill, gate_loss, untrained
from tests.support.distillation import SETTINGS, report, text
from tests.support.oracle import turn
from tests.support.zoo import build_model


def test_the_loss_is_the_divergence_from_normalised_page_attention() -> None:
    heads, group, length, dim, block = 2, 3, 130, 8, 16
    generator = torch.Generator().manual_seed(0)
    seen = LayerAttention(
        torch.randn((heads, group, length, dim), generator=generator),
        torch.randn((heads, length, dim), generator=generator), 0.5, None,
    )  # fmt: skip
    teacher = Teacher(build_model("llama"))
    gate = untrained(teacher, teacher.find_rotations(7), SETTINGS, 7)[0]
    angles = [1.0, 0.2, 0.05]
    gate = replace(
        gate, key=torch.randn((heads, 3 * dim, 6), generator=generator) / 5, frequencies=torch.tensor(angles),
        query=torch.randn((heads, group, dim, 6), generator=generator) / 5, gate_frequencies=torch.tensor([0.5, 0.1, 0.02]),
    )  # fmt: skip
    settings = replace(SETTINGS, block=block, num_sink_tokens=5, recent_window=20)
    positions = torch.tensor([70, 95, 129])
    expected = []
    keys, queries = seen.keys.double().numpy(), seen.queries.double().numpy()
    for h in range(heads):
        for position in positions.tolist():
            pages = [p for p in range(length // block) if p * block >= 5 and (p + 1) * block - 1 < position - 19]
            largest = dict.fromkeys(pages, 0.0)
            for g in range(group):
                weights = [math.exp(0.5 * float(queries[h, g, position] @ keys[h, t])) for t in range(position + 1)]
                for page in pages:
                    best = max(weights[page * block : (page + 1) * block]) / sum(weights)
                    largest[page] = max(largest[page], best)
            turned = [turn(queries[h, g, position], -position, angles, False) for g in range(group)]
            asked = sum(q @ m for q, m in zip(turned, gate.query[h].double().numpy(), strict=True))
            asked = turn(asked, position, gate.gate_frequencies.tolist(), False)
            logits = {}
            for page in pages:
                inside = [turn(keys[h, t], -t, angles, False) for t in range(page * block, (page + 1) * block)]
                inside = torch.tensor(inside).numpy()
                pooled = [*inside.max(0), *inside.min(0), *inside.mean(0)]
                made = torch.tensor(pooled).double().numpy() @ gate.key[h].double().numpy()
                made = turn(made, page * block, gate.gate_frequencies.tolist(), False)
                logits[page] = float(made @ asked) / math.sqrt(6)
            total = sum(math.exp(logit) for logit in logits.values())
            share = {page: largest[page] / sum(largest.values()) for page in pages}
            expected.append(sum(s * (math.log(s) - logits[p] + math.log(total)) for p, s in share.items()))
    assert len(pages) > 4
    actual = gate_loss(gate, seen, positions, settings)
    assert float(actual) == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_candidates_are_those_of_a_cache() -> None:
    """Of every query position, the pages that the cache's plan calls candidates."""
    from spin_hf import kernels

    settings = replace(SETTINGS, num_sink_tokens=17, recent_window=21)
    positions = torch.arange(100)
    ours = settings.candidates(positions, 7)
    for position in range(100):
        valid = (torch.arange(112) <= position).view(1, 7, 16).sum(2)
        _, candidates = kernels.page_zones(valid, 17, 21)
        assert torch.equal(ours[position], candidates[0])
    assert int(ours[settings.first_position].sum()) == 2
    assert int(ours[settings.first_position - 1].sum()) == 1


@pytest.mark.parametrize("family", ["llama", "glm4", "phi3"])
def test_untrained_gates_compare_mean_keys(family: str) -> None:
    """Before training a gate is the mean query against the mean key, rotated as the model does: on one token, exactly."""
    teacher = Teacher(build_model(family))
    gates = untrained(teacher, teacher.find_rotations(7), SETTINGS, 7)
    ids = torch.randint(3, 128, (64,), generator=torch.Generator().manual_seed(0))
    checked = []

    def see(layer: int, seen: LayerAttention) -> None:
        keys = seen.keys[None, :, :, None]  # pages of one token: largest, smallest and mean are the key
        places = torch.arange(64).view(1, 1, 64, 1)
        made = gates[layer].of_pages(keys, torch.ones_like(places, dtype=torch.bool), places)[0]
        asked = gates[layer].of_queries(seen.queries.permute(2, 0, 1, 3), torch.arange(64))
        products = torch.einsum("qhe,hne->hqn", asked, made) / math.sqrt(made.shape[-1])
        expected = (seen.queries @ seen.keys.unsqueeze(1).transpose(-1, -2) * seen.scale).mean(1)
        assert torch.allclose(products, expected, atol=1e-4)
        checked.append(layer)

    teacher.watch(ids, see)
    assert checked == teacher.layers


@pytest.mark.parametrize(("gate_dim", "share"), [(None, 0.95), (12, 0.6)])
def test_training_lowers_the_loss_on_text_that_is_held_out(gate_dim: int | None, share: float, tmp_path: Path) -> None:
    """Much for gates that begin at random; for those that compare means little, as this model's weights are random."""
    distill(build_model("llama"), text(), tmp_path, replace(SETTINGS, steps=60, lr=1e-2, gate_dim=gate_dim))
    found = report(tmp_path)
    losses, held_out = found["losses"], found["held_out"]
    assert len(losses) == 60
    assert sum(losses[-10:]) < share * sum(losses[:10])
    assert held_out["after"] < share * held_out["before"]
    lines = (tmp_path / "loss.csv").read_text().splitlines()
    assert lines[0] == "step,loss"
    assert len(lines) == 61


def test_every_step_has_its_own_window_and_queries() -> None:
    draws = [_draw(torch.arange(3000), SETTINGS, step) for step in range(-2, 20)]
    assert len({int(window[0]) for window, _ in draws}) > 18
    assert len({tuple(positions.tolist()) for _, positions in draws}) == 22
    for window, positions in draws:
        assert len(window) == SETTINGS.tokens
        assert len(set(positions.tolist())) == SETTINGS.queries
        assert SETTINGS.first_position <= int(positions[0]) <= int(positions[-1]) < SETTINGS.tokens


def _contents(path: Path) -> tuple[dict[str, str] | None, dict[str, bytes]]:
    """Metadata, and the bytes of each tensor."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return file.metadata(), {name: t.reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def test_a_run_that_was_stopped_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import spin_hf.distill.train as command

    model = build_model("llama")
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=count(0, 10).__next__))
    distill(model, text(), tmp_path / "whole", SETTINGS, save_every=5)

    class StopError(Exception):
        pass

    forward, calls = command._forward, []

    def stopping(*args: Any, **kwargs: Any) -> float:
        calls.append(kwargs["backward"])
        if calls.count(True) == 8:  # after step 7: two steps are lost
            raise StopError
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(StopError):
        patch.setattr(command, "_forward", stopping)
        distill(model, text(), tmp_path / "stopped", SETTINGS, save_every=5)
    assert len(report(tmp_path / "stopped")["losses"]) == 5
    first = report(tmp_path / "stopped")["seconds"]
    distill(model, text(), tmp_path / "stopped", SETTINGS, save_every=5)
    stopped, whole = report(tmp_path / "stopped"), report(tmp_path / "whole")
    assert stopped.pop("seconds") > first > 0
    assert whole.pop("seconds") > 0
    assert stopped == whole
    assert stopped["device"] == "cpu"
    for name in ("gates.safetensors", "state.safetensors"):  # whose metadata stand in any order
        there, here = (_contents(tmp_path / run / name) for run in ("stopped", "whole"))
        assert there == here
    assert (tmp_path / "stopped" / "loss.csv").read_bytes() == (tmp_path / "whole" / "loss.csv").read_bytes()


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=2)
    distill(build_model("llama"), text(), tmp_path, settings)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sorted(before) == ["distill.json", "gates.safetensors", "loss.csv", "state.safetensors"]
    made = distill(build_model("llama"), text(), tmp_path, settings)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert torch.equal(made.layers[1].key.detach(), load_gates(tmp_path).layers[1].key)


def test_no_steps_give_the_gates_to_begin_with(tmp_path: Path) -> None:
    model = build_model("llama")
    distill(model, text(), tmp_path, replace(SETTINGS, steps=0))
    teacher = Teacher(model)
    expected = untrained(teacher, teacher.find_rotations(3), SETTINGS, 3)
    for layer, gate in load_gates(tmp_path).layers.items():
        assert torch.equal(gate.key, expected[layer].key.detach())
        assert torch.equal(gate.query, expected[layer].query.detach())
    found = report(tmp_path)
    assert found["losses"] == []
    assert found["held_out"]["before"] == found["held_out"]["after"]
    distill(model, text(), tmp_path, replace(SETTINGS, steps=0))  # finished already


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "glm4", "smollm3", "gemma4_text"])
def test_gates_serve_the_model_they_were_made_for(family: str, tmp_path: Path) -> None:
    """From training to generation: sliding layers, layers without rotation, neighbouring pairs, gates of another width."""
    model = build_model(family)
    settings = replace(SETTINGS, steps=2, gate_dim=12 if family == "qwen3" else None)
    distill(model, text(), tmp_path, settings)
    method = SeerAttention(tmp_path, page_size=16)
    ids = text(120)[None]
    arguments = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(ids, **arguments)
    exact, sparse = SpinCache(model, method, budget=112), SpinCache(model, method, budget=16, recent_window=16)
    assert torch.equal(model.generate(ids, **arguments, past_key_values=exact), expected)
    assert exact.stats().sparse_queries
    model.generate(ids, **arguments, past_key_values=sparse)
    assert sparse.stats().attended_tokens < 70
    for cache in (exact, sparse):
        cache.check_integrity()


def kept_mass(model: PreTrainedModel, gates: dict[int, Any], ids: Tensor, settings: Settings, pages: int) -> float:
    """Fraction of the candidates' attention on the `pages` best pages by `gates`, summed over the group."""
    shares: list[Tensor] = []
    positions = torch.arange(100, len(ids), 7)

    def see(layer: int, seen: LayerAttention) -> None:
        number = len(ids) // settings.block
        places = torch.arange(number * settings.block).view(1, 1, number, settings.block)
        paged = seen.keys[None, :, : places.numel()].unflatten(2, places.shape[2:])
        made = gates[layer].of_pages(paged, torch.ones_like(places, dtype=torch.bool), places)[0]
        asked = gates[layer].of_queries(seen.queries[:, :, positions].permute(2, 0, 1, 3), positions)
        candidates = settings.candidates(positions, number)
        scores = torch.einsum("qhe,hne->hqn", asked, made).masked_fill(~candidates, float("-inf"))
        logits = seen.queries[:, :, positions] @ seen.keys.unsqueeze(1).transpose(-1, -2) * seen.scale
        logits = logits.masked_fill(torch.arange(len(ids)) > positions[:, None], float("-inf"))
        weights = logits.softmax(-1)[..., : places.numel()].unflatten(-1, places.shape[2:]).sum((1, -1)) * candidates
        shares.append((weights.gather(-1, scores.topk(pages, -1).indices).sum(-1) / weights.sum(-1)).mean())

    Teacher(model).watch(ids, see)
    return float(torch.stack(shares).mean())


def test_trained_gates_keep_more_attention_than_untrained_ones(tmp_path: Path) -> None:
    """At the same number of pages, on text that was not trained on; against random gates, whose choice is chance."""
    model = build_model("llama")
    settings = replace(SETTINGS, steps=200, lr=3e-2, gate_dim=32, queries=96)
    trained = distill(model, text(6000), tmp_path, settings).layers
    teacher = Teacher(model)
    random = untrained(teacher, teacher.find_rotations(7), settings, 7)
    with torch.no_grad():
        ours, theirs = (kept_mass(model, gates, text(192, seed=5), settings, 3) for gates in (trained, random))
    assert ours > theirs + 0.06, (ours, theirs)
