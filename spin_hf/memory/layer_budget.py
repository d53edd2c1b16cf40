"""Memory budget of a layer before it has pages, from the model's config or from its first keys and values.

    layer_shapes  config               -> heads and head sizes of each paged layer (`attention/methods/layer_shapes.py`)
    tier_budget   shape, dtype, method -> bytes per page, and caps (`storage/tier_budget.py`)
    check_spans   method               -> raises OptionError if a span is longer than int16 shifts can express

Layers, admission control (`memory/admission.py`) and `memory/plan.py` use the same budgets.
"""

from __future__ import annotations

import math

import torch

from ..attention.methods.base import Method
from ..attention.methods.clustering import ClusteringMethod
from ..attention.methods.layer_shapes import LayerShape as LayerShape
from ..attention.methods.layer_shapes import layer_shapes as layer_shapes
from ..config import SpinOptions
from ..errors import OptionError
from ..storage.page_layout import page_layouts
from ..storage.segment_pool import pages_of
from ..storage.summary_array import bytes_per_page, stored_as
from ..storage.tier_budget import TierBudget, chunk_segments
from ..storage.token_permutation import bytes_for_clustering, longest_span


def num_arrays(shape: LayerShape, dtype: torch.dtype, method: Method, options: SpinOptions) -> int:
    """Number of chunked arrays of a layer: pages, summaries, scales of int8 summaries, and tables of clustering."""
    quantized, own = options.quantizes(dtype.itemsize), method.summary_dtypes()
    shapes = method.summary_shapes(shape.key_dim, shape.value_dim)
    scales = sum(bool(vector) and stored_as(name, dtype, quantized, own)[1] for name, vector in shapes.items())
    return 1 + len(shapes) + scales + len(clustering_bytes(method))


def clustering_bytes(method: Method) -> dict[str, int]:
    """Bytes per page of the tables of clustering, by name. Empty for methods that do not cluster."""
    if not isinstance(method, ClusteringMethod):
        return {}
    return bytes_for_clustering(method.page_size, method.multi_page_clusters)


def check_spans(method: Method) -> None:
    """Raise OptionError if the spans of a method are longer than int16 shifts can express."""
    longest = longest_span(method.page_size)
    if isinstance(method, ClusteringMethod) and method.span_tokens > longest:
        raise OptionError(
            f"{method.name}: expected span_tokens of at most {longest}, as token shifts are stored as int16, got "
            f"{method.span_tokens}; lower span_tokens"
        )


def tier_budget(
    shape: LayerShape, dtype: torch.dtype, method: Method, options: SpinOptions, gpu_memory: int | None, num_layers: int,
    device: torch.device, host_layers: int = 0,
) -> TierBudget:  # fmt: skip
    """The budget of a layer.

    Args:
        dtype: of its keys and values.
        gpu_memory: the cap in bytes, with "auto" resolved; None for none.
        num_layers: paged layers of the cache on the device.
        device: the compute tier.
        host_layers: paged layers of the cache on all devices; 0 for `num_layers`.
    """
    page_size, own = method.page_size, method.summary_dtypes()
    quantized = options.quantizes(dtype.itemsize)
    layout, host_layout = page_layouts(page_size, shape.key_dim, shape.value_dim, dtype, options.host_int8)
    # Frames are sized for selected pages, not for the rare contexts that are attended to densely.
    selected = options.budget if isinstance(options.budget, float) else -(-options.budget // page_size)
    segments = chunk_segments(shape.num_heads, layout.row_bytes, device, options.tuning)
    summary_bytes = sum(
        bytes_per_page(vector, *stored_as(name, dtype, quantized, own), method.pages_per_row.get(name, 1))
        for name, vector in method.summary_shapes(shape.key_dim, shape.value_dim).items()
    )
    own_fitted = method.fitted_dtypes()
    sequence_bytes = sum(
        math.prod(tensor) * own_fitted.get(name, torch.float32).itemsize
        for name, tensor in method.fitted_shapes(shape.key_dim, shape.value_dim).items()
    )
    return TierBudget(
        num_layers=num_layers, num_heads=shape.num_heads, page_bytes=layout.row_bytes, host_page_bytes=host_layout.row_bytes,
        summary_bytes=summary_bytes, gpu_memory=gpu_memory, cpu_memory=options.cpu_memory,
        min_frames=pages_of(options.num_sink_tokens, page_size) + pages_of(options.recent_window, page_size) + 1,
        clustering_bytes=sum(clustering_bytes(method).values()), sequence_bytes=sequence_bytes, selected=selected,
        chunk_segments=segments if device.type == "cuda" else 1, host_layers=host_layers,
    )  # fmt: skip
