"""Converts the gates that the authors of SeerAttention-R publish (`SeerAttention/SeerAttention-Decode-*`).

    config.json             seerattn_gate_block_size, seerattn_k_seq_pooling_type, seerattn_q_head_pooling_type, ...
    attn_gate_weights.pth   ...layers.<i>.self_attn.attn_gate.<mask|attngate>_linear_k.weight  [H, 3 D, E]
                            ...                               <mask|attngate>_linear_q.weight  [H, G, D, E]

The format is that of github.com/microsoft/SeerAttention (MIT): `seer_attn/decode_sparse/attn_gate_training.py`,
`distillation_decode.py`. Only its default variant is supported: keys pooled by max, min and mean, one matrix for the group's
queries, no norms, RoPE on as many channels as in the model. Tested with generated files in this format, not with a download.
"""

from __future__ import annotations

import json
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.methods.layer_shapes import layer_shapes
from ..attention.methods.seer import PAGE_SIZES
from ..attention.methods.seer_gates import Gates, LayerGate, check_layer, check_numbers, describe
from ..config import shown
from ..errors import OptionError
from .teacher import Teacher

_WEIGHTS = "attn_gate_weights.pth"
_KEY = re.compile(r"layers\.(\d{1,5})\.self_attn\.attn_gate\.(?:mask|attngate)_linear_([kq])\.weight$")
_SHAPES = {"k": "[H, 3 D, E]", "q": "[H, G, D, E]"}
_EXPECTED: dict[str, tuple[Any, Any]] = {
    "seerattn_k_seq_pooling_type": ("Kmaxminavg", "Kmaxminavg"),
    "seerattn_q_head_pooling_type": ("Qproj", "Qproj"),
    "seerattn_use_qk_norm": (False, False),
    "seerattn_use_rope": (True, True),
}
"""Setting -> the supported value, and the default if the file does not have the setting."""


@dataclass(frozen=True)
class Release:
    """The contents of the authors' folder, checked as far as possible without a model.

    Attributes:
        matrices: layer -> "k" [H, 3 D, E] and "q" [H, G, D, E], float32.
        page_size: tokens per page that the gates were trained for.
    """

    matrices: dict[int, dict[str, Tensor]]
    page_size: int

    def gates(self, teacher: Teacher) -> Gates:
        """The gates for a model. The model gives shapes and RoPE frequencies.

        Raises:
            OptionError: the gates are for another model.
            UnsupportedModelError: the RoPE of the model's keys cannot be inverted.
        """
        count = int(teacher.config.num_hidden_layers)
        if set(teacher.layers) - set(self.matrices) or max(self.matrices) >= count:
            raise OptionError(
                f"convert: expected gates for layers {teacher.layers} of {count}, got some for {shown(sorted(self.matrices))}; "
                "these gates are for another model"
            )
        shapes = layer_shapes(teacher.config, teacher.layers)
        for layer, shape in zip(teacher.layers, shapes or [], strict=False):
            key, query = (self.matrices[layer][name].shape for name in "kq")
            heads, group, dim = shape.num_heads, query[1] if shape.group is None else shape.group, shape.key_dim
            expected = {"k": (heads, 3 * dim, key[2]), "q": (heads, group, dim, key[2])}
            self._check(layer, expected, "")
        rotations, gates = teacher.find_rotations(), {}
        for layer in teacher.layers:
            query, turned = self.matrices[layer]["q"].shape, rotations[layer].frequencies
            expected = {"k": (query[0], 3 * query[2], 2 * len(turned)), "q": (*query[:3], 2 * len(turned))}
            self._check(layer, expected, f", or rotate another number of channels than the model's {2 * len(turned)}")
            found = self.matrices[layer]
            gates[layer] = LayerGate(found["k"], found["q"], turned, turned, rotations[layer].interleaved)
        return Gates(gates, self.page_size, describe(teacher.config))

    def _check(self, layer: int, expected: dict[str, tuple[int, ...]], more: str) -> None:
        shapes = {name: tuple(self.matrices[layer][name].shape) for name in "kq"}
        if shapes != expected:
            raise OptionError(
                f"convert: layer {layer}: expected matrices {expected}, got {shapes}; these gates are for another model{more}"
            )


