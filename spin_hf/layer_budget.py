"""What one layer's pages will take, before there are any: from the model's config, or from the first states.

    layer_shapes     config               -> heads and their sizes of each paged layer
    tier_budget      shape, dtype, method -> bytes per page, and the caps they are held against (`storage/budget.py`)
    check_stretches  method               -> refused where its stretches are longer than what is noted of a token can say

The layers themselves, the refusal of a batch (`admission.py`) and `memory_plan.plan` count with the same budgets.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from .attention.partition import Method
from .attention.regrouping import Regrouping
from .config import SpinOptions
from .errors import OptionError
from .kernels import page_forms
from .step_plan import pages_of
from .storage.budget import TierBudget
from .storage.pages import chunk_segments
from .storage.regrouped import bytes_for_regrouping, longest_stretch
from .storage.summaries import bytes_per_page, kept_as


@dataclass(frozen=True)
class LayerShape:
    """Heads of one layer: KV heads, and elements of a key and of a value."""

    num_heads: int
    key_dim: int
    value_dim: int


def layer_shapes(config: Any, layers: list[int]) -> list[LayerShape] | None:
    """Shapes of full-attention layers as the config has them; None where it does not say.

    Args:
        config: the decoder's config.
        layers: their numbers in the model.
    """
    per_layer = getattr(config, "per_layer_config", None)
    shapes = [_shape(config if per_layer is None else per_layer[index]) for index in layers]
    return None if None in shapes else shapes  # type: ignore[return-value]


def _shape(config: Any) -> LayerShape | None:
    known = set(inspect.signature(type(config).__init__).parameters)

    def read(name: str) -> Any:
        """What the config has under a name that its class knows: a model reads nothing else."""
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
    return LayerShape(heads, key_dim, value_dim)


def num_arrays(shape: LayerShape, dtype: torch.dtype, method: Method, options: SpinOptions) -> int:
    """Chunked arrays of a layer: pages, summaries (int8 ones with their scales), and what a method that regroups notes."""
    quantized, own = options.quantizes(dtype.itemsize), method.summary_dtypes()
    shapes = method.summary_shapes(shape.key_dim, shape.value_dim)
    scales = sum(bool(vector) and kept_as(name, dtype, quantized, own)[1] for name, vector in shapes.items())
    return 1 + len(shapes) + scales + len(regrouping_bytes(method))


def regrouping_bytes(method: Method) -> dict[str, int]:
    """Bytes of a page that a method which regroups notes of it, by name."""
    return bytes_for_regrouping(method.page_size, method.several_pages) if isinstance(method, Regrouping) else {}


def check_stretches(method: Method) -> None:
    """Raise OptionError where a method that regroups lets more tokens trade places than the cache can note."""
    longest = longest_stretch(method.page_size)
    if isinstance(method, Regrouping) and method.stretch_tokens > longest:
        raise OptionError(
            f"{method.name}: expected stretch_tokens of at most {longest}, as how far a token moves is kept in 16 bits, got "
            f"{method.stretch_tokens}; regroup fewer tokens with one another"
        )


def tier_budget(
    shape: LayerShape, dtype: torch.dtype, method: Method, options: SpinOptions, gpu_memory: int | None, num_layers: int,
    device: torch.device,
) -> TierBudget:  # fmt: skip
    """The budget of a layer.

    Args:
        dtype: of its keys and values.
        gpu_memory: the cap in bytes, with "auto" settled; None for none.
        num_layers: paged layers of the cache.
        device: the compute tier.
    """
    page_size, own = method.page_size, method.summary_dtypes()
    quantized = options.quantizes(dtype.itemsize)
    form, host_form = page_forms(page_size, shape.key_dim, shape.value_dim, dtype, options.host_int8)
    # Page frames are for what steps select; the few contexts that are attended to whole are read beside them.
    selected = options.budget if isinstance(options.budget, float) else -(-options.budget // page_size)
    return TierBudget(
        num_layers=num_layers,
        num_heads=shape.num_heads,
        page_bytes=form.row_bytes,
        host_page_bytes=host_form.row_bytes,
        summary_bytes=sum(
            bytes_per_page(vector, *kept_as(name, dtype, quantized, own))
            for name, vector in method.summary_shapes(shape.key_dim, shape.value_dim).items()
        ),
        gpu_memory=gpu_memory,
        cpu_memory=options.cpu_memory,
        min_frames=pages_of(options.num_sink_tokens, page_size) + pages_of(options.recent_window, page_size) + 1,
        regrouping_bytes=sum(regrouping_bytes(method).values()),
        selected=selected,
        chunk_segments=chunk_segments(shape.num_heads, form.row_bytes, device) if device.type == "cuda" else 1,
    )
