"""Distillation: the loss against loops over float64, stopped runs that go on exactly, and what trained gates choose."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from spin_hf import OptionError, SeerAttention, SpinCache, SpinError
from spin_hf.attention.methods.seer_gate_file import load_gates
from spin_hf.distill.teacher import Seen, Teacher
from spin_hf.distill.train import Settings, _draw, distill, gate_loss, main, untrained
from tests.attention.oracle import _turn
from tests.support.zoo import build_model

SETTINGS = Settings(steps=12, tokens=192, lr=5e-3, block=16, queries=48, recent_window=16)


def text(length: int = 3000, seed: int = 0) -> Tensor:
    """Tokens of a Markov chain, which repeat themselves as texts do."""
    generator = torch.Generator().manual_seed(seed)
    follows = torch.randint(3, 128, (128, 4), generator=torch.Generator().manual_seed(99))
    ids = [3]
    for choice in torch.randint(4, (length - 1,), generator=generator).tolist():
        ids.append(int(follows[ids[-1], choice]))
    return torch.tensor(ids)


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "distill.json").read_text())


def test_the_loss_is_the_divergence_from_normalised_page_attention() -> None:
    heads, group, length, dim, block = 2, 3, 130, 8, 16
    generator = torch.Generator().manual_seed(0)
    seen = Seen(
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
            turned = [_turn(queries[h, g, position], -position, angles, False) for g in range(group)]
            asked = sum(q @ m for q, m in zip(turned, gate.query[h].double().numpy(), strict=True))
            asked = _turn(asked, position, gate.gate_frequencies.tolist(), False)
            logits = {}
            for page in pages:
                inside = [_turn(keys[h, t], -t, angles, False) for t in range(page * block, (page + 1) * block)]
                inside = torch.tensor(inside).numpy()
                pooled = [*inside.max(0), *inside.min(0), *inside.mean(0)]
                made = torch.tensor(pooled).double().numpy() @ gate.key[h].double().numpy()
                made = _turn(made, page * block, gate.gate_frequencies.tolist(), False)
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

    def see(layer: int, seen: Seen) -> None:
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
    """Share of the candidates' attention that falls on the `pages` best pages by `gates`, summed over the group."""
    shares: list[Tensor] = []
    positions = torch.arange(100, len(ids), 7)

    def see(layer: int, seen: Seen) -> None:
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


# -------------------------------------------------------------------------------------------------------------- refusals


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=1)
    distill(build_model("llama"), text(), tmp_path, settings)
    with pytest.raises(OptionError, match=r"output: expected an empty folder .*settings: .*pass another --output"):
        distill(build_model("llama"), text(), tmp_path, replace(settings, seed=1))
    with pytest.raises(OptionError, match="about: "):
        distill(build_model("llama"), text(seed=1), tmp_path, settings)


SETTINGS_THAT_CANNOT_WORK: list[tuple[dict[str, Any], str]] = [
    (dict(block=8), "block: expected one of"), (dict(block=16.0), "block: expected an int"),
    (dict(block=True), "block: expected an int"), (dict(steps=-1), "steps: expected at least 0, got -1"),
    (dict(steps=10**5000), "steps: expected at most"), (dict(steps=True), "steps: expected an int"),
    (dict(tokens=100), "tokens: expected at least 160, got 100"), (dict(tokens=4096.0), "tokens: expected an int"),
    (dict(tokens="4096"), "tokens: expected an int"), (dict(recent_window=2**30), "tokens: expected at least 1073741920"),
    (dict(queries=2**64), "queries: expected at most"), (dict(queries=0), "queries: expected at least 1"),
    (dict(lr=0.0), "lr: expected more than 0"), (dict(lr=-1.0), "lr: expected more than 0"),
    (dict(lr=float("nan")), "lr: expected more than 0 and at most 1, got nan"), (dict(lr="1"), "lr: expected a float"),
    (dict(lr=float("inf")), "lr: expected more than 0 and at most 1, got inf"), (dict(lr=10**400), "lr: .* got inf"),
    (dict(lr=True), "lr: expected a float"), (dict(lr=None), "lr: expected a float"),
    (dict(gate_dim=5), "gate_dim: expected an even number"), (dict(gate_dim=0), "gate_dim: expected at least 2"),
    (dict(gate_dim=2**40), "gate_dim: expected at most 4096"), (dict(gate_dim="64"), "gate_dim: expected an int"),
    (dict(seed=-1), "seed: expected at least 0"), (dict(seed=2**64), "seed: expected at most"),
    (dict(seed=1.0), "seed: expected an int"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), SETTINGS_THAT_CANNOT_WORK, ids=range(len(SETTINGS_THAT_CANNOT_WORK)))
def test_settings_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpinError, match=message):
        Settings(**options)


