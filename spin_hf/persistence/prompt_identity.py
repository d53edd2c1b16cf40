"""What identifies a stored prompt: its tokens, and all that keys, values and summaries depend on beside them."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layer import SpinLayer
from .fingerprint import ModelFacts, fingerprint
from .shards import bytes_of

_SAMPLES = 64
"""Numbers of each parameter that are hashed."""
_COMPARED = 1024
"""Tokens that are compared at once."""


def only_row(ids: Tensor, mask: Tensor | None) -> array[int] | None:
    """The tokens of a prompt whose sequences are equal and without padding, of type "q"; None for others."""
    if ids.dim() != 2 or not ids.numel() or (mask is not None and (mask.shape != ids.shape or not bool(mask.all()))):
        return None
    if len(ids) > 1 and not bool((ids == ids[:1]).all()):
        return None
    return row_of(ids)


def row_of(ids: Tensor) -> array[int]:
    """The ids of the first sequence of [B, n], of type "q"."""
    return array("q", bytes_of(ids[0].detach().long().cpu().contiguous()).tobytes())


def space_of(cache: Any, facts: ModelFacts | None = None) -> str:
    """A hash of what keys, values and summaries depend on beside the tokens: config, method, options, weights, sparse reading.

    Of each parameter a few numbers are read, and which adapters are active. Other changes of a model are not noticed: replaced
    modules with the same weights, hooks, plain attributes.

    Args:
        facts: of the cache's model; None to take them now.
    """
    state, model = cache._state, cache.calls.model()
    dtype = getattr(model, "dtype", None)
    facts = ModelFacts.of(model) if facts is None else facts
    about = fingerprint(cache._config, facts, state.method, len(state.layers), state.options, dtype)
    made = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16)
    if state.options.prefill != "dense":
        made.update(f"{state.options.prefill} {state.options.prefill_top_p}\0".encode())
    if model is not None:
        samples: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            made.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\0".encode())
            flat = parameter.detach().flatten()
            step = max(1, len(flat) // _SAMPLES)
            samples.setdefault((parameter.device, parameter.dtype), []).append(flat[: step * _SAMPLES : step])
        for each in samples.values():  # one copy from each device
            made.update(bytes_of(torch.cat(each).cpu()))
        for name, module in model.named_modules():
            active = getattr(module, "active_adapters", None)
            if active is not None and not callable(active):  # a method of models, an attribute of layers with adapters
                made.update(f"{name} {active} {bool(getattr(module, 'disable_adapters', False))}\0".encode())
    return made.hexdigest()


def with_options(space: str, cache: Any) -> str:
    """A fork has the options of its origin."""
    return f"{space} {cache._state.options} {cache._state.method!r}"


def tensors_of(cache: Any) -> list[Tensor]:
    """The tensors of transformers' own layers."""
    held = [each for layer in cache.layers if not isinstance(layer, SpinLayer) for each in vars(layer).values()]
    held += [each for states in held if isinstance(states, dict) for each in states.values()]
    return [each for each in held if isinstance(each, Tensor)]


def bytes_of_cache(cache: Any) -> int:
    """Bytes of pages and summaries, and of the tensors of transformers' own layers."""
    segments = cache._state.sequences.segments_in_use
    stores = [layer.store for layer in cache._state.layers if layer.store is not None]
    paged = sum(store.gpu_bytes(segments) + store.cpu_bytes(segments) for store in stores)
    return int(paged + sum(each.nbytes for each in tensors_of(cache)))


def common_length(stored: Sequence[int], tokens: Sequence[int], start: int) -> int:
    """Number of tokens that both begin with; the first `start` are known to be equal."""
    stop = min(len(stored), len(tokens))
    while start < stop and stored[start : start + _COMPARED] == tokens[start : start + _COMPARED]:
        start = min(stop, start + _COMPARED)
    while start < stop and stored[start] == tokens[start]:
        start += 1
    return start
