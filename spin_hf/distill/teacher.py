"""A frozen model as the teacher of gates: its attention by page, and the RoPE frequencies of its keys.

    forward of a text   --attention "spin_hf_teacher"-->  LayerAttention of one paged layer after the other
    LayerAttention      --page_attention-->   per KV head, query and page: the largest weight over the page's tokens and the
                                              group's query heads; in chunks of queries, never tokens x tokens
    one token repeated  --find_rotations-->   keys that differ by RoPE alone, so its frequencies can be found

The model's outputs do not change. Importing this module registers the attention function and its mask function.
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
from ..integration.layer_types import build_layers, check_model, rope_depends_on_length

_NAME = "spin_hf_teacher"
_PROBE_TOKENS = 256
_MOST_TOKENS_TRIED = 8
_CHUNK_LOGITS = 1 << 24
"""Attention weights in memory at a time while targets are computed: 64 MiB."""


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one layer over a text of n tokens.

    Attributes:
        queries: [H, G, n, D], query heads by KV head, after RoPE.
        keys: [H, n, D], after RoPE.
        scale: factor of the scores.
        softcap: softcap of the scores; None for none.
    """

    queries: Tensor
    keys: Tensor
    scale: float
    softcap: float | None


@dataclass(frozen=True)
class Rotation:
    """The RoPE of a layer's keys: arguments of `attention.methods.seer_gates.rotate`."""

    frequencies: Tensor
    interleaved: bool


