"""Layers of transformers' own: their tensors and numbers, by attribute.

    keys, values                        attention layers and windows
    conv_states.0, recurrent_states.0   linear attention: entries of a dict are numbered
    cumulative_length, record_past      ints, bools and None

Dtypes and devices follow from the tensors. Everything else that differs from a new layer is refused when it is saved, so a
layer of an unknown kind is never restored in part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import shown
from ..errors import OptionError
from .manifest import OtherLayer
from .shards import DTYPES
from .strict_json import RefusedError

_FOLLOWS = ("device", "dtype", "_sliding_window_tensor", "batch_size", "num_heads")
"""Attributes that a layer gets from its tensors or its config."""

Numbers = dict[str, "int | bool | None"]


def contents(index: int, layer: Any) -> tuple[Numbers, dict[str, Tensor]]:
    """Numbers and tensors of a layer.

    Raises:
        OptionError: it holds something else.
    """
    numbers: Numbers = {}
    tensors: dict[str, Tensor] = {}
    for name, value in vars(layer).items():
        if name in _FOLLOWS:
            continue
        entries = {name: value}
        if isinstance(value, dict):  # keys of another type are refused below
            entries = {f"{name}.{key}": held if type(key) is int else value for key, held in value.items()}
        for entry, held in entries.items():
            if isinstance(held, (torch.dtype, torch.device)):
                continue
            if isinstance(held, Tensor) and held.dtype in DTYPES and type(held) in (Tensor, torch.nn.Parameter):
                tensors[entry] = held
            elif type(held) in (int, bool, type(None)):
                numbers[entry] = held
            else:
                raise OptionError(
                    f"save_pretrained: layer {index} is a {type(layer).__name__} whose {entry} is {shown(held, 80)}, expected "
                    "tensors and whole numbers; use copy.deepcopy for a cache of this model"
                )
    return numbers, tensors


def check(index: int, entry: OtherLayer, fresh: Any, batch_size: int, length: int) -> None:
    """Refuse a saved layer that does not fit a new layer of the model.

    Args:
        fresh: the new layer.
        batch_size, length: of the saved cache.
    """
    where = f"layer {index}"
    if entry.kind != type(fresh).__name__:
        raise RefusedError(f"{where} as {type(fresh).__name__}", shown(entry.kind, 80))
    slots = _slots(fresh)
    for name in [*_set(entry, slots), *entry.tensors]:
        if name not in slots or (name in entry.numbers and name in entry.tensors):
            raise RefusedError(f"attributes of a {entry.kind} in {where}", shown(name, 80))
    for name, number in _set(entry, slots).items():
        if type(slots[name]) in (int, bool) and type(number) is not type(slots[name]):
            raise RefusedError(f"{name} of {where} as {type(slots[name]).__name__}", shown(number, 80))
        if type(slots[name]) is int and slots[name] and number != slots[name]:  # sizes that the config sets
            raise RefusedError(f"{name} of {where} {slots[name]}", shown(number, 80))
        if name == "cumulative_length" and not 0 <= int(number or 0) <= length:
            raise RefusedError(f"{name} of {where} from 0 to {length}", shown(number, 80))
    for name, (_, sizes) in entry.tensors.items():
        fits = sizes[:1] == (batch_size,) or sizes == (0,) or "position_ids" in name
        if type(slots[name]) in (int, bool) or not fits:
            raise RefusedError(f"{name} of {where} as a tensor of {batch_size} sequences", shown(list(sizes), 80))
    _check_keys(where, entry, fresh, length)


def _check_keys(where: str, entry: OtherLayer, fresh: Any, length: int) -> None:
    """Refuse keys and values whose sizes contradict each other, the window, or the tokens held."""
    held = [entry.tensors.get(name) for name in ("keys", "values")]
    if entry.numbers.get("is_initialized") and "keys" in _slots(fresh) and None in held:
        raise RefusedError(f"keys and values of {where}, which is initialized", "none")
    if held[0] is None and held[1] is None:
        return
    if held[0] is None or held[1] is None or held[0][0] != held[1][0] or not held[0][0].is_floating_point:
        raise RefusedError(f"keys and values of one floating-point dtype in {where}", "others")
    keys, values = held[0][1], held[1][1]
    if keys == (0,) == values:
        return
    if len(keys) != 4 or len(values) != 4 or keys[:3] != values[:3]:
        raise RefusedError(f"keys and values [sequences, heads, tokens, size] in {where}", f"{keys} and {values}")
    tokens = entry.numbers.get("cumulative_length", keys[2])
    window = getattr(fresh, "sliding_window", None)
    fewest = keys[2] if window is None or tokens is None else min(int(tokens), window - 1)
    most = length if window is None or entry.numbers.get("record_past") else fewest
    if not fewest <= keys[2] <= most:
        raise RefusedError(f"{fewest} to {most} tokens in {where}", f"{keys[2]}")


def restore(entry: OtherLayer, layer: Any, tensors: dict[str, Tensor]) -> None:
    """Fill a new layer with a saved one's content, which `check` has accepted."""
    keys, values = tensors.get("keys"), tensors.get("values")
    if keys is not None and values is not None and keys.dim() == 4:
        layer.lazy_initialization(keys, values)
    if "indexer_keys" in tensors:
        layer.lazy_initialization_indexer(tensors["indexer_keys"])
    for name, value in {**_set(entry, _slots(layer)), **tensors}.items():
        attribute, _, key = name.partition(".")
        if key:
            getattr(layer, attribute)[int(key)] = value
        else:
            setattr(layer, attribute, value)
    states = [state for state in tensors.values() if state.is_floating_point()]
    for name in ("device", "dtype"):
        if states and getattr(layer, name, None) is None:
            setattr(layer, name, getattr(states[0], name))


def _set(entry: OtherLayer, slots: dict[str, Any]) -> Numbers:
    """The numbers of a saved layer, without those that are off and that this version of transformers does not know."""
    return {name: number for name, number in entry.numbers.items() if number or name in slots}


def _slots(fresh: Any) -> dict[str, Any]:
    """Names that may be set in a new layer, and what is there."""
    found: dict[str, Any] = {}
    for name, value in vars(fresh).items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": held for key, held in value.items()}
        elif name not in _FOLLOWS:
            found[name] = value
    return found
