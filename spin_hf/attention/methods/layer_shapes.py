"""Numbers and sizes of the heads of a model's layers, read from its config."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cache
from typing import Any


@dataclass(frozen=True)
class LayerShape:
    """Heads of one layer: number of KV heads, dimensions of a key and of a value.

    `group` is the number of query heads per KV head; None if it is not known.
    """

    num_heads: int
    key_dim: int
    value_dim: int
    group: int | None = field(default=None, compare=False)


def layer_shapes(config: Any, layers: list[int]) -> list[LayerShape] | None:
    """Shapes of full-attention layers; None if the config does not give them.

    Args:
        config: the decoder's config.
        layers: indices of the layers in the model.
    """
    per_layer = getattr(config, "per_layer_config", None)
    shapes = [_shape(config)] * len(layers) if per_layer is None else [_shape(per_layer[index]) for index in layers]
    return None if None in shapes else shapes  # type: ignore[return-value]


@cache
def _parameters(kind: type) -> frozenset[str]:
    """Names of the arguments that make an object of a class."""
    return frozenset(inspect.signature(kind.__init__).parameters)  # type: ignore[misc]


def _shape(config: Any) -> LayerShape | None:
    known = _parameters(type(config))  # type: ignore[arg-type]

    def read(name: str) -> Any:
        """A field that the config's class declares. Models read no other fields."""
        knows = name in known or hasattr(type(config), name) or name in config.attribute_map
        return getattr(config, name, None) if knows else None

    query_heads, hidden = read("num_attention_heads"), read("hidden_size")
    heads, key_dim = read("num_key_value_heads"), read("head_dim")
    if heads is None:
        heads = 1 if read("multi_query") else query_heads
    if key_dim is None and isinstance(query_heads, int) and isinstance(hidden, int):
        key_dim = hidden // query_heads
    value_dim = read("v_head_dim") or key_dim
    if not all(isinstance(number, int) for number in (heads, key_dim, value_dim)):
        return None
    divides = isinstance(query_heads, int) and heads > 0 and query_heads % heads == 0
    return LayerShape(heads, key_dim, value_dim, query_heads // heads if divides else None)