class Teacher:
    """A frozen model with observable attention.

    Args:
        model: a causal language model. It is set to evaluation mode, and `requires_grad` of its parameters to False.
    Raises:
        UnsupportedModelError: no layer of the model would be paged.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = model.config.get_text_config(decoder=True)
        name = type(model).__name__
        check_model(self.config, name)
        self.layers: list[int] = []
        """Indices of the paged layers in the model."""
        _, reasons = build_layers(self.config, self.layers.append)
        if not self.layers:
            raise UnsupportedModelError(f"{name}: expected layers with full attention, got none ({reasons})")

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device = self.model.device
        assert isinstance(device, torch.device)
        return device

    @torch.no_grad()
    def watch(self, ids: Tensor, see: Callable[[int, LayerAttention], None]) -> None:
        """Run the model over `ids` [n] and call `see(layer, attention)` at each paged layer, by its index in the model.

        Raises:
            UnsupportedModelError: a layer did not call the attention function.
        """
        wanted, config = set(self.layers), self.config
        before, config._attn_implementation = config._attn_implementation, _NAME

        def shown(layer: int, seen: LayerAttention) -> None:
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
        """The RoPE of each paged layer, found by experiment.

        In a text of one repeated token all values of a layer are equal, so the outputs of attention are equal, and so are the
        keys before RoPE. The frequencies are those of the model's `inv_freq` buffers whose inverse RoPE makes the keys equal
        again. Some tokens are ambiguous, for example one with a zero embedding: their keys are equal with and without RoPE.
        Then other tokens are tried.

        Args:
            token: the token to try first.
        Raises:
            UnsupportedModelError: no frequencies make the keys equal, they depend on the length of the text, or all keys are
                zero for every token.
        """
        name, parameters = type(self.model).__name__, getattr(self.config, "rope_parameters", None)
        if rope_depends_on_length(self.config):
            raise UnsupportedModelError(
                f"{name}: expected a rotation that does not depend on the length of the text, got {parameters}; use ShadowKV"
            )
        options = [Rotation(torch.zeros(0, device=self.device), False)]
        for buffer, values in self.model.named_buffers():
            if buffer.endswith("inv_freq") and "original" not in buffer:
                options += [Rotation(values.detach().float().clone(), interleaved) for interleaved in (False, True)]
        # With a large key bias all candidates come close: in bfloat16 0.2 % for the right rotation, 1.2 % for the next best.
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 5e-3
        found: dict[int, Rotation] = {}
        ambiguous: dict[int, Rotation] = {}
        for candidate in self._tokens(token):
            keys = self._keys_of(candidate)
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
                unique = not (by_rotating and spread[0] < tolerance)
                (found if unique else ambiguous).setdefault(layer, options[best])
            if len(found) == len(self.layers):
                break
        unknown = [layer for layer in self.layers if layer not in found and layer not in ambiguous]
        if unknown:
            raise UnsupportedModelError(
                f"{name}: expected keys that tell how they are rotated, got only zeros in layers {unknown}, whichever token is "
                "read; load trained weights, or use ShadowKV, which needs no gates"
            )
        return {layer: found.get(layer) or ambiguous[layer] for layer in self.layers}

    def _tokens(self, first: int) -> list[int]:
        """A token, then others spread over the vocabulary."""
        embeddings = self.model.get_input_embeddings()
        number = int(embeddings.weight.shape[0])
        return list(dict.fromkeys([first, *(number * i // _MOST_TOKENS_TRIED for i in range(1, _MOST_TOKENS_TRIED))]))

    def _keys_of(self, token: int) -> dict[int, Tensor]:
        """Keys [H, n, D], float32, of each paged layer for a text of one repeated token."""
        keys: dict[int, Tensor] = {}
        self.watch(torch.full((_PROBE_TOKENS,), token), lambda layer, seen: keys.update({layer: seen.keys.float()}))
        return keys


def page_attention(seen: LayerAttention, positions: Tensor, page_size: int) -> Tensor:
    """Attention by page: the largest weight over the page's tokens and the group's query heads.

    Args:
        positions: [Q], int64, ascending: positions of the queries.
    Returns:
        [H, Q, n // page_size], float32; zero for pages after the query.
    """
    heads, group, num_tokens, _ = seen.queries.shape
    num_pages = num_tokens // page_size
    keys, chunks = seen.keys.float(), []
    for chunk in positions.split(max(1, _CHUNK_LOGITS // (heads * group * num_tokens))):
        logits = seen.queries[:, :, chunk].float() @ keys.unsqueeze(1).transpose(-1, -2) * seen.scale
        if seen.softcap is not None:
            logits = seen.softcap * torch.tanh(logits / seen.softcap)
        later = torch.arange(num_tokens, device=keys.device) > chunk.unsqueeze(1)
        weights = logits.masked_fill_(later, float("-inf")).softmax(-1)[..., : num_pages * page_size]
        chunks.append(weights.unflatten(-1, (num_pages, page_size)).amax((1, -1)))
    return torch.cat(chunks, 1)


def _spread(keys: Tensor, rotation: Rotation) -> float:
    """Mean relative distance of keys [H, n, D] from the first one, after the inverse of `rotation`."""
    if 2 * len(rotation.frequencies) > keys.shape[-1]:
        return float("inf")
    positions = torch.arange(keys.shape[1], device=keys.device)
    keys = rotate(keys, positions, rotation.frequencies, interleaved=rotation.interleaved, undo=True)
    distance = (keys - keys[:, :1]).norm(dim=-1) / keys[:, :1].norm(dim=-1).clamp(min=1e-20)
    return float(distance.mean())


# ------------------------------------------------------------------------------------- registered with transformers

_watching: list[tuple[str, Callable[[int, LayerAttention], None], frozenset[int]]] = []
"""The running forward: the model's attention implementation, the callback, and the layers to observe."""


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Pass a paged layer's attention to the callback, then compute it as the model does."""
    implementation, see, layers = _watching[-1]
    layer = getattr(module, "layer_idx", None)
    if layer in layers:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        see(layer, LayerAttention(query[0].unflatten(0, (key.shape[1], -1)), key[0], scale, kwargs.get("softcap")))
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    result: tuple[Tensor, Tensor | None] = attention(module, query, key, value, mask, scaling=scaling, **kwargs)
    return result


def _mask(*args: Any, **kwargs: Any) -> Any:
    return ALL_MASK_ATTENTION_FUNCTIONS[_watching[-1][0]](*args, **kwargs)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)
