"""Split-KV attention over the page list in one launch, including the loads of missing pages and the final merge.

    program (b * H + h, split)   reads one split of the list, every few tiles of pages, from page frames or the backing store
                                 loads a marked page from host memory, uses it, and stores it in its page frame
                                 writes its split output; the last program of a (sequence, KV head) merges all splits

A missing page is read once, both for attention and to fill its frame. Meanwhile programs with resident pages continue. An int8
backing store is decoded in registers, and the frame gets the decoded page. The specification is `kernels.attend`,
`kernels.merge_attention` and `storage/page_layout.py`.

With coded pages, a few more programs add up what the scan's estimate has of the listed pages, and the last one merges the
estimate of all other candidates too (`unread_pages.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    BACKING, FRAMES, LIST_CAPACITY, LIST_PAGE, LOAD, PAGE_SLOT, PAGE_SLOT_STRIDE, POSITION, directory_of, directory_rows,
    from_int8, own_layer, own_step, row_addresses, scale_addresses, slots_of, tokens_valid, triton_dtype, wait_for_launch,
)  # fmt: skip
from ..launch import (
    Launch, LaunchShape, LayerBuffers, ScanBuffers, StepBuffers, code_bytes, power_of_two, scan_columns, dependent,
)  # fmt: skip
from .online_softmax import attend_tile, attended, tile_pages
from .unread_pages import subtract_pages, unread_sums


def attend_pages(
    launch: Launch, buffers: StepBuffers, layer: LayerBuffers, query: Tensor, out: Tensor, sinks: Tensor | None, *,
    query_index: int, num_queries: int, dense: bool, scale: float, softcap: float | None, shape: LaunchShape,
    scan: ScanBuffers | None = None, plan: Tensor | None = None,
) -> None:  # fmt: skip
    """Attend to the listed pages, for one query of a step.

    Args:
        query: [B, H * G, 1, Dk]; the last dimension is contiguous.
        out: [B, H * G, Dv]. Written.
        sinks: [H * G], logits in the denominator; None for none.
        query_index, num_queries: index of the query in the step, and queries of the step.
        dense: whether the layer attends to all pages.
        scan, plan: what `scan_pages` and `bin_scores` wrote, and the query's plan; None without coded pages.
    """
    coded = scan is not None and not dense
    estimate, subtracted = (scan.estimate, scan.subtracted) if scan is not None else (buffers.stats, buffers.stats)
    group, splits = query.shape[1] // shape.num_heads, buffers.splits.dense if dense else buffers.splits.attend
    subtracts = subtracted.shape[1] if coded else 0
    launch(
        attend_kernel, (buffers.num_streams, splits + subtracts), buffers.step, layer.descriptor, query, out,
        query if sinks is None else sinks, buffers.list_count, buffers.split_outputs, buffers.arrivals, query_index,
        num_queries, *query.stride()[:2], *out.stride()[:2], scale, softcap or 1.0,
        buffers.list_count if plan is None else plan, estimate, subtracted, SUBTRACTS=subtracts,
        COLUMNS=scan_columns(group, shape)[0], VALUE_BYTES=code_bytes(shape.value_dim), VALUES=triton_dtype(shape.coded_dtype),
        COMPILED=shape.compiled, CAPPED=softcap is not None, SINKS=sinks is not None, H=shape.num_heads, G=group,
        BLOCK_G=max(16, power_of_two(group)), DK=shape.key_dim, DV=shape.value_dim, BLOCK_K=shape.block_k,
        BLOCK_V=shape.block_v, PAGE=shape.page_size, TILE_PAGES=tile_pages(shape), SPLITS=splits,
        ESTIMATED=0 if coded else buffers.splits.estimate, MERGED_G=power_of_two(group), PAGE_BYTES=shape.page_bytes,
        SEGMENT=shape.segment_pages, ROWS=shape.rows_per_chunk, PADDED=shape.padded, DTYPE=triton_dtype(shape.dtype),
        BACKING_BYTES=shape.backing_bytes, APART=shape.apart, num_warps=4, num_stages=1, **dependent(shape),
    )  # fmt: skip


@triton.jit
def attend_kernel(
    step, layer, query, out, sinks, list_count, split_outputs, arrivals, query_index, num_queries,
    query_b, query_h, out_b, out_h, scale, softcap, plan, estimate, subtracted,
    SUBTRACTS: tl.constexpr, COLUMNS: tl.constexpr, VALUE_BYTES: tl.constexpr, VALUES: tl.constexpr, COMPILED: tl.constexpr,
    CAPPED: tl.constexpr, SINKS: tl.constexpr, H: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PAGE: tl.constexpr,
    TILE_PAGES: tl.constexpr, SPLITS: tl.constexpr, ESTIMATED: tl.constexpr, MERGED_G: tl.constexpr,
    PAGE_BYTES: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, DTYPE: tl.constexpr,
    BACKING_BYTES: tl.constexpr, APART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, split) attends to one split of the page list; see the module's head.

    Programs from SPLITS on add up what is to be subtracted from the estimate of all candidates.

    Args:
        query: [B, H * G, 1, DK], one of the step's `num_queries`; the last dimension is contiguous.
        list_count: written by `choose_kernel`.
        out: [B, 1, H * G, DV]. Written.
        sinks: float [H * G], logits in the denominator; read if SINKS.
        split_outputs: float32 [B * H, SPLITS + ESTIMATED, 2, G, DV]. Scratch, but for the last ESTIMATED ones, which
            `estimate_kernel` wrote.
        plan, estimate, subtracted: of the query, see `ScanBuffers`; used with SUBTRACTS.
        SUBTRACTS: programs that subtract; 0 without coded pages. COLUMNS to COMPILED: as for `scan_kernel`, for values.
        arrivals: int32 [B * H]: zeros, and zeros again afterwards.
        DTYPE: dtype of the pages; PAGE_BYTES: size of a page of that dtype.
        BACKING_BYTES: size of an int8 page in the backing store, which is then in host memory; 0 if backing pages are of DTYPE.
    """
    # Until it waits, this reads nothing that the previous kernel writes: descriptors, the query, and the plan.
    bh = tl.program_id(0)
    split = tl.program_id(1)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    step = own_step(step, b, APART)
    layer = own_layer(layer, b, APART)
    if APART and tl.load(step + POSITION) < 0:  # no sequence
        wait_for_launch(PDL)
        return
    start = tl.load(step + POSITION)
    position, length = start + query_index, start + num_queries
    capacity = tl.load(step + LIST_CAPACITY)
    listed = tl.load(step + LIST_PAGE).to(tl.pointer_type(tl.int32)) + bh * capacity
    if SUBTRACTS and split >= SPLITS:
        subtract_pages(
            step, layer, plan, estimate, subtracted, listed, list_count + bh * 2, split - SPLITS, SUBTRACTS, bh, b, h, DTYPE,
            H, G, COLUMNS, DK, DV, BLOCK_V, VALUE_BYTES, SEGMENT, ROWS, VALUES, COMPILED, PDL,
        )  # fmt: skip
    group = tl.arange(0, BLOCK_G)
    column_k = tl.arange(0, BLOCK_K)
    column_v = tl.arange(0, BLOCK_V)
    queries = tl.load(
        query + b * query_b + (h * G + group)[:, None] * query_h + column_k[None, :],
        mask=(group < G)[:, None] & (column_k < DK)[None, :], other=0.0,
    ).to(DTYPE)  # fmt: skip
    place = tl.arange(0, TILE_PAGES * PAGE)
    within = place % PAGE
    num_slots, first_frame = slots_of(layer, b, h, H)
    table = tl.load(layer + BACKING)
    directory = directory_of(step, b)
    wait_for_launch(PDL)
    count = tl.load(list_count + bh * 2)
    missing = tl.load(list_count + bh * 2 + 1)
    most = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    stop = tl.where(split < SPLITS, count, 0)  # nothing for the programs that subtract
    entry = split * TILE_PAGES + place // PAGE
    ahead = tl.load(listed + entry, mask=entry < capacity, other=-1)  # does not wait for `count`
    for _ in range(split * TILE_PAGES, stop, SPLITS * TILE_PAGES):
        page = tl.where(entry < stop, ahead, -1)
        entry += SPLITS * TILE_PAGES
        ahead = tl.load(listed + entry, mask=entry < stop, other=-1)
        here = page >= 0
        frame = tl.zeros([TILE_PAGES * PAGE], tl.int64)
        if BACKING_BYTES:
            coded = frame  # address of the int8 page that the token is loaded from, 0 for none
        if num_slots > 0:
            away = page >= LOAD
            page = tl.where(away, page - LOAD, page)
            page_slot = tl.load(layer + PAGE_SLOT).to(tl.pointer_type(tl.int32))
            page_slot += bh.to(tl.int64) * tl.load(layer + PAGE_SLOT_STRIDE)
            slot = tl.load(page_slot + page, mask=here, other=0)
            frame = tl.load(layer + FRAMES) + (first_frame + slot) * PAGE_BYTES
            address = frame
            if missing > 0:
                rows = directory_rows(directory, h, page, away, H, SEGMENT)
                if BACKING_BYTES:
                    coded = tl.where(away, row_addresses(table, rows, away, ROWS, BACKING_BYTES), 0)
                else:
                    address = tl.where(away, row_addresses(table, rows, away, ROWS, PAGE_BYTES), frame)
                frame = tl.where(away & (slot >= 0), frame, 0)
        else:
            rows = directory_rows(directory, h, page, here, H, SEGMENT)
            address = row_addresses(table, rows, here, ROWS, PAGE_BYTES)
        token = page.to(tl.int64) * PAGE + within
        allowed = here & (token <= position)
        if PADDED:
            allowed = tokens_valid(step, b, token, allowed)
        pointer = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        place_k = within[:, None] * DK + column_k[None, :]
        place_v = PAGE * DK + within[:, None] * DV + column_v[None, :]
        filled = here & (token < length)  # other places are uninitialized and may hold NaN
        inside_k = filled[:, None] & (column_k < DK)[None, :]
        inside_v = filled[:, None] & (column_v < DV)[None, :]
        if BACKING_BYTES:
            there = (coded == 0)[:, None]
            keys = tl.load(pointer[:, None] + place_k, mask=inside_k & there, other=0.0)
            values = tl.load(pointer[:, None] + place_v, mask=inside_v & there, other=0.0)
            if missing > 0:  # a tile may mix resident and int8 pages; `coded` is 0 for resident ones
                codes = tl.multiple_of(coded.to(tl.pointer_type(tl.int8)), 16)
                scales = scale_addresses(coded, PAGE, BACKING_BYTES) + within
                comes = filled & (coded != 0)
                key_scale = tl.load(scales, mask=comes, other=0.0)
                value_scale = tl.load(scales + PAGE, mask=comes, other=0.0)
                key_codes = tl.load(codes[:, None] + place_k, mask=inside_k & comes[:, None], other=0)
                value_codes = tl.load(codes[:, None] + place_v, mask=inside_v & comes[:, None], other=0)
                keys = tl.where(there, keys, from_int8(key_codes, key_scale, DTYPE))
                values = tl.where(there, values, from_int8(value_codes, value_scale, DTYPE))
        else:
            keys = tl.load(pointer[:, None] + place_k, mask=inside_k, other=0.0)
            values = tl.load(pointer[:, None] + place_v, mask=inside_v, other=0.0)
        if missing > 0:
            resident = tl.multiple_of(frame.to(tl.pointer_type(DTYPE)), 16)
            tl.store(resident[:, None] + place_k, keys, mask=inside_k & (frame != 0)[:, None])
            tl.store(resident[:, None] + place_v, values, mask=inside_v & (frame != 0)[:, None])
        if PADDED:
            values = tl.where(allowed[:, None], values, 0.0)
        most, total, acc = attend_tile(queries, keys, values, allowed, most, total, acc, scale, softcap, CAPPED, DTYPE)
    acc, lse = attended(most, total, acc)
    # The lse is stored once per value, so the merge needs no exchange between threads.
    mine = split_outputs + (((bh * (SPLITS + ESTIMATED) + split) * 2) * G + group)[:, None] * DV + column_v[None, :]
    inside = (group < G)[:, None] & (column_v < DV)[None, :] & (split < SPLITS)
    tl.store(mine, acc, mask=inside)
    tl.store(mine + G * DV, tl.broadcast_to(lse[:, None], (BLOCK_G, BLOCK_V)), mask=inside)
    tl.debug_barrier()  # the split output is complete before the arrival is counted
    if tl.atomic_add(arrivals + bh, 1, sem="acq_rel", scope="gpu") == SPLITS + SUBTRACTS - 1:
        tl.store(arrivals + bh, 0)
        heads = tl.arange(0, MERGED_G)[:, None]
        there = (heads < G) & (column_v < DV)[None, :]
        outs = split_outputs + bh * (SPLITS + ESTIMATED) * 2 * G * DV + heads * DV + column_v[None, :]
        top = tl.full([MERGED_G, BLOCK_V], float("-inf"), tl.float32)
        if SUBTRACTS:
            rest, rest_lse = unread_sums(estimate, subtracted, bh, SUBTRACTS, G, MERGED_G, DV, BLOCK_V)
            top = rest_lse
        few: tl.constexpr = SUBTRACTS > 0 and SPLITS <= 32
        many: tl.constexpr = SPLITS if few else 16 if SUBTRACTS or ESTIMATED else 8
        for other in tl.range(
            0, SPLITS + ESTIMATED, loop_unroll_factor=many
        ):  # unrolled, so that the loads of several splits are in flight
            lses = outs + (other * 2 + 1) * G * DV
            top = tl.maximum(top, tl.load(lses, mask=there, other=float("-inf"), cache_modifier=".cg"))
        base = tl.where(top == float("-inf"), 0.0, top)
        denominator = tl.zeros([MERGED_G, BLOCK_V], tl.float32)
        merged = tl.zeros([MERGED_G, BLOCK_V], tl.float32)
        if SUBTRACTS:
            denominator = tl.exp(rest_lse - base)
            merged = denominator * rest
        for other in tl.range(0, SPLITS + ESTIMATED, loop_unroll_factor=many):
            lses = outs + (other * 2 + 1) * G * DV
            weight = tl.exp(tl.load(lses, mask=there, other=float("-inf"), cache_modifier=".cg") - base)
            denominator += weight
            merged += weight * tl.load(outs + other * 2 * G * DV, mask=there, other=0.0, cache_modifier=".cg")
        if SINKS:
            logits = tl.load(sinks + h * G + heads, mask=heads < G, other=float("-inf")).to(tl.float32)
            denominator += tl.exp(logits - base)
        merged = merged / tl.where(denominator > 0, denominator, 1.0)
        tl.store(
            out + b * out_b + (h * G + heads) * out_h + column_v[None, :], merged.to(out.dtype.element_ty), mask=there
        )
