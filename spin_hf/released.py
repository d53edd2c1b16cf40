"""The gates that the authors of SeerAttention-R publish (`SeerAttention/SeerAttention-Decode-*`), read into our own.

    config.json             seerattn_gate_block_size, seerattn_k_seq_pooling_type, seerattn_q_head_pooling_type, ...
    attn_gate_weights.pth   ...layers.<i>.self_attn.attn_gate.<mask|attngate>_linear_k.weight  [H, 3 D, E]
                            ...                               <mask|attngate>_linear_q.weight  [H, G, D, E]

From github.com/microsoft/SeerAttention (MIT): `seer_attn/decode_sparse/attn_gate_training.py`, `distillation_decode.py`. What
is read are gates of its default form: keys pooled by max, min and mean, one matrix for the group's queries, no norms,
rotary embeddings as wide as the model's. Tested with files made in this form, not with a download.
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .attention.gates import Gates, LayerGate, describe
from .errors import OptionError
from .teacher import Teacher

_WEIGHTS = "attn_gate_weights.pth"
_KEY = re.compile(r"layers\.(\d+)\.self_attn\.attn_gate\.(?:mask|attngate)_linear_([kq])\.weight$")
_EXPECTED: dict[str, tuple[Any, Any]] = {
    "seerattn_k_seq_pooling_type": ("Kmaxminavg", "Kmaxminavg"),
    "seerattn_q_head_pooling_type": ("Qproj", "Qproj"),
    "seerattn_use_qk_norm": (False, False),
    "seerattn_use_rope": (True, True),
}
"""Settings, the value that is read, and the one that holds where the file does not say."""


def convert(folder: Path, teacher: Teacher) -> Gates:
    """The authors' gates for a model.

    Args:
        folder: with `config.json` and `attn_gate_weights.pth`, whose tensors alone are read, nothing is executed.
        teacher: the model, of which only the rotation is needed.
    Raises:
        OptionError: files are missing, of another form, or for another model.
        UnsupportedModelError: the model's keys are not rotated in a way that can be undone.
    """
    for name in ("config.json", _WEIGHTS):
        if not (folder / name).is_file():
            raise OptionError(f"convert: expected {name} in {str(folder)!r}, got none; download the whole repository")
    config = json.loads((folder / "config.json").read_text())
    found = {name: config.get(name, default) for name, (_, default) in _EXPECTED.items()}
    if any(found[name] != value for name, (value, _) in _EXPECTED.items()):
        raise OptionError(
            f"convert: expected { {n: v for n, (v, _) in _EXPECTED.items()} }, got {found}; distill with --text"
        )
    try:
        weights = torch.load(folder / _WEIGHTS, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise OptionError(f"convert: expected tensors in {_WEIGHTS}, got {error}; download it again") from error
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        match = _KEY.search(name)
        if match is None:
            raise OptionError(f"convert: expected gate matrices in {_WEIGHTS}, got {name!r}; distill with --text")
        parts.setdefault(int(match[1]), {})[match[2]] = tensor.float()
    rotations = teacher.find_rotations(0)
    gates = {layer: _gate(layer, parts.get(layer, {}), rotations[layer], teacher.config) for layer in teacher.layers}
    return Gates(gates, config.get("seerattn_gate_block_size", 64), describe(teacher.config))


def _gate(layer: int, parts: dict[str, Tensor], rotation: Any, config: Any) -> LayerGate:
    heads = config.num_key_value_heads
    group = config.num_attention_heads // heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = 2 * len(rotation.frequencies)
    expected = {"k": (heads, 3 * dim, width), "q": (heads, group, dim, width)}
    shapes = {name: tuple(tensor.shape) for name, tensor in parts.items()}
    if shapes != expected:
        raise OptionError(
            f"convert: layer {layer}: expected matrices {expected}, got {shapes}; these gates are for another model, "
            "or rotate another number of channels"
        )
    return LayerGate(parts["k"], parts["q"], rotation.frequencies, rotation.frequencies, rotation.interleaved)
