"""Distillation that cannot work is refused with the remedy, and saved files do not change. And the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from spin_hf import OptionError, SeerAttention, SpinCache, SpinError
from spin_hf.attention.methods.seer_gate_file import load_gates
from spin_hf.distill.train import Settings, distill, main
from tests.support.distillation import SETTINGS, report, text
from tests.support.zoo import build_model


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