def read_release(folder: Path) -> Release:
    """Read the authors' folder.

    Args:
        folder: with `config.json` and `attn_gate_weights.pth`. Of the pickle only tensors are read; no code is executed.
    Raises:
        OptionError: files are missing, damaged, or of another variant.
    """
    for name in ("config.json", _WEIGHTS):
        try:
            found = stat.S_ISREG((folder / name).stat().st_mode)
        except (OSError, ValueError):
            found = False
        if not found:
            raise OptionError(
                f"convert: expected {name} in {shown(str(folder))}, got none; download the whole repository"
            )
    page_size = _page_size(folder / "config.json")
    return Release(_matrices(_weights(folder / _WEIGHTS)), page_size)


def _page_size(file: Path) -> int:
    """The page size. Raises OptionError if other settings are not supported."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        got = f"{type(error).__name__} ({shown(str(error))})"
        raise OptionError(f"convert: expected JSON in {file.name}, got {got}; download it again") from error
    if not isinstance(config, dict):
        raise OptionError(f"convert: expected a JSON object in {file.name}, got {shown(config)}; download it again")
    found = {name: config.get(name, default) for name, (_, default) in _EXPECTED.items()}
    if any(found[name] != value for name, (value, _) in _EXPECTED.items()):
        raise OptionError(
            f"convert: expected { {n: v for n, (v, _) in _EXPECTED.items()} }, got {shown(found)}; distill with --text"
        )
    size = config.get("seerattn_gate_block_size", 64)
    if type(size) is not int or size not in PAGE_SIZES:
        raise OptionError(
            f"convert: expected a seerattn_gate_block_size of {', '.join(map(str, PAGE_SIZES))}, got {shown(size)}; "
            "distill with --text and --block"
        )
    return size


def _weights(file: Path) -> dict[str, Tensor]:
    """Tensors by name."""
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        got = f"{type(error).__name__} ({shown(str(error))})"
        raise OptionError(f"convert: expected tensors in {file.name}, got {got}; download it again") from error
    if not (isinstance(weights, dict) and all(isinstance(name, str) for name in weights)):
        raise OptionError(
            f"convert: expected tensors by name in {file.name}, got {type(weights).__name__}; download it again"
        )
    return weights


def _matrices(weights: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Layer -> its two matrices, float32."""
    matrices: dict[int, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        match = _KEY.search(name)
        if match is None:
            raise OptionError(f"convert: expected gate matrices in {_WEIGHTS}, got {shown(name)}; distill with --text")
        layer, which = int(match[1]), match[2]
        if not isinstance(tensor, Tensor):
            raise _damaged(f"{shown(name)}: a tensor", type(tensor).__name__)
        if tensor.dim() != {"k": 3, "q": 4}[which] or which in matrices.get(layer, {}):
            again = f"shape {tuple(tensor.shape)}" if which not in matrices.get(layer, {}) else "a second one"
            raise _damaged(f"layer {layer}: one matrix {_SHAPES[which]}", again)
        check_numbers(tensor, shown(name), _damaged)
        matrices.setdefault(layer, {})[which] = tensor.float()
    for layer, found in matrices.items():
        if len(found) < 2:
            raise _damaged(f"layer {layer}: matrices of keys and queries", f"only that of {'kq'['q' in found]}")
        sizes = {"key": tuple(found["k"].shape), "query": tuple(found["q"].shape), "frequencies": (0,)}
        check_layer({**sizes, "gate_frequencies": (found["k"].shape[2] // 2,)}, f"layer {layer}", _damaged)
    if not matrices:
        raise _damaged("gate matrices", "none")
    return matrices


def _damaged(expected: str, got: str) -> OptionError:
    return OptionError(
        f"convert: expected {expected} in {_WEIGHTS}, got {got}; download it again, or distill with --text"
    )
