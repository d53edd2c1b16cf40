"""The operations of the decode path, by backend.

`reference` is the specification and serves every device. On a CUDA device with triton, `decode.py` launches kernels for
steps of up to 16 tokens, and for the storing of all tokens:

    recipe.py      which of these serve a method, and with which numbers
    plan.py        plan_step                    zones and budget of a step
    outliers.py    find_outliers                ShadowKV's outliers, marked by page
    append.py      append                       tokens to pages and summaries
    score.py       score                        logits of the candidates; appends the step's token
    rate.py        rate                         scores of the candidates, counted in bins
    closer.py      closer, rate_closer          the best of them again, by keys in four bits;  rotate.py  queries for these
    estimate.py    estimate                     what stands for pages that were not chosen
    lowbit.py      encode_rows                  keys to four bits, outside of steps
    index.py       copy_page                    a page of many layers at once, for formulas in PyTorch
    select.py      choose                       the best pages, exactly, without sorting
    residency.py   (inside choose)              look-up, bucketed LRU, tables
    attention.py   attend                       loads on the way, split-KV attention, merge
    rows.py        copy_rows                    rows of chunked arrays, outside of steps
    fields.py      the two descriptors through which kernels find what grows;  common.py  what kernels share
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any

import torch

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
    quantize,
    rows_to_put,
    score_bins,
    select_top_pages,
    split_pages,
    take_rows,
)


@lru_cache(None)
def launchers(device: torch.device) -> Any:
    """The Triton kernels (see `launch.py`) for a device, or None where the reference operations serve it."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from .launch import launchers as found

    return found


def on_gpu() -> bool:
    """Whether there is a GPU that the Triton kernels serve."""
    return torch.cuda.is_available() and launchers(torch.device("cuda")) is not None


__all__ = [
    "NUM_BUCKETS",
    "admit_pages",
    "apply_attention_sinks",
    "attend",
    "dense_attention",
    "launchers",
    "list_pages",
    "merge_attention",
    "on_gpu",
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
