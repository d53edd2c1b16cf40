"""Decides which layers of a model are paged. The others use transformers' own cache layers.

full attention                  SpinLayer, except in the models named below
sliding or chunked attention    transformers' own: stores the window only
linear attention, convolution   transformers' own: its state does not grow
shared KV, no attention         transformers' own placeholder
latent attention (MLA)          transformers' own: caches latents, which are expanded after `update`
cross attention                 transformers' own: caches tokens of an image, not of the text
hybrid and indexed attention    transformers' own: their `update` takes more than keys and values

No layer is paged in models that attend with other keys or values than they cache, run layers several times, or branch on the
name of the attention implementation. docs/families.md lists them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from ..errors import OptionTypeError, UnsupportedModelError

PLACEHOLDER = "no cache of its own"
"""The reason for a layer that shares another layer's keys or has no attention."""

# Families that compute attention themselves and never call the attention interface.
_OLD_FAMILIES = {
    "bark", "big_bird", "bloom", "clvp_decoder", "codegen", "coarse_acoustics", "cpmant", "ctrl", "falcon", "flaubert", "git",
    "gpt_neo", "gpt_neox_japanese", "gptj", "imagegpt", "megatron-bert", "mpt", "mvp", "openai-gpt", "prophetnet", "reformer",
    "rembert", "roformer", "rwkv", "semantic", "trocr", "xglm", "xlm", "xlnet",
}  # fmt: skip

_OTHER_STATES = {
    "diffllama": "differential attention: values are split in two after update, attended densely",
    "jetmoe": "mixture of attention heads: keys and values are repeated after update, attended densely",
}
"""Model types that attend with other keys or values than they cache, and the reason to report."""


def decoder_config(model: Any) -> tuple[Any, str]:
    """The config that the attention modules of a model read, and the model's name for messages.

    Args:
        model: a model or its config.
    Raises:
        OptionTypeError: `model` is neither.
    """
    config = getattr(model, "config", model)
    if not isinstance(config, PreTrainedConfig):
        raise OptionTypeError(
            f"model: expected a transformers model or its config, got {type(model).__name__}; pass the model"
        )
    name = type(model).__name__ if model is not config else (config.architectures or [type(config).__name__])[0]
    if config.is_encoder_decoder:
        return config, name
    return config.get_text_config(decoder=True), name


def check_model(config: Any, name: str) -> None:
    """Raise UnsupportedModelError if no SpinCache can serve the model.

    Args:
        config: the model's decoder config.
        name: the model's name in messages.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model, expected a decoder-only one; use transformers' EncoderDecoderCache"
        )
    if not hasattr(config, "num_hidden_layers") or not hasattr(config, "_attn_implementation"):
        raise UnsupportedModelError(
            f"{name}: expected the config of a decoder with attention layers; use a causal language model"
        )
    if config.model_type in _OLD_FAMILIES:
        raise UnsupportedModelError(
            f"{name} ({config.model_type}) computes attention without transformers' attention interface, so no cache "
            "can choose what it attends to; expected a model that calls it; use a DynamicCache"
        )


def build_layers(config: Any, paged: Callable[[int], Any]) -> tuple[list[Any], dict[str, int]]:
    """The cache layers of a model.

    Args:
        config: the decoder's config.
        paged: makes the paged layer of a layer index; or only notes the index.
    Returns:
        the layers, and reason -> number of layers that are not paged for it.
    """
    layers: list[Any] = []
    reasons: dict[str, int] = {}
    found = DynamicCache(config=config).layers
    of_all = _reason_none_is_paged(config, found)
    crossing = getattr(config, "cross_attention_layers", None) or ()
    for index, layer in enumerate(found):
        reason = "cross attention: tokens of an image" if index in crossing else _reason_not_paged(layer, of_all)
        layers.append(paged(index) if reason is None else layer)
        if reason is not None:
            reasons[reason] = reasons.get(reason, 0) + 1
    return layers, reasons


def is_placeholder(layer: Any) -> bool:
    """Whether a cache layer is a placeholder without keys, values or state."""
    return not isinstance(layer, (CacheLayerMixin, LinearAttentionCacheLayerMixin))


def rope_depends_on_length(config: Any) -> bool:
    """Whether rotary frequencies of a model depend on the length of the whole text."""
    return any(f"'{kind}'" in str(getattr(config, "rope_parameters", None)) for kind in ("dynamic", "longrope"))


def layers_with_contents(layers: list[Any]) -> list[Any]:
    """`layers` without the last ones that share other layers' keys. Before 5.18 transformers does not list them."""
    count = len(layers)
    while count and is_placeholder(layers[count - 1]):
        count -= 1
    return layers[:count]


def is_croppable(layer: Any) -> bool:
    """Whether tokens can be removed from a cache layer, however many it holds: not from windows, nor from states."""
    if is_placeholder(layer) or type(layer) is DynamicLayer:
        return True
    return isinstance(layer, CacheLayerMixin) and layer.is_croppable and not isinstance(layer, DynamicLayer)


def _reason_none_is_paged(config: Any, layers: list[Any]) -> str | None:
    """The reason why none of a model's full-attention layers is paged; None if they are."""
    if getattr(config, "kv_lora_rank", None) is not None:
        return "latent attention: cached latents are expanded after update, attended densely"
    if getattr(config, "model_type", None) in _OTHER_STATES:
        return _OTHER_STATES[config.model_type]
    if getattr(config, "qk_layer_norms", False):
        return "keys are normalised after update, attended densely"
    if (getattr(config, "n_recurrent_loops", None) or getattr(config, "loop_num_passes", None) or 1) > 1:
        return "looped layers: the model adds cache layers of its own, attended densely"
    for layer in layers:  # models with other layer classes branch on the implementation's name and do not know "spin"
        plain = type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        if isinstance(layer, CacheLayerMixin) and not plain and not isinstance(layer, LinearAttentionCacheLayerMixin):
            return f"beside {type(layer).__name__}: the model chooses tokens by itself, attended densely"
    return None


def _reason_not_paged(layer: Any, of_all: str | None) -> str | None:
    if type(layer) is DynamicLayer:
        return of_all
    if type(layer) is DynamicSlidingWindowLayer:
        return "sliding window: only the window is kept"
    if not isinstance(layer, CacheLayerMixin):
        linear = isinstance(layer, LinearAttentionCacheLayerMixin)
        return "linear attention: state of fixed size" if linear else PLACEHOLDER
    return f"{type(layer).__name__}: kept by transformers, attended densely"
