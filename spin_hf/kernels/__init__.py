"""The operations of the decode path, by backend.

`reference` is the specification and serves every device; faster twins of its functions are dispatched to from here,
under the same names and signatures, so that callers import from `spin_hf.kernels` alone.
"""

from .reference import (
    NUM_BUCKETS,
    admit_pages,
    apply_attention_sinks,
    attend,
    dense_attention,
    list_pages,
    merge_attention,
    page_zones,
    put_rows,
    put_tokens,
    select_top_pages,
    split_pages,
    take_rows,
)

__all__ = [
    "NUM_BUCKETS",
    "admit_pages",
    "apply_attention_sinks",
    "attend",
    "dense_attention",
    "list_pages",
    "merge_attention",
    "page_zones",
    "put_rows",
    "put_tokens",
    "select_top_pages",
    "split_pages",
    "take_rows",
]
