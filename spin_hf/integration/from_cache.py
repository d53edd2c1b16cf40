"""`SpinCache.from_cache`: checks another cache against the model, then copies its contents."""

from __future__ import annotations

from collections.abc import Collection
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from ..attention.methods.layer_shapes import LayerShape, layer_shapes
from ..errors import BatchSizeError, OptionError, OptionTypeError
from .tensor_parallel import local_shapes, tp_size


def check_source(
    cache: Any, layers: list[Any], paged: Collection[int], config: Any, mask: Tensor | None, model: Any = None
) -> Tensor | None:
    """Check that `take_over` can copy `cache` into `layers`. Changes nothing.

    Args:
        cache: the source.
        layers: layers of the new cache.
        paged: indices of the paged layers.
        config: the decoder's config.
        mask: [B, tokens], 0 or False for padding; None for no padding.
        model: the model, of which this rank may have some heads only; None if it is not known.
    Returns:
        the mask as bool.
    Raises:
        OptionTypeError: `cache` is not a transformers cache, or `mask` not a padding mask.
        OptionError: the layers of `cache` do not match the model or each other.
        BatchSizeError: `mask` has another shape than [sequences, tokens] of `cache`.
    """
    if not isinstance(cache, Cache):
        raise OptionTypeError(f"cache: expected a transformers Cache, got {type(cache).__name__}; pass a DynamicCache")
    if len(cache.layers) not in (0, len(layers)):
        raise OptionError(
            f"cache: expected {len(layers)} layers as the model has, got {len(cache.layers)}; pass a cache of this model"
        )
    shapes = local_shapes(layer_shapes(config, sorted(paged)), model)
    is_known = tp_size(model) > 1 or not _is_distributed()
    expected, first = iter(shapes if shapes and is_known else []), None
    for index, (layer, source) in enumerate(zip(layers, cache.layers, strict=False)):
        if index not in paged:
            if isinstance(layer, LinearAttentionCacheLayerMixin) != isinstance(source, LinearAttentionCacheLayerMixin):
                raise OptionError(
                    f"cache: layer {index}: expected a {type(layer).__name__} as the model has, got a "
                    f"{type(source).__name__}; pass a DynamicCache(config=model.config)"
                )
            continue
        sizes = _sizes(source, index, next(expected, None))
        first = first or (index, sizes)
        if sizes != first[1]:
            raise OptionError(
                f"cache: expected layers that are alike, got [sequences, tokens] and dtype {first[1]} in layer {first[0]} and "
                f"{sizes} in layer {index}; pass a cache that one model has filled"
            )
    return _checked_mask(mask, first[1] if first is not None else None)


def take_over(cache: Cache, layers: list[Any], paged: Collection[int], valid: Tensor | None) -> None:
    """Append the contents of `cache`, which `check_source` has accepted, to an empty SpinCache. Commits nothing.

    Args:
        layers: layers of the SpinCache. Those that are not paged are replaced by copies of the source's.
        paged: indices of the paged layers.
        valid: [B, tokens], bool; None for no padding.
    """
    for index, (layer, source) in enumerate(zip(list(layers), cache.layers, strict=False)):
        if index not in paged:
            layers[index] = deepcopy(source)
        elif source.keys is not None and source.keys.numel():
            layer.append(source.keys, source.values, valid)


def _sizes(source: Any, index: int, shape: LayerShape | None) -> tuple[Any, ...] | None:
    """((sequences, tokens), dtype) of a layer; None if it is empty. Raises OptionError if it cannot be paged."""
    keys, values = getattr(source, "keys", None), getattr(source, "values", None)
    if keys is None or values is None or not keys.numel():
        return None
    if keys.dim() != 4 or values.shape[:3] != keys.shape[:3] or values.dim() != 4:
        raise OptionError(
            f"cache: layer {index}: expected keys and values [sequences, heads, tokens, size], got {tuple(keys.shape)} and "
            f"{tuple(values.shape)}; pass a DynamicCache that the model has filled"
        )
    if keys.shape[-2] != source.get_seq_length():
        raise OptionError(
            f"cache: layer {index} holds only a window of its tokens, expected all; "
            "pass a DynamicCache(config=model.config)"
        )
    found = LayerShape(keys.shape[1], keys.shape[3], values.shape[3])
    if shape is not None and found != shape:
        raise OptionError(
            f"cache: layer {index}: expected {shape} as the model has, got {found}; pass a cache of this model"
        )
    if keys.dtype != values.dtype or not keys.is_floating_point():
        raise OptionError(
            f"cache: layer {index}: expected keys and values of one floating-point dtype, got {keys.dtype} and "
            f"{values.dtype}; pass a DynamicCache that the model has filled"
        )
    return (keys.shape[0], keys.shape[2]), keys.dtype


def _is_distributed() -> bool:
    """Whether the model may be distributed in a way that is not known here, so that a rank has some of the heads."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _checked_mask(mask: Tensor | None, sizes: tuple[Any, ...] | None) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_complex():
        what = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise OptionTypeError(
            f"attention_mask: expected a padding mask [sequences, tokens], got {what}; pass the tokenizer's attention_mask"
        )
    if sizes is not None and tuple(mask.shape) != sizes[0]:
        raise BatchSizeError(
            f"attention_mask: expected {list(sizes[0])}, the sequences and tokens that the cache holds, got "
            f"{list(mask.shape)}; pass the mask of all tokens held"
        )
    return mask.bool()
