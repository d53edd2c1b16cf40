"""SeerAttention's gates: their formulas for the keys and queries of one layer, and the file format.

    keys of a page      inverse RoPE -> max | min | mean [3 D]    x key   [H, 3 D, E]  -> RoPE at the page's first token -> [E]
    queries of a group  inverse RoPE -> concatenated [G, D]       x query [H, G, D, E] -> RoPE at the query's position   -> [E]

    gates.safetensors    layers.<index in the model>.key, .query, .frequencies [R], .gate_frequencies [E / 2]; float32
                         metadata "about": JSON of model type and sizes, page size, rotation

`seer_gate_file.py` reads the file. `distill/teacher.py` verifies on the model that these frequencies invert its RoPE.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from safetensors.torch import save_file
from torch import Tensor

from ... import kernels
from ...config import shown
from ...errors import OptionError
from .layer_shapes import layer_shapes

FILE_NAME = "gates.safetensors"
REMEDY = "make some with `python -m spin_hf.distill MODEL --text FILE --output DIR`, and pass SeerAttention(gates=DIR)"
FORMAT = "spin_hf seer gates 1"
TENSORS = ("key", "query", "frequencies", "gate_frequencies")
_LARGEST = 1e6
"""Largest absolute value of a weight. Trained weights are about 1. Larger ones would overflow with 16-bit keys."""
_SIZES = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")


def rotate(states: Tensor, positions: Tensor, frequencies: Tensor, *, interleaved: bool, undo: bool = False) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of the first 2 R channels, or its inverse.

    Args:
        states: [..., D], float32; positions: [...], broadcastable to states.shape[:-1].
        frequencies: [R], radians per position.
        interleaved: whether channels 2 i and 2 i + 1 form a pair; else i and R + i do.
        undo: apply the inverse.
    Returns:
        [..., D], float32.
    """
    turned = 2 * len(frequencies)
    if not turned:
        return states
    angle = positions.unsqueeze(-1).float() * (-frequencies if undo else frequencies)
    cos, sin = angle.cos(), angle.sin()
    head, rest = states[..., :turned], states[..., turned:]
    a, b = (head[..., ::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    return torch.cat([torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1), rest], -1)


@dataclass(frozen=True, eq=False)
class LayerGate:
    """The gate of one layer.

    Attributes:
        key: [H, 3 D, E], float32; or [L, H, 3 D, E] for L layers with the same rotation, see `of_pages`.
        query: [H, G, D, E], float32.
        frequencies: [R], float32: RoPE frequencies of the layer's keys and queries; R = 0 for no RoPE.
        gate_frequencies: [E / 2], float32: RoPE frequencies of gate keys and queries, which are not interleaved.
        interleaved: how the model pairs channels, see `rotate`.
    """

    key: Tensor
    query: Tensor
    frequencies: Tensor
    gate_frequencies: Tensor
    interleaved: bool

    def to(self, device: torch.device) -> LayerGate:
        """A copy on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the gate."""
        return self.key, self.query, self.frequencies, self.gate_frequencies

    def of_pages(self, keys: Tensor, valid: Tensor, positions: Tensor) -> Tensor:
        """Gate keys of pages.

        Args:
            keys: [B, H, n, P, D], after RoPE; valid, positions: [B, 1, n, P], bool and int64. With L stacked layers
                [L * B, ...], one layer after the other.
        Returns:
            [B, H, n, E], float32; zeros for pages without a valid token.
        """
        keys = rotate(keys.float(), positions, self.frequencies, interleaved=self.interleaved, undo=True)
        hidden, count = ~valid.unsqueeze(-1), valid.sum(-1, keepdim=True)
        largest = keys.masked_fill(hidden, float("-inf")).amax(-2)
        smallest = keys.masked_fill(hidden, float("inf")).amin(-2)
        mean = keys.masked_fill(hidden, 0.0).sum(-2) / count.clamp(min=1)
        pooled = torch.cat([largest, smallest, mean], -1).where(count > 0, 0.0)
        first = positions.masked_fill(~valid, torch.iinfo(torch.int64).max).amin(-1)
        first = first.where(count.squeeze(-1) > 0, 0)
        weights = self.key if self.key.dim() == 4 else self.key.unsqueeze(0)
        projected = torch.einsum("lbhni,lhio->lbhno", pooled.unflatten(0, (len(weights), -1)), weights).flatten(0, 1)
        return rotate(projected, first, self.gate_frequencies, interleaved=False)

    def rotates_as(self, other: LayerGate) -> bool:
        """Whether both have the same rotations. Compares values, so it synchronises with a GPU."""
        alike = (torch.equal(getattr(self, name), getattr(other, name)) for name in ("frequencies", "gate_frequencies"))
        return self.interleaved == other.interleaved and all(alike)

    def of_queries(self, states: Tensor, positions: Tensor) -> Tensor:
        """Gate queries [B, H, E], float32, of query states [B, H, G, D], after RoPE, at positions [B]."""
        states = rotate(
            states.float(), positions[:, None, None], self.frequencies, interleaved=self.interleaved, undo=True
        )
        projected = torch.einsum("bhgi,hgio->bho", states, self.query)
        return rotate(projected, positions[:, None], self.gate_frequencies, interleaved=False)

    def scaled_queries(self, states: Tensor, positions: Tensor, scale: float) -> Tensor:
        """`of_queries` times `scale`, by a kernel if there is one."""
        launch = kernels.launchers(states.device)
        if launch is None:
            return self.of_queries(states, positions) * scale
        return launch.gate_queries(
            states, positions, self.query, self.frequencies, self.gate_frequencies, interleaved=self.interleaved, scale=scale
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Gates:
    """The gates of a model.

    Attributes:
        layers: index in the model -> gate.
        page_size: tokens per page.
        about: model type, sizes and rotation of their model, from `describe`.
    """

    layers: dict[int, LayerGate]
    page_size: int
    about: dict[str, Any]
    _placed: WeakValueDictionary[tuple[int, torch.device], LayerGate] = field(default_factory=WeakValueDictionary)

    def on(self, number: int, device: torch.device) -> LayerGate:
        """The gate of layer `number` on a device. Callers share one copy, which lives as long as one of them holds it."""
        found = self._placed.get((number, device))
        if found is None:
            found = self._placed[number, device] = self.layers[number].to(device)
        return found

    def save(self, path: Path) -> None:
        """Write a file atomically: a reader sees the old one or the new one.

        Raises:
            OptionError: a gate has invalid shapes or values; nothing is written.
        """
        for number, gate in self.layers.items():
            named = {name: getattr(gate, name) for name in TENSORS}
            check_layer({name: tuple(tensor.shape) for name, tensor in named.items()}, f"layer {number}", _unfit)
            for name, tensor in named.items():
                check_numbers(tensor, f"layer {number}, {name}", _unfit)
        tensors = {
            f"layers.{number}.{name}": getattr(gate, name).detach().float().cpu().contiguous().clone()
            for number, gate in self.layers.items()
            for name in TENSORS
        }
        interleaved = {number: gate.interleaved for number, gate in self.layers.items()}
        about = {**self.about, "page_size": self.page_size, "interleaved": interleaved}
        unfinished = path.with_name(path.name + ".part")
        save_file(tensors, unfinished, metadata={"format": FORMAT, "about": json.dumps(about)})
        unfinished.replace(path)

    def check(self, config: Any, layers: list[int], page_size: int) -> None:
        """Raise OptionError if these gates are for another model or page size."""
        now, made_for = describe(config), {name: self.about.get(name) for name in describe(config)}
        if made_for["rope"] is not None and now["rope"] is not None and not _agree(made_for["rope"], now["rope"]):
            raise OptionError(
                f"gates: expected a model with rope parameters {shown(made_for['rope'])}, got {shown(now['rope'])}; "
                f"set them so, or {REMEDY}"
            )
        differing = [name for name in now if name != "rope" and now[name] != made_for[name]]
        if differing:
            wanted, found = (", ".join(f"{n}={_plain(about[n])}" for n in differing) for about in (now, made_for))
            raise OptionError(f"gates: expected gates for a model with {wanted}, got gates for {found}; {REMEDY}")
        missing = [number for number in layers if number not in self.layers]
        if missing:
            raise OptionError(f"gates: expected gates for layers {layers}, got none for {missing}; {REMEDY}")
        for number, shape in zip(layers, layer_shapes(config, layers) or [], strict=False):
            heads, group, dim = self.layers[number].query.shape[:3]
            wanted_shape = (shape.num_heads, group if shape.group is None else shape.group, shape.key_dim)
            check_heads((heads, group, dim), wanted_shape, number)
        if page_size != self.page_size:
            raise OptionError(
                f"gates: expected gates for pages of {page_size} tokens, got gates for {self.page_size}; "
                f"pass SeerAttention(..., page_size={self.page_size}), or distill with --block {page_size}"
            )


def check_heads(found: tuple[int, ...], wanted: tuple[int, ...], layer: int) -> None:
    """Raise OptionError if a gate's (KV heads, query heads per KV head, key size) are not those of the layer."""
    if found != wanted:
        expected, got = (
            f"{heads} KV heads with {group} query heads each, of {dim} numbers" for heads, group, dim in (wanted, found)
        )
        raise OptionError(f"gates: layer {layer}: expected a gate for {expected}, got one for {got}; {REMEDY}")


def describe(config: Any) -> dict[str, Any]:
    """The fields of a model's config that gates depend on: type, sizes and rope parameters, None for missing ones."""
    fields = config.to_dict()  # reading attributes raises for configs with different layers
    return {**{name: fields.get(name) for name in ("model_type", *_SIZES)}, "rope": fields.get("rope_parameters")}


def check_layer(
    shapes: Mapping[str, tuple[int, ...] | None], where: str, error: Callable[[str, str], Exception]
) -> None:
    """Raise `error(expected, got)` if the tensors of a layer have inconsistent shapes."""
    key, query, turned, own = (shapes[name] or () for name in TENSORS)
    fits = len(key) == 3 and len(query) == 4 and len(turned) == len(own) == 1 and min(*query, *own) > 0
    if not (fits and key == (query[0], 3 * query[2], query[3]) and 2 * turned[0] <= query[2] and 2 * own[0] == key[2]):
        expected = (
            "key [H, 3 D, E], query [H, G, D, E], frequencies [R <= D / 2], gate_frequencies [E / 2], only R may be 0"
        )
        raise error(f"{where}: {expected}", shown(dict(shapes)))


def check_numbers(tensor: Tensor, where: str, error: Callable[[str, str], Exception]) -> None:
    """Raise `error(expected, got)` if a tensor is not dense floating point, or has values beyond `_LARGEST`."""
    if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
        raise error(f"{where}: dense floating-point numbers", f"{tensor.dtype}, {tensor.layout}, {tensor.device}")
    largest = float(tensor.detach().float().abs().max()) if tensor.numel() else 0.0
    if not largest <= _LARGEST:
        raise error(f"{where}: finite numbers of at most {_LARGEST:g} in size", f"{largest:g}")


def _agree(saved: Any, now: Any) -> bool:
    """Whether two sets of rope parameters agree in their common fields. Versions of transformers add fields."""
    if isinstance(saved, dict) and isinstance(now, dict):
        return all(_agree(saved[name], now[name]) for name in saved.keys() & now.keys())
    return bool(saved == now)


def _plain(value: Any) -> str:
    return value[:100] if isinstance(value, str) else shown(value)


def _unfit(expected: str, got: str) -> OptionError:
    return OptionError(f"gates: expected {expected}, got {got}; train with a lower --lr, or on other text")
