"""Split-KV attention over the list of pages, with the loads on the way and the merge at the end: one launch.

    program (b * H + h, split)   reads its share of the list: tiles of pages, by address
                                 a missing page comes from host memory, is used, and is stored to its page frame
                                 writes its part; the last program of a (sequence, KV head) merges all parts

Reading a missing page and attending to it is one access: the tokens are in registers when they arrive, and programs
whose pages are resident go on meanwhile. The specification is `kernels.attend` and `kernels.merge_attention`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import LIST_CAPACITY, LIST_PAGE, LIST_SOURCE, LIST_TARGET, POSITION, tokens_valid


@triton.jit
def attend_kernel(
    step, query, out, sinks, list_count, parts, part_lse, arrivals, query_index, num_queries,
    query_b, query_h, out_b, out_h, scale, softcap,
    CAPPED: tl.constexpr, SINKS: tl.constexpr, H: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PAGE: tl.constexpr,
    TILE_PAGES: tl.constexpr, SPLITS: tl.constexpr, ALL_SPLITS: tl.constexpr, MERGED_G: tl.constexpr,
    MERGED_SPLITS: tl.constexpr,
    PADDED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """See the module's head.

    Args:
        query: [B, H * G, 1, DK], one of the step's `num_queries`; the last dimension is contiguous.
        list_count: as `choose_kernel` left it.
        out: [B, 1, H * G, DV]. Written.
        sinks: float [H * G], logits in the denominator, read where SINKS.
        parts: float32 [B * H, SPLITS, G, DV]; part_lse: float32 [B * H, SPLITS, BLOCK_G]. Scratch.
        arrivals: int32 [B * H]: zeros, and zeros again afterwards.
        DTYPE: of the pages.
    """
    bh = tl.program_id(0)
    split = tl.program_id(1)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    start = tl.load(step + POSITION)
    position, length = start + query_index, start + num_queries
    capacity = tl.load(step + LIST_CAPACITY)
    listed = tl.load(step + LIST_PAGE).to(tl.pointer_type(tl.int32)) + bh * capacity
    source = tl.load(step + LIST_SOURCE).to(tl.pointer_type(tl.int64)) + bh * capacity
    target = tl.load(step + LIST_TARGET).to(tl.pointer_type(tl.int64)) + bh * capacity
    count = tl.load(list_count + bh * 2)
    missing = tl.load(list_count + bh * 2 + 1)
    group = tl.arange(0, BLOCK_G)
    column_k = tl.arange(0, BLOCK_K)
    column_v = tl.arange(0, BLOCK_V)
    queries = tl.load(
        query + b * query_b + (h * G + group)[:, None] * query_h + column_k[None, :],
        mask=(group < G)[:, None] & (column_k < DK)[None, :], other=0.0,
    ).to(DTYPE)  # fmt: skip
    place = tl.arange(0, TILE_PAGES * PAGE)
    within = place % PAGE
    most = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    share = tl.cdiv(tl.cdiv(count, TILE_PAGES), SPLITS) * TILE_PAGES
    begin = split * share
    stop = tl.minimum(begin + share, count)
    for first in range(begin, stop, TILE_PAGES):
        entry = first + place // PAGE
        here = entry < stop
        page = tl.load(listed + entry, mask=here, other=-1)
        address = tl.load(source + entry, mask=here, other=0)
        here = page >= 0
        token = page.to(tl.int64) * PAGE + within
        allowed = here & (token <= position)
        if PADDED:
            allowed = tokens_valid(step, b, token, allowed)
        pointer = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        place_k = within[:, None] * DK + column_k[None, :]
        place_v = PAGE * DK + within[:, None] * DV + column_v[None, :]
        filled = here & (token < length)  # what stands in other places may be NaN
        inside_k = filled[:, None] & (column_k < DK)[None, :]
        inside_v = filled[:, None] & (column_v < DV)[None, :]
        keys = tl.load(pointer[:, None] + place_k, mask=inside_k, other=0.0)
        values = tl.load(pointer[:, None] + place_v, mask=inside_v, other=0.0)
        if missing > 0:
            frame = tl.load(target + entry, mask=here, other=0)
            resident = tl.multiple_of(frame.to(tl.pointer_type(DTYPE)), 16)
            tl.store(resident[:, None] + place_k, keys, mask=inside_k & (frame != 0)[:, None])
            tl.store(resident[:, None] + place_v, values, mask=inside_v & (frame != 0)[:, None])
        if PADDED:
            values = tl.where(allowed[:, None], values, 0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if CAPPED:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # softcap * tanh(scores / softcap)
        scores = tl.where(allowed[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        decay = tl.exp(most - shift)
        weights = tl.exp(scores - shift[:, None])
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + tl.dot(weights.to(DTYPE), values, input_precision="ieee")
        most = higher
    lse = tl.where(total > 0, most + tl.log(tl.maximum(total, 1e-37)), float("-inf"))
    acc = acc / tl.maximum(total, 1e-37)[:, None]
    tl.store(part_lse + (bh * SPLITS + split) * BLOCK_G + group, lse)
    spot = parts + ((bh * SPLITS + split) * G + group)[:, None] * DV + column_v[None, :]
    tl.store(spot, acc, mask=(group < G)[:, None] & (column_v < DV)[None, :])
    tl.debug_barrier()  # all of this program's part is written before its arrival is
    if tl.atomic_add(arrivals + bh, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
        tl.store(arrivals + bh, 0)
        splits = tl.arange(0, ALL_SPLITS)
        heads = tl.arange(0, MERGED_G)  # all query heads at once: one latency, and not one for each
        real = (heads < G)[None, :]
        places_lse = part_lse + (bh * SPLITS + splits)[:, None] * BLOCK_G + heads[None, :]
        there = (splits < SPLITS)[:, None] & real
        lses = tl.load(places_lse, mask=there, other=float("-inf"), cache_modifier=".cg")
        top = tl.max(lses, 0)
        base = tl.where(top == float("-inf"), 0.0, top)
        denominator = tl.sum(tl.exp(lses - base[None, :]), 0)
        if SINKS:
            logits = tl.load(sinks + h * G + heads, mask=heads < G, other=float("-inf")).to(tl.float32)
            denominator += tl.exp(logits - base)
        merged = tl.zeros([MERGED_G, BLOCK_V], tl.float32)
        chunk = tl.arange(0, MERGED_SPLITS)
        elements = (heads < G)[None, :, None] & (column_v < DV)[None, None, :]
        for from_split in range(0, SPLITS, MERGED_SPLITS):
            inside = from_split + chunk < SPLITS
            part = bh * SPLITS + from_split + chunk
            chunk_lse = part_lse + part[:, None] * BLOCK_G + heads[None, :]
            shares = tl.load(chunk_lse, mask=inside[:, None] & real, other=float("-inf"), cache_modifier=".cg")
            places = (part[:, None] * G + heads[None, :])[:, :, None] * DV + column_v[None, None, :]
            outs = tl.load(parts + places, mask=inside[:, None, None] & elements, other=0.0, cache_modifier=".cg")
            merged += tl.sum(outs * tl.exp(shares - base[None, :])[:, :, None], 0)
        merged = merged / tl.where(denominator > 0, denominator, 1.0)[:, None]
        tl.store(
            out + b * out_b + (h * G + heads)[:, None] * out_h + column_v[None, :], merged.to(out.dtype.element_ty),
            mask=(heads < G)[:, None] & (column_v < DV)[None, :],
        )  # fmt: skip
