"""Files of SeerAttention gates that fit `SHAPE`, and changes to them that the package must refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from spin_hf import OptionError, SeerAttention, SpinCache, plan
from spin_hf.attention.methods.seer_gate_file import load_gates
from tests.support.cache_driver import Shape
from tests.support.seer_gates import random_gates

SHAPE = Shape(layers=2, kv_heads=2, group=2)
REFUSED = r"(?s)gates: expected .+, got .+ in .*; make some with `python -m spin_hf\.distill"


def good_gates(folder: Path, seed: int = 0) -> Path:
    """Write a file of gates that is accepted; returns its path."""
    random_gates(SHAPE.config(), SHAPE.layers, SHAPE.kv_heads, SHAPE.group, SHAPE.key_dim, folder, seed=seed)
    return folder / "gates.safetensors"


def header_and_tensors(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_parts(file: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def with_about(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the metadata in place, or replace them by what `change` returns."""
    header, data = header_and_tensors(file)
    about = json.loads(header["__metadata__"]["about"])
    made = change(about)
    header["__metadata__"]["about"] = made if isinstance(made, str) else json.dumps(about if made is None else made)
    write_parts(file, header, data)


def with_tensors(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change tensors in place."""
    from safetensors.torch import load_file, save_file

    tensors, metadata = load_file(file), header_and_tensors(file)[0]["__metadata__"]
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)


def refused(file: Path, message: str = REFUSED) -> str:
    """All readers of the file refuse it with the same message, which is returned."""
    for made in (
        lambda: load_gates(file),
        lambda: SpinCache(SHAPE.config(), SeerAttention(file)),
        lambda: plan(SHAPE.config(), context_length=100, method=SeerAttention(file)),
    ):
        with pytest.raises(OptionError, match=message) as raised:
            made()
    assert len(str(raised.value)) < 3000
    return str(raised.value)
