"""What one layer's pages will take, before there are any: from the model's config, or from the first states.

    layer_shapes     config               -> heads and their sizes of each paged layer (`attention/methods/layer_shapes.py`)
    tier_budget      shape, dtype, method -> bytes per page, and the caps they are held against (`storage/tier_budget.py`)
    check_spans  method               -> refused where its spans are longer than what is noted of a token can say

The layers themselves, the refusal of a batch (`memory/admission.py`) and `memory_plan.plan` count with the same budgets.
"""

from __future__ import annotations

import torch

from ..attention.methods.base import Method
from ..attention.methods.clustering import ClusteringMethod
from ..attention.methods.layer_shapes import LayerShape as LayerShape
from ..attention.methods.layer_shapes import layer_shapes as layer_shapes
from ..config import SpinOptions
from ..errors import OptionError
from ..storage.page_layout import page_layouts
from ..storage.page_store import chunk_segments
from ..storage.segment_pool import pages_of
from ..storage.summary_array import bytes_per_page, stored_as
from ..storage.tier_budget import TierBudget
from ..storage.token_permutation import bytes_for_clustering, longest_span


def num_arrays(shape: LayerShape, dtype: torch.dtype, method: Method, options: SpinOptions) -> int:
    """Chunked arrays of a layer: pages, summaries (int8 ones with their scales), and what a method that clusters notes."""
    quantized, own = options.quantizes(dtype.itemsize), method.summary_dtypes()
    shapes = method.summary_shapes(shape.key_dim, shape.value_dim)
    scales = sum(bool(vector) and stored_as(name, dtype, quantized, own)[1] for name, vector in shapes.items())
    return 1 + len(shapes) + scales + len(clustering_bytes(method))


def clustering_bytes(method: Method) -> dict[str, int]:
    """Bytes of a page that a method which clusters notes of it, by name."""
    return (
        bytes_for_clustering(method.page_size, method.multi_page_clusters)
        if isinstance(method, ClusteringMethod)
        else {}
    )


def check_spans(method: Method) -> None:
    """Raise OptionError where a method that clusters lets more tokens trade places than the cache can note."""
    longest = longest_span(method.page_size)
    if isinstance(method, ClusteringMethod) and method.span_tokens > longest:
        raise OptionError(
            f"{method.name}: expected span_tokens of at most {longest}, as how far a token moves is kept in 16 bits, got "
            f"{method.span_tokens}; cluster fewer tokens with one another"
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
    form, host_layout = page_layouts(page_size, shape.key_dim, shape.value_dim, dtype, options.host_int8)
    # Page frames are for what steps select; the few contexts that are attended to whole are read beside them.
    selected = options.budget if isinstance(options.budget, float) else -(-options.budget // page_size)
    return TierBudget(
        num_layers=num_layers,
        num_heads=shape.num_heads,
        page_bytes=form.row_bytes,
        host_page_bytes=host_layout.row_bytes,
        summary_bytes=sum(
            bytes_per_page(vector, *stored_as(name, dtype, quantized, own))
            for name, vector in method.summary_shapes(shape.key_dim, shape.value_dim).items()
        ),
        gpu_memory=gpu_memory,
        cpu_memory=options.cpu_memory,
        min_frames=pages_of(options.num_sink_tokens, page_size) + pages_of(options.recent_window, page_size) + 1,
        clustering_bytes=sum(clustering_bytes(method).values()),
        selected=selected,
        chunk_segments=chunk_segments(shape.num_heads, form.row_bytes, device) if device.type == "cuda" else 1,
    )
