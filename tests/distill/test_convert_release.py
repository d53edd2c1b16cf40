"""The authors' gates: a folder in their format, written here from the names and shapes of their code; and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_hf import OptionError, SeerAttention, SpinCache, UnsupportedModelError
from spin_hf.distill.convert_release import read_release
from spin_hf.distill.teacher import Teacher
from tests.support.zoo import build_model


def write(folder: Path, prefix: str = "attngate", width: int = 16, **config: Any) -> dict[str, torch.Tensor]:
    weights = {}
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.attn_gate.{prefix}_linear"
        weights[f"{name}_k.weight"] = torch.randn(2, 48, width, dtype=torch.bfloat16)
        weights[f"{name}_q.weight"] = torch.randn(2, 2, 16, width, dtype=torch.bfloat16)
    torch.save(weights, folder / "attn_gate_weights.pth")
    (folder / "config.json").write_text(json.dumps({"seerattn_gate_block_size": 64, **config}))
    return weights


@pytest.mark.parametrize("prefix", ["mask", "attngate"])
def test_a_folder_in_the_authors_form(prefix: str, tmp_path: Path) -> None:
    weights = write(tmp_path, prefix)
    model = build_model("llama")
    gates = read_release(tmp_path).gates(Teacher(model))
    gates.save(tmp_path / "gates.safetensors")
    assert gates.page_size == 64
    for layer, gate in gates.layers.items():
        name = f"model.layers.{layer}.self_attn.attn_gate.{prefix}_linear"
        assert torch.equal(gate.key, weights[f"{name}_k.weight"].float())
        assert torch.equal(gate.query, weights[f"{name}_q.weight"].float())
        assert torch.allclose(gate.gate_frequencies, 10_000.0 ** (-torch.arange(8) / 8))
    cache = SpinCache(model, SeerAttention(tmp_path, page_size=64), budget=64, recent_window=8)
    model.generate(torch.arange(3, 103)[None].repeat(1, 3), max_new_tokens=4, past_key_values=cache, eos_token_id=None)
    assert cache.stats().attended_tokens < 210


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(seerattn_k_seq_pooling_type="Kavg"), "Kmaxminavg.*got.*Kavg"),
        (dict(seerattn_use_qk_norm=True), "seerattn_use_qk_norm': False"),
        (dict(width=12), r"layer 0: expected matrices .*\(2, 48, 16\).*got.*\(2, 48, 12\)"),
        (dict(prefix="other"), "expected gate matrices in .* got 'model.layers.0"),
    ],
)
def test_other_forms_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, **options)
    with pytest.raises(OptionError, match=message):
        read_release(tmp_path).gates(Teacher(build_model("llama")))


def test_missing_and_harmful_files(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"expected config\.json .* got none"):
        read_release(tmp_path).gates(Teacher(build_model("llama")))
    write(tmp_path)
    torch.save({"a": Teacher}, tmp_path / "attn_gate_weights.pth")  # a pickle that names code
    with pytest.raises(OptionError, match=r"expected tensors in attn_gate_weights\.pth"):
        read_release(tmp_path).gates(Teacher(build_model("llama")))


def refused(folder: Path, message: str) -> None:
    """By reading alone, before there is a model."""
    with pytest.raises(OptionError, match=message) as raised:
        read_release(folder)
    assert len(str(raised.value)) < 1500


CONFIGS: dict[str, bytes] = {
    "empty": b"", "broken": b"{", "no text": b"\xff\xfe\x00", "a list": b"[]", "null": b"null", "nested": b"[" * 100_000,
    "a huge int": b'{"seerattn_gate_block_size": ' + b"9" * 6000 + b"}", "block 0": b'{"seerattn_gate_block_size": 0}',
    "block 128": b'{"seerattn_gate_block_size": 128}', "block text": b'{"seerattn_gate_block_size": "64"}',
    "block true": b'{"seerattn_gate_block_size": true}', "block nan": b'{"seerattn_gate_block_size": NaN}',
    "block null": b'{"seerattn_gate_block_size": null}', "block 64.0": b'{"seerattn_gate_block_size": 64.0}',
}  # fmt: skip


@pytest.mark.parametrize("content", CONFIGS.values(), ids=CONFIGS)
def test_configs(content: bytes, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    refused(tmp_path, r"(?s)convert: expected (a )?(JSON|seerattn_gate_block_size).*, got .*; (download|distill)")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_weights_that_were_cut(share: float, tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "attn_gate_weights.pth"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    refused(tmp_path, r"(?s)convert: expected tensors in attn_gate_weights\.pth, got .*; download it again")


NAME = "model.layers.0.self_attn.attn_gate.attngate_linear_"
OTHER = NAME.replace("attngate_", "mask_")
WEIGHTS: dict[str, Any] = {
    "a tensor": torch.zeros(3), "a list": [torch.zeros(3)], "numbers as names": {3: torch.zeros(3)}, "nothing": {},
    "no tensor": {f"{NAME}k.weight": 3.0}, "a nested one": {f"{NAME}k.weight": {"a": torch.zeros(3)}},
    "integers": {f"{NAME}k.weight": torch.zeros((2, 48, 16), dtype=torch.int32)},
    "complex": {f"{NAME}k.weight": torch.zeros((2, 48, 16), dtype=torch.complex64)},
    "nan": {f"{NAME}k.weight": torch.full((2, 48, 16), float("nan"))},
    "infinity": {f"{NAME}q.weight": torch.full((2, 2, 16, 16), float("inf"))},
    "float64 beyond float32": {f"{NAME}k.weight": torch.full((2, 48, 16), 1e300, dtype=torch.float64)},
    "sparse": {f"{NAME}k.weight": torch.zeros((2, 48, 16)).to_sparse()},
    "meta": {f"{NAME}k.weight": torch.zeros((2, 48, 16), device="meta")},
    "one of two": {f"{NAME}k.weight": torch.zeros((2, 48, 16))}, "a vector": {f"{NAME}k.weight": torch.zeros(48)},
    "a name of digits": {NAME.replace("0", "9" * 5000) + "k.weight": torch.zeros((2, 48, 16))},
    "two of a kind": {f"{NAME}k.weight": torch.zeros((2, 48, 16)), f"{OTHER}k.weight": torch.zeros((2, 48, 16))},
    "a size of 0": {f"{NAME}k.weight": torch.zeros((2, 48, 0)), f"{NAME}q.weight": torch.zeros((2, 2, 16, 0))},
    "no group": {f"{NAME}k.weight": torch.zeros((2, 48, 16)), f"{NAME}q.weight": torch.zeros((2, 0, 16, 16))},
}  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_weights(weights: Any, tmp_path: Path) -> None:
    write(tmp_path)
    torch.save(weights, tmp_path / "attn_gate_weights.pth")
    refused(tmp_path, r"(?s)convert: expected .*, got .*; (download|distill)")


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    for folder in (tmp_path, tmp_path / ("x" * 5000), tmp_path / "a\0b", tmp_path / "none"):
        refused(folder, r"convert: expected config\.json in .*, got none; download the whole repository")


def test_other_models(tmp_path: Path) -> None:
    """Of fewer layers, more of them, or another group: the model is not even run."""
    teacher = Teacher(build_model("llama"))
    teacher.find_rotations = None  # type: ignore[assignment, method-assign]
    weights = write(tmp_path)
    one = {name: tensor for name, tensor in weights.items() if "layers.0" in name}
    three = {**weights, **{name.replace("layers.0", "layers.2"): tensor for name, tensor in one.items()}}
    for other in (one, three):
        torch.save(other, tmp_path / "attn_gate_weights.pth")
        with pytest.raises(OptionError, match=r"convert: expected gates for layers \[0, 1\] of 2, got some for"):
            read_release(tmp_path).gates(teacher)
    group = {name: tensor.repeat(1, 2, 1, 1) if "_q" in name else tensor for name, tensor in weights.items()}
    torch.save(group, tmp_path / "attn_gate_weights.pth")
    with pytest.raises(OptionError, match=r"layer 0: expected matrices .*\(2, 2, 16, 16\)\}, got .*\(2, 4, 16, 16\)"):
        read_release(tmp_path).gates(teacher)


@pytest.mark.parametrize("tokens", [[0], [0, 7], list(range(0, 128, 16))])
def test_tokens_whose_embedding_is_zero(tokens: list[int], tmp_path: Path) -> None:
    """As that of padding often is: its keys are the same with any rotation undone, so it tells nothing of the model's."""
    write(tmp_path)
    expected, model = read_release(tmp_path).gates(Teacher(build_model("llama"))), build_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[tokens[:7]] = 0.0
    for layer, gate in read_release(tmp_path).gates(Teacher(model)).layers.items():
        assert all(
            ours.equal(theirs) for ours, theirs in zip(gate.tensors, expected.layers[layer].tensors, strict=True)
        )


def test_a_model_that_tells_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    model = build_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    with pytest.raises(
        UnsupportedModelError, match=r"keys that tell how they are rotated, got only zeros in layers .0, 1."
    ):
        read_release(tmp_path).gates(Teacher(model))
