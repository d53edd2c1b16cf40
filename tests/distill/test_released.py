"""The authors' gates: a folder in their form, written here from their code's names and shapes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_hf import OptionError, SeerAttention, SpinCache
from spin_hf.released import convert
from spin_hf.teacher import Teacher
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
    gates = convert(tmp_path, Teacher(model))
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
        convert(tmp_path, Teacher(build_model("llama")))


def test_missing_and_harmful_files(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"expected config\.json .* got none"):
        convert(tmp_path, Teacher(build_model("llama")))
    write(tmp_path)
    torch.save({"a": Teacher}, tmp_path / "attn_gate_weights.pth")  # a pickle that names code
    with pytest.raises(OptionError, match=r"expected tensors in attn_gate_weights\.pth"):
        convert(tmp_path, Teacher(build_model("llama")))
