"""The launches of all Triton kernels, for `backends/` and methods, which do not import triton.

Each launch is a typed function in the file of its kernel. Launches of a decode step take a `Launch` first: `launch_now`, or
the one that `compile_ahead` passes. All other launches run their kernel at once.
"""

from __future__ import annotations

from .compile_ahead import compile_ahead, compile_behind, launch_now, wait_for_compiles
from .decode.append_tokens import append_tokens
from .decode.attend_pages import attend_pages
from .decode.attend_segments import attend_segments
from .decode.bin_scores import bin_scores
from .decode.estimate_rest import estimate_rest
from .decode.find_outliers import find_outliers
from .decode.gate_queries import gate_queries
from .decode.plan_zones import plan_zones
from .decode.project_queries import project_queries
from .decode.rank_pages import rank_pages
from .decode.rerank_pages import rerank_pages
from .decode.scan_pages import scan_pages
from .decode.score_pages import score_pages
from .decode.select_pages import select_pages
from .indexing.bisect import bisect
from .indexing.copy_page import copy_page
from .indexing.copy_rows import rows_copiers
from .indexing.encode_units import encode_last_unit, encode_units, tile_units
from .indexing.fill_clusters import fill_clusters, unit_vectors
from .indexing.permute_tokens import move_tokens, page_means
from .indexing.quantize import encode_pages, quantize
from .prompt.attend_blocks import attend_blocks
from .prompt.attend_resident_blocks import attend_resident_blocks
from .prompt.choose_blocks import choose_blocks
from .prompt.gather_tokens import gather_tokens
from .prompt.merge_partials import merge_attention, merge_into


class Launchers:
    """All launches as static methods."""

    launch_now = staticmethod(launch_now)
    compile_ahead = staticmethod(compile_ahead)
    compile_behind = staticmethod(compile_behind)
    wait_for_compiles = staticmethod(wait_for_compiles)

    plan_zones = staticmethod(plan_zones)
    find_outliers = staticmethod(find_outliers)
    append_tokens = staticmethod(append_tokens)
    gate_queries = staticmethod(gate_queries)
    score_pages = staticmethod(score_pages)
    project_queries = staticmethod(project_queries)
    scan_pages = staticmethod(scan_pages)
    bin_scores = staticmethod(bin_scores)
    rank_pages = staticmethod(rank_pages)
    rerank_pages = staticmethod(rerank_pages)
    select_pages = staticmethod(select_pages)
    estimate_rest = staticmethod(estimate_rest)
    attend_pages = staticmethod(attend_pages)
    attend_segments = staticmethod(attend_segments)

    quantize = staticmethod(quantize)
    encode_pages = staticmethod(encode_pages)
    bisect = staticmethod(bisect)
    unit_vectors = staticmethod(unit_vectors)
    fill_clusters = staticmethod(fill_clusters)
    move_tokens = staticmethod(move_tokens)
    page_means = staticmethod(page_means)
    rows_copiers = staticmethod(rows_copiers)
    copy_page = staticmethod(copy_page)
    encode_units = staticmethod(encode_units)
    encode_last_unit = staticmethod(encode_last_unit)
    tile_units = staticmethod(tile_units)

    gather_tokens = staticmethod(gather_tokens)
    merge_attention = staticmethod(merge_attention)
    merge_into = staticmethod(merge_into)
    choose_blocks = staticmethod(choose_blocks)
    attend_blocks = staticmethod(attend_blocks)
    attend_resident_blocks = staticmethod(attend_resident_blocks)


launchers = Launchers()