def test_settings_of_numpy(tmp_path: Path) -> None:
    """They are written as JSON, so they become plain numbers."""
    numbers: tuple[Any, ...] = (np.int64(1), np.int32(192), np.float32(0.5), np.int8(16), np.int64(6))
    given = Settings(*numbers, np.int64(8), np.int8(4), np.int8(16), np.int64(3))  # type: ignore[arg-type]
    assert given == Settings(1, 192, 0.5, 16, 6, 8, 4, 16, 3)
    distill(build_model("llama"), text(), tmp_path, given)
    assert report(tmp_path)["settings"]["lr"] == 0.5


@pytest.mark.parametrize("number", [0, -1, True, 1.5, float("nan"), "50"])
def test_steps_between_two_states(number: Any, tmp_path: Path) -> None:
    with pytest.raises(SpinError, match="save_every: expected"):
        distill(build_model("llama"), text(), tmp_path / "none", SETTINGS, save_every=number)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("ids", [text()[None], text().float(), text().int()])
def test_ids_of_another_form(ids: Tensor, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"ids: expected \[tokens\], int64, got"):
        distill(build_model("llama"), ids, tmp_path / "none", SETTINGS)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("wrong", ["loss", "weights"])
def test_training_that_diverges(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last gates that were saved stay, and can be read."""
    import spin_hf.distill.train as command

    forward, adam_step = command._forward, torch.optim.Adam.step

    def losing(*args: Any, backward: bool) -> float:
        loss = forward(*args, backward=backward)
        return float("nan") if backward and wrong == "loss" else loss

    def stepping(self: Any) -> None:
        adam_step(self)
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[0] = float("inf") if wrong == "weights" else 0.0

    monkeypatch.setattr(command, "_forward", losing)
    monkeypatch.setattr(torch.optim.Adam, "step", stepping)
    with pytest.raises(OptionError, match=r"expected .* got .*lower --lr"):
        distill(build_model("llama"), text(), tmp_path, replace(SETTINGS, steps=1))
    assert report(tmp_path)["losses"] == []
    left = load_gates(tmp_path).layers
    monkeypatch.undo()
    distill(build_model("llama"), text(), tmp_path / "none", replace(SETTINGS, steps=0))
    assert left[0].key.equal(load_gates(tmp_path / "none").layers[0].key)


@pytest.mark.parametrize("name", ["distill.json", "state.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 100, b"[]", b"[" * 100_000, b'{"settings": 3}'], ids=range(6))
def test_a_run_that_is_damaged(name: str, content: bytes, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=1)
    distill(build_model("llama"), text(), tmp_path, settings)
    before = (tmp_path / "gates.safetensors").read_bytes()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        OptionError, match=rf"(?s)output: expected a run that can go on in .*, got a damaged {name}.*; delete"
    ):
        distill(build_model("llama"), text(), tmp_path, settings)
    assert (tmp_path / "gates.safetensors").read_bytes() == before
    (tmp_path / name).unlink()
    if name == "distill.json":
        with pytest.raises(OptionError, match=r"got a damaged distill\.json"):
            distill(build_model("llama"), text(), tmp_path, settings)


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"text: expected at least 384 tokens, .* got 300; give more text"):
        distill(build_model("llama"), text(300), tmp_path / "none", SETTINGS)
    assert not (tmp_path / "none").exists()


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A tiny model with a tokenizer, as a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "model")
    build_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = tmp_path / "text.txt", tmp_path / "gates"
    file.write_text(" ".join(f"w{token}" for token in text(1200).tolist()))
    command = [str(model_folder), "--text", str(file), "--output", str(output), "--steps", "3", "--tokens", "192"]
    command += ["--block", "16", "--recent", "16", "--queries", "32", "--device", "cpu"]
    main(command)
    assert "held-out loss" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(model_folder)(file.read_text()).input_ids == text(1200).tolist()
    SpinCache(build_model("llama"), SeerAttention(output, page_size=16))
    binary, empty = tmp_path / "binary.txt", tmp_path / "empty.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    empty.touch()
    for wrong, message in (
        ([*command, "--seed", "3"], "pass another --output"),
        ([*command, "--convert", str(tmp_path)], "and not both"),
        ([str(model_folder), "--text", "missing.txt", "--output", str(output)], "missing.txt"),
        ([*command, "--lr", "nan"], "lr: expected more than 0 and at most 1, got nan"),
        ([*command, "--save-every", "0"], "save_every: expected at least 1, got 0"),
        ([*command, "--device", "abacus"], 'device: expected "auto"'),
        ([*command, "--device", "cuda:99"], "device: expected"),
        ([str(model_folder), "--text", str(binary), "--output", str(output)], "text: expected UTF-8 in"),
        ([str(model_folder), "--text", str(empty), "--output", str(output)], "text: expected at least"),
        (
            ["none", "--convert", str(tmp_path / "none"), "--output", str(tmp_path / "new")],
            "convert: expected config.json",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
