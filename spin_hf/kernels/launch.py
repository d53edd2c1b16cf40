"""The Triton kernels under short names, for `decode.py`, which does not import triton."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import triton.language as tl
from triton.runtime.jit import KernelInterface

from .ahead import Launch, compile_ahead
from .append import append_kernel
from .attention import attend_kernel
from .bisect import bisect
from .closer import closer_kernel, rate_closer_kernel
from .clusters import fill_clusters, unit_vectors
from .estimate import estimate_kernel
from .gates import gate_queries
from .index import copy_page_kernel
from .lowbit import encode_pages, quantize
from .outliers import find_outliers_kernel
from .plan import plan_step_kernel
from .rate import rate_kernel
from .rows import rows_copier
from .score import score_kernel
from .select import choose_kernel
from .tokens import move_tokens, page_means

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
