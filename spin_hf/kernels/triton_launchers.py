"""The Triton kernels under short names, for `backends/triton_step.py`, which does not import triton."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import triton.language as tl
from triton.runtime.jit import KernelInterface

from .compile_ahead import Launch, compile_ahead
from .decode.append_tokens import append_kernel
from .decode.attend_pages import attend_kernel
from .decode.bin_scores import rate_kernel
from .decode.estimate_rest import estimate_kernel
from .decode.find_outliers import find_outliers_kernel
from .decode.gate_queries import gate_queries
from .decode.plan_zones import plan_step_kernel
from .decode.rerank_pages import closer_kernel, rate_closer_kernel
from .decode.score_pages import score_kernel
from .decode.select_pages import choose_kernel
from .indexing.bisect import bisect
from .indexing.copy_page import copy_page_kernel
from .indexing.copy_rows import rows_copier
from .indexing.fill_clusters import fill_clusters, unit_vectors
from .indexing.permute_tokens import move_tokens, page_means
from .indexing.quantize import encode_pages, quantize

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _compile_ahead(launches: Callable[[SimpleNamespace], None]) -> None:
    """`ahead.compile_ahead` for what a step launches by `launchers`: `launches` is given what stands for these."""

    def by(launch: Launch) -> None:
        entries = vars(launchers).items()
        stand_ins = {name: launch(found) if isinstance(found, KernelInterface) else found for name, found in entries}
        launches(SimpleNamespace(**stand_ins))

    compile_ahead(by)


launchers = SimpleNamespace(
    append=append_kernel, attend=attend_kernel, bisect=bisect, choose=choose_kernel,
    closer=closer_kernel, copy_page=copy_page_kernel, encode_pages=encode_pages,
    estimate=estimate_kernel, fill_clusters=fill_clusters, find_outliers=find_outliers_kernel,
    gate_queries=gate_queries, move_tokens=move_tokens,
    page_means=page_means, plan_step=plan_step_kernel, quantize=quantize, rate=rate_kernel,
    rate_closer=rate_closer_kernel, rows_copier=rows_copier, score=score_kernel, unit_vectors=unit_vectors,
    dtype=_DTYPES.__getitem__, compile_ahead=_compile_ahead,
)  # fmt: skip
"""kernel[grid](...) for each name of a step, and functions that launch by themselves; `dtype` translates torch's."""
