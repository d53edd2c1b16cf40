"""The operations of the decode path, by backend.

`reference` is the specification and serves every device. On a CUDA device with triton, `backends/triton_step.py` launches
kernels for steps of up to 16 tokens, and for the storing of all tokens:

    recipe.py      which of these serve a method, and with which numbers
    plan.py        plan_step                    zones and budget of a step
    outliers.py    find_outliers                ShadowKV's outliers, marked by page
    append.py      append                       tokens to pages and summaries
    gates.py       gate_queries                 what SeerAttention scores pages by
    score.py       score                        logits of the candidates; appends the step's token
    rate.py        rate                         scores of the candidates, counted in bins
    closer.py      closer, rate_closer          the best of them again, by keys in four bits;  rotate.py  queries for these
    estimate.py    estimate                     what stands for pages that were not chosen
    lowbit.py      quantize, encode_pages       vectors to eight bits, keys to four, outside of steps
    tokens.py      move_tokens, page_means      tokens that change places, and pages of them, outside of steps
    bisect.py      bisect                       the places that Bisection gives to tokens
    nearest.py     k-means of points, without their matrix of likeness;  clusters.py  whole pages from it, outside of steps
    index.py       copy_page                    a page of many layers at once, for formulas in PyTorch
    select.py      choose                       the best pages, exactly, without sorting
    residency.py   (inside choose)              look-up, bucketed LRU, tables
    attention.py   attend                       loads on the way, split-KV attention, merge
    integration/batch_indices.py        rows_copier                  rows of chunked arrays, outside of steps
    ahead.py       what several launches need, compiled at once before the first of them
    gpu.py         what launches ask of a GPU: whether Triton multiplies on its tensor cores, and its shared memory
    page_form.py   in which form pages lie in their homes: as they came, or int8
    fields.py      the two descriptors through which kernels find what grows;  common.py  what kernels share
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..storage.page_layout import Int8Form, PageForm, page_forms
from . import reference
from .reference import (
    NUM_BUCKETS,
    admit_pages,
    apply_attention_sinks,
    attend,
    dense_attention,
    list_pages,
    merge_attention,
    page_zones,
    pages_down_to,
    put_rows,
    put_tokens,
    rows_to_put,
    score_bins,
    select_top_pages,
    split_pages,
    take_rows,
)

if TYPE_CHECKING:
    from .launch_table import Launchers


@lru_cache(None)
def launchers(device: torch.device) -> Launchers | None:
    """The launches of the Triton kernels on a device, or None where the reference operations serve it."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from .launch_table import launchers as found

    return found


def quantize(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.quantize`, by a kernel where there is one."""
    launch = launchers(vectors.device)
    return reference.quantize(vectors) if launch is None else launch.quantize(vectors)


def page_means(states: Tensor, valid: Tensor) -> Tensor:
    """`reference.page_means`, by a kernel where there is one."""
    launch = launchers(states.device)
    return reference.page_means(states, valid) if launch is None else launch.page_means(states, valid)


def move_tokens(content: Tensor, order: Tensor, page_size: int, parts: tuple[tuple[int, int], ...]) -> Tensor:
    """`reference.move_tokens`, by a kernel where there is one."""
    launch = launchers(content.device)
    move = reference.move_tokens if launch is None else launch.move_tokens
    return move(content, order, page_size, parts)


def on_gpu() -> bool:
    """Whether there is a GPU that the Triton kernels serve."""
    return torch.cuda.is_available() and launchers(torch.device("cuda")) is not None


__all__ = [
    "NUM_BUCKETS",
    "Int8Form",
    "PageForm",
    "admit_pages",
    "apply_attention_sinks",
    "attend",
    "dense_attention",
    "launchers",
    "list_pages",
    "merge_attention",
    "move_tokens",
    "on_gpu",
    "page_forms",
    "page_means",
    "page_zones",
    "pages_down_to",
    "put_rows",
    "put_tokens",
    "quantize",
    "rows_to_put",
    "score_bins",
    "select_top_pages",
    "split_pages",
    "take_rows",
]
