"""A frozen model as the teacher of gates: its attention by pages, and by which rotation its keys are undone.

    forward of a text  --attention function "spin_hf_teacher"-->  Seen: queries, keys, scale of each paged layer, in turn
    Seen               --page_attention-->  per KV head, query and page: the largest weight of any of the page's tokens
                                            and of any query head of the group; in chunks of queries, never tokens x tokens
    one token repeated --find_rotations-->  keys that differ by their rotation alone, so that what undoes it can be found

The model computes what it always does; importing this module registers the attention function and its mask function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention.methods.seer_gates import rotate
from ..errors import UnsupportedModelError
from ..integration.layer_types import build_layers, check_model

_NAME = "spin_hf_teacher"
_PROBE_TOKENS = 256
_MOST_TOKENS_TRIED = 8
_CHUNK_LOGITS = 1 << 24
"""Attention weights held at a time while targets are computed: 64 MiB."""
_CHANGING_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class Seen:
    """The attention of one layer over a text of n tokens.

    Attributes:
        queries: [H, G, n, D], query heads by KV head, after RoPE.
        keys: [H, n, D], after RoPE.
        scale, softcap: of the scores, as `attend.Call` has them.
    """

    queries: Tensor
    keys: Tensor
    scale: float
    softcap: float | None


@dataclass(frozen=True)
class Rotation:
    """How a layer rotates its keys: see `attention.gates.rotate`."""

    frequencies: Tensor
    interleaved: bool


class Teacher:
    """A frozen model whose attention can be watched.

    Args:
        model: a causal language model; it is not changed, but for `requires_grad` of its parameters.
    Raises:
        UnsupportedModelError: no layer of it is one that a cache pages.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = model.config.get_text_config(decoder=True)
        name = type(model).__name__
        check_model(self.config, name)
        self.layers: list[int] = []
        """The paged layers' numbers in the model."""
        _, reasons = build_layers(self.config, _collect(self.layers))
        if not self.layers:
            raise UnsupportedModelError(f"{name}: expected layers with full attention, got none ({reasons})")

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device = self.model.device
        assert isinstance(device, torch.device)
        return device

    @torch.no_grad()
    def watch(self, ids: Tensor, see: Callable[[int, Seen], None]) -> None:
        """Run the model over `ids` [n] and call `see(layer, seen)` at each paged layer, by its number in the model.

        Raises:
            UnsupportedModelError: a layer did not call the attention function.
        """
        wanted, config = set(self.layers), self.config
        before, config._attn_implementation = config._attn_implementation, _NAME

        def shown(layer: int, seen: Seen) -> None:
            wanted.discard(layer)
            see(layer, seen)

        _watching.append((before, shown, frozenset(wanted)))
        try:
            self.model.base_model(ids.unsqueeze(0).to(self.device), use_cache=False)
        finally:
            _watching.pop()
            config._attn_implementation = before
        if wanted:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: expected every full-attention layer to call transformers' attention "
                f"interface, layers {sorted(wanted)} did not; use ShadowKV, which needs no gates"
            )

    def find_rotations(self, token: int = 0) -> dict[int, Rotation]:
        """How each paged layer rotates its keys, by experiment.

        In a text of one token repeated all values of a layer are the same, so is what attention gives, and so are all keys
        before their rotation. Of the model's own inverse frequencies those are taken that make them so again. A token whose
        keys are the same with and without any of them tells nothing, as one whose embedding is zero: then others are tried.

        Args:
            token: the token to repeat first; any.
        Raises:
            UnsupportedModelError: none do, or they depend on the length of the text; or no token tells.
        """
        name, parameters = type(self.model).__name__, getattr(self.config, "rope_parameters", None)
        if any(kind in str(parameters) for kind in _CHANGING_ROPE):
            raise UnsupportedModelError(
                f"{name}: expected a rotation that does not depend on the length of the text, got {parameters}; use ShadowKV"
            )
        options = [Rotation(torch.zeros(0, device=self.device), False)]
        for buffer, values in self.model.named_buffers():
            if buffer.endswith("inv_freq") and "original" not in buffer:
                options += [Rotation(values.detach().float().clone(), interleaved) for interleaved in (False, True)]
        # Keys with a large bias differ little whatever is undone: in bfloat16 0.2 % by the right rotation, 1.2 % by the next.
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 5e-3
        found: dict[int, Rotation] = {}
        vague: dict[int, Rotation] = {}
        for tried in self._tokens(token):
            keys = self._keys_of(tried)
            for layer in self.layers:
                if layer in found or not bool(keys[layer].any()):
                    continue
                spread = [_spread(keys[layer], option) for option in options]
                best = min(range(len(options)), key=lambda i, spread=spread: spread[i])  # type: ignore[misc]
                if not spread[best] < tolerance:
                    raise UnsupportedModelError(
                        f"{name}: expected keys that rotary embeddings of the model's frequencies explain, got keys of layer "
                        f"{layer} that differ by {spread[best]:.2%} without them (at most {tolerance:.2%} is rounding); load "
                        "the model in float32, or use ShadowKV, which needs no gates"
                    )
                by_rotating = [value for value in spread[1:] if value < tolerance]
                told = not (by_rotating and spread[0] < tolerance)
                (found if told else vague).setdefault(layer, options[best])
            if len(found) == len(self.layers):
                break
        untold = [layer for layer in self.layers if layer not in found and layer not in vague]
        if untold:
            raise UnsupportedModelError(
                f"{name}: expected keys that tell how they are rotated, got only zeros in layers {untold}, whichever token is "
                "read; load trained weights, or use ShadowKV, which needs no gates"
            )
        return {layer: found.get(layer) or vague[layer] for layer in self.layers}

    def _tokens(self, first: int) -> list[int]:
        """A token, and others from all over the vocabulary."""
        embeddings = self.model.get_input_embeddings()
        number = int(embeddings.weight.shape[0])
        return list(dict.fromkeys([first, *(number * i // _MOST_TOKENS_TRIED for i in range(1, _MOST_TOKENS_TRIED))]))

    def _keys_of(self, token: int) -> dict[int, Tensor]:
        """Keys [H, n, D], float32, of each paged layer for a text of one token repeated."""
        keys: dict[int, Tensor] = {}
        self.watch(torch.full((_PROBE_TOKENS,), token), lambda layer, seen: keys.update({layer: seen.keys.float()}))
        return keys


def page_attention(seen: Seen, positions: Tensor, page_size: int) -> Tensor:
    """What queries attend to, by page: the largest weight of any of its tokens and any query head of the group.

    Args:
        positions: [Q], int64, ascending: which queries.
    Returns:
        [H, Q, n // page_size], float32; zero where all of a page comes after the query.
    """
    heads, group, num_tokens, _ = seen.queries.shape
    num_pages = num_tokens // page_size
    keys, parts = seen.keys.float(), []
    for chunk in positions.split(max(1, _CHUNK_LOGITS // (heads * group * num_tokens))):
        logits = seen.queries[:, :, chunk].float() @ keys.unsqueeze(1).transpose(-1, -2) * seen.scale
        if seen.softcap is not None:
            logits = seen.softcap * torch.tanh(logits / seen.softcap)
        later = torch.arange(num_tokens, device=keys.device) > chunk.unsqueeze(1)
        weights = logits.masked_fill_(later, float("-inf")).softmax(-1)[..., : num_pages * page_size]
        parts.append(weights.unflatten(-1, (num_pages, page_size)).amax((1, -1)))
    return torch.cat(parts, 1)


def _spread(keys: Tensor, rotation: Rotation) -> float:
    """Mean relative distance of keys [H, n, D] from the first one, once their rotation is undone."""
    if 2 * len(rotation.frequencies) > keys.shape[-1]:
        return float("inf")
    places = torch.arange(keys.shape[1], device=keys.device)
    undone = rotate(keys, places, rotation.frequencies, interleaved=rotation.interleaved, undo=True)
    distance = (undone - undone[:, :1]).norm(dim=-1) / undone[:, :1].norm(dim=-1).clamp(min=1e-20)
    return float(distance.mean())


def _collect(numbers: list[int]) -> Callable[[int], Any]:
    def note(number: int) -> None:
        numbers.append(number)

    return note


# --------------------------------------------------------------------------------------------------- the way into a forward

_watching: list[tuple[str, Callable[[int, Seen], None], frozenset[int]]] = []
"""What the present forward runs with and whom it shows its layers."""


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Show a paged layer's attention, then compute it as the model does."""
    implementation, see, layers = _watching[-1]
    layer = getattr(module, "layer_idx", None)
    if layer in layers:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        see(layer, Seen(query[0].unflatten(0, (key.shape[1], -1)), key[0], scale, kwargs.get("softcap")))
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    result: tuple[Tensor, Tensor | None] = attention(module, query, key, value, mask, scaling=scaling, **kwargs)
    return result


def _mask(*args: Any, **kwargs: Any) -> Any:
    return ALL_MASK_ATTENTION_FUNCTIONS[_watching[-1][0]](*args, **kwargs)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)
