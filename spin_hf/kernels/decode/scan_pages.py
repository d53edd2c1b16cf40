"""One pass over all coded pages: log weights of pages, their total, the estimate of all candidates; and the new token stored.

    program (b * H + h, split)    one split of the pages, in tiles of two segments; of each tile
        units     products of states with int8 means                                    [units, heads]
        tokens    products of states with the fields of codes, plus that of the unit    [tokens of a unit, units, heads]
        pages     sum of exp2 over their tokens: log weight to LOGITS                   [pages of a unit, units, heads]
        values    fields of the pages' value codes, times weight and scale of pages     [Dv, heads]

    thread (unit, head) of a warp    lane 4 * unit + head % 4: units 0 to 7 and 8 to 15 of a tile in two registers each

A tile's rows are units, and the 16 tokens of a unit are 16 products, so a thread has all tokens of its units: sums over the
tokens of a page and the mean of the unit need no other thread. Each number is loaded by the thread that needs it, when it needs
it: while a program waits, others on its multiprocessor compute. A program of one warp waits for no other; only weights change
hands, from rows of one product to columns of the next.

Weights are relative to the running maximum, rounded up to a power of two. So a new maximum rounds no sum, and `attend_kernel`
subtracts pages as precisely as they were added. Operands with digits, or pairs of float16 numbers (`halves`), take columns of
the tensor cores that would be idle. The codes are multiplied as they are stored: a field is masked, not moved.
The specification is `kernels/reference_scan.py`; the layout of the codes stands there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    DIRECTORY, DIRECTORY_STRIDE, FIRST, LOGITS, NUM_SELECTED, PAGE_CAPACITY, PLAN_FIELDS, SCALE_0, STOP, SUMMARY_0,
    SUMMARY_1, SUMMARY_2, SUMMARY_3, SUMMARY_4, POSITION, candidates, own_layer, own_step, triton_dtype,
    wait_for_launch,
)  # fmt: skip
from ..launch import (
    Launch, LaunchShape, LayerBuffers, ScanBuffers, StepBuffers, code_bytes, dependent, scan_columns,
)  # fmt: skip
from ..reference_scan import UNIT_PAGES
from .append_tokens import append_page
from .coded_fields import (
    code_parts, four_numbers, halves, natural_log, power2, value_weights, whole_sums, word_field_places, word_fields,
)  # fmt: skip
from .prefetch_tile import prefetch_tile

_LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


def scan_pages(
    launch: Launch, buffers: StepBuffers, scan: ScanBuffers, layer: LayerBuffers, plan: Tensor,
    new: tuple[Tensor, Tensor] | None, *, group: int, softcap: float | None, shape: LaunchShape,
) -> None:  # fmt: skip
    """Scan all pages for one query of a step, by the operands of `project_queries`, and append the step's token.

    If the budget covers all pages, nothing is scanned.

    Args:
        new: key and value [B, H, 1, D] of the token to append; None for none.
    """
    columns, rows = scan_columns(group, shape)
    key, value = (scan.factors, scan.factors) if new is None else new
    launch(
        scan_kernel, (buffers.num_streams, buffers.splits.score + (new is not None)), buffers.step, layer.descriptor,
        scan.mean_operand, scan.code_operand, scan.factors, plan, buffers.stats, scan.partials,
        (softcap or 1.0) * _LOG2_E, key, value, *key.stride()[:2], *value.stride()[:2], APPENDS=new is not None,
        AHEAD=shape.overlaps and shape.compiled, CAPPED=softcap is not None, DIGITS=shape.multiplies_int8,
        DTYPE=triton_dtype(shape.dtype), VALUES=triton_dtype(shape.coded_dtype), COMPILED=shape.compiled,
        H=shape.num_heads, G=group, COLUMNS=columns,
        ROWS_OF=rows, DK=shape.key_dim, DV=shape.value_dim, BLOCK_K=shape.block_k, BLOCK_V=shape.block_v,
        BYTES=code_bytes(shape.key_dim), VALUE_BYTES=code_bytes(shape.value_dim), PAGE=shape.page_size,
        UNIT_PAGES=UNIT_PAGES, SEGMENT=shape.segment_pages, ROWS=shape.rows_per_chunk, PADDED=shape.padded,
        BACKING_BYTES=shape.backing_bytes, APART=shape.apart, num_warps=_warps(rows, shape), num_stages=1,
        **dependent(shape),
    )  # fmt: skip


def _warps(rows: int, shape: LaunchShape) -> int:
    """One warp, which waits for no other and exchanges nothing, as far as its registers hold a tile."""
    wide = max(shape.key_dim, shape.value_dim) > 128
    return 4 if wide or shape.coded_dtype == torch.float32 or rows > 16 else 1


@triton.jit
def scan_kernel(
    step, layer, mean_operand, code_operand, factors, plan, stats, partials, softcap,
    key, value, key_b, key_h, value_b, value_h,
    APPENDS: tl.constexpr, AHEAD: tl.constexpr, CAPPED: tl.constexpr, DIGITS: tl.constexpr, DTYPE: tl.constexpr,
    VALUES: tl.constexpr, COMPILED: tl.constexpr, H: tl.constexpr, G: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS_OF: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr, PAGE: tl.constexpr, UNIT_PAGES: tl.constexpr, SEGMENT: tl.constexpr,
    ROWS: tl.constexpr, PADDED: tl.constexpr, BACKING_BYTES: tl.constexpr, APART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, split) scans one split of the pages. If APPENDS, program (b * H + h, splits) appends the new token.

    Args:
        mean_operand, code_operand, factors: written by `project_kernel`.
        stats: float32 [B * H, splits, 2, COLUMNS]: maximum and sum of exponentials of each split's log weights, of
            candidates and sinks. Written.
        partials: float32 [B * H, splits, G, DV + 2], see `ScanBuffers`. Written.
        softcap: of logits in powers of two, if CAPPED.
        key, value: [B, H, 1, D], the new token, as for `append_page`; used if APPENDS.
        AHEAD: whether the first tile is brought to the L2 cache before this waits for the previous kernel.
        VALUES: dtype in which weights and values are multiplied.
        COMPILED: whether the kernel is compiled for a device; else it is interpreted.
        ROWS: pages per chunk of all arrays but the means, which have ROWS / UNIT_PAGES units.

    Summaries, in this order: means of units, codes of keys, their scales, codes of mean values, their scales.
    """
    # Until it waits, this reads nothing that the previous kernel writes: `project_kernel`, which has waited for all others.
    bh = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1) - APPENDS
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    step = own_step(step, b, APART)
    layer = own_layer(layer, b, APART)
    if APART and tl.load(step + POSITION) < 0:  # no sequence
        wait_for_launch(PDL)
        return
    if APPENDS and split == num_splits:
        wait_for_launch(PDL)
        append_page(
            step, layer, key, value, 1, key_b, key_h, 0, value_b, value_h, 0, tl.load(step + POSITION) // PAGE, bh,
            DTYPE, False, H, DK, DV, BLOCK_K, BLOCK_V, PAGE, SEGMENT, ROWS, PADDED, BACKING_BYTES, False,
        )  # fmt: skip
        return
    row = plan + b * PLAN_FIELDS
    capacity = tl.load(step + PAGE_CAPACITY)
    logits = tl.load(step + LOGITS).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * G * capacity
    first = tl.load(row + FIRST)
    stop = tl.load(row + STOP)
    TILE: tl.constexpr = 2 * SEGMENT
    units_at: tl.constexpr = TILE // UNIT_PAGES
    unit_tokens: tl.constexpr = UNIT_PAGES * PAGE
    MASKED: tl.constexpr = PADDED or CAPPED
    group = tl.arange(0, COLUMNS)
    unit_lane = tl.arange(0, units_at)
    page_of_unit = tl.arange(0, UNIT_PAGES)
    page_lane = unit_lane[None, :] * UNIT_PAGES + page_of_unit[:, None]
    byte = tl.arange(0, BYTES)
    column = tl.arange(0, BLOCK_K)
    most = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([units_at, COLUMNS], tl.float32)
    scaled = tl.zeros([units_at, COLUMNS], tl.float32)
    of_sinks = tl.zeros([COLUMNS], tl.float32)
    acc = tl.zeros([4 * VALUE_BYTES, 2 * COLUMNS], tl.float32)
    tiles = tl.cdiv(stop, TILE)
    begin = split * tiles // num_splits * TILE
    end = tl.minimum((split + 1) * tiles // num_splits * TILE, stop)
    if (tl.load(row + NUM_SELECTED) < stop - first) & (begin < end):
        directory = tl.load(step + DIRECTORY).to(tl.pointer_type(tl.int32)) + b * tl.load(step + DIRECTORY_STRIDE)
        tables = (
            tl.load(layer + SUMMARY_0), tl.load(layer + SCALE_0), tl.load(layer + SUMMARY_1), tl.load(layer + SUMMARY_2),
            tl.load(layer + SUMMARY_3), tl.load(layer + SUMMARY_4),
        )  # fmt: skip
        # Segments are looked up two tiles ahead, addresses one tile ahead: no load waits for one of the same tile.
        places = _places(tables, _segments(directory, begin, end, SEGMENT), h, H, SEGMENT, ROWS)
        segments = _segments(directory, begin + TILE, end, SEGMENT)
        if AHEAD:  # memory is idle while queries are projected
            prefetch_tile(places, DK, DV, PAGE, UNIT_PAGES, SEGMENT)
        wait_for_launch(PDL)
        operand_row = tl.arange(0, ROWS_OF)
        operand = mean_operand + bh * ROWS_OF * BLOCK_K + operand_row[None, :] * BLOCK_K + column[:, None]
        of_means = tl.load(operand)
        operand = code_operand + bh * 4 * ROWS_OF * BYTES + operand_row[None, :] * BYTES + byte[:, None]
        of_one, of_two = tl.load(operand), tl.load(operand + ROWS_OF * BYTES)
        of_three, of_four = tl.load(operand + 2 * ROWS_OF * BYTES), tl.load(operand + 3 * ROWS_OF * BYTES)
        factor = factors + bh * 4 * COLUMNS + group
        code_factor, code_constant = tl.load(factor), tl.load(factor + COLUMNS)
        mean_factor, constant = tl.load(factor + 2 * COLUMNS), tl.load(factor + 3 * COLUMNS)
        for start in range(begin, end, TILE):
            mean, unit, code, scale, value_word, value_scale = _load(
                step, b, places, start, end, stop, COLUMNS, DK, DV, BLOCK_K, BYTES, VALUE_BYTES, PAGE, UNIT_PAGES, SEGMENT,
                PADDED, MASKED, COMPILED,
            )  # fmt: skip
            places = _places(tables, segments, h, H, SEGMENT, ROWS)
            segments = _segments(directory, start + 2 * TILE, end, SEGMENT)
            pages = start + page_lane
            one, two, three, four = code_parts(code, COMPILED)
            if DIGITS:
                middle = _whole(tl.dot(mean, of_means, out_dtype=tl.int32), COLUMNS)
                sums = tl.dot(one, of_one, out_dtype=tl.int32)
                sums = tl.dot(two, of_two, acc=sums, out_dtype=tl.int32)
                sums = tl.dot(three, of_three, acc=sums, out_dtype=tl.int32)
                sums = tl.dot(four, of_four, acc=sums, out_dtype=tl.int32)
                inner = _whole(sums, COLUMNS)
            else:
                middle = tl.dot(mean.to(tl.float32), of_means, input_precision="ieee")
                inner = tl.dot(one.to(tl.float32), of_one, input_precision="ieee")
                inner = tl.dot(two.to(tl.float32), of_two, acc=inner, input_precision="ieee")
                inner = tl.dot(three.to(tl.float32), of_three, acc=inner, input_precision="ieee")
                inner = tl.dot(four.to(tl.float32), of_four, acc=inner, input_precision="ieee")
            middle = middle * (unit * mean_factor[None, :]) + constant[None, :]
            inner = tl.reshape(inner, (unit_tokens, units_at, COLUMNS))
            # Without padding only pages from `end` on are absent, with all of their tokens. A cap does not keep infinity.
            middle = tl.broadcast_to(middle[None, :, :], (UNIT_PAGES, units_at, COLUMNS))
            if not MASKED:
                middle = tl.where((pages < end)[:, :, None], middle, float("-inf"))
            middle = tl.broadcast_to(middle[:, None, :, :], (UNIT_PAGES, PAGE, units_at, COLUMNS))
            middle = tl.reshape(middle, (unit_tokens, units_at, COLUMNS))
            products = (inner * code_factor[None, None, :] - code_constant[None, None, :]) * scale + middle
            if CAPPED:
                products = softcap * (
                    2.0 * tl.sigmoid(2.0 * products / softcap) - 1.0
                )  # softcap * tanh(products / softcap)
            if MASKED:
                products = tl.where(scale >= 0.0, products, float("-inf"))
            higher = tl.maximum(most, tl.ceil(tl.max(tl.max(products, 0), 0)))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            decay = tl.exp2(most - shift)
            tokens = power2(products - shift[None, None, :], COMPILED)
            each = tl.sum(tl.reshape(tokens, (UNIT_PAGES, PAGE, units_at, COLUMNS)), 1)
            logs = tl.permute(natural_log(each, shift[None, None, :], COMPILED), (2, 1, 0))
            unit_page = start + unit_lane * UNIT_PAGES
            written = tl.multiple_of(logits + group * capacity, 16)[:, None, None] + unit_page[None, :, None]
            tl.store(
                written + page_of_unit[None, None, :], logs,
                mask=(group < G)[:, None, None] & (unit_page < end)[None, :, None],
            )  # fmt: skip
            of_sinks = of_sinks * decay
            if start < first:  # sinks are not estimated
                sink = (pages < first)[:, :, None]
                of_sinks += tl.sum(tl.sum(tl.where(sink, each, 0.0), 0), 0)
                each = tl.where(sink, 0.0, each)
            total = total * decay[None, :] + tl.sum(each, 0)
            each = value_weights(each, value_scale)
            scaled = scaled * decay[None, :] + tl.sum(each, 0)
            both = tl.reshape(tl.join(decay, decay), (2 * COLUMNS,))
            each = halves(tl.reshape(each, (TILE, COLUMNS)), VALUES)
            acc = tl.dot(
                word_fields(value_word, VALUES, COMPILED), each, acc=acc * both[None, :], input_precision="ieee"
            )
            most = higher
    else:
        wait_for_launch(PDL)
    place = stats + ((bh * num_splits + split) * 2) * COLUMNS + group
    tl.store(place, most * LN_2)
    weight = tl.sum(total, 0)
    tl.store(place + COLUMNS, weight + of_sinks)
    number, inside, unit_of_field = word_field_places(VALUE_BYTES, DV)
    place = partials + ((bh * num_splits + split) * G + group) * (DV + 2)
    inside = inside & (begin < end)  # the sums of other splits have weight 0, and are not read
    sums = whole_sums(acc) * unit_of_field[:, None] - 1.5 * tl.sum(scaled, 0)[None, :]
    tl.store(place[None, :] + number[:, None], sums, mask=inside[:, None] & (group < G)[None, :])
    tl.store(place + DV, most, mask=group < G)
    tl.store(place + DV + 1, weight, mask=group < G)


@triton.jit
def _segments(directory, start, end, SEGMENT: tl.constexpr):
    """Where the two segments of the tile from page `start` on lie.

    Past the pages that a program scans these are the last ones: nothing is loaded from them.
    """
    last = (end - 1) // SEGMENT
    segment = start // SEGMENT
    one = tl.load(directory + tl.minimum(segment, last))
    return one, tl.load(directory + tl.minimum(segment + 1, last))


@triton.jit
def _places(tables, segments, h, H: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr):
    """The chunks of the six arrays, and the first page in them, for each of `segments`."""
    return _place(tables, segments[0], h, H, SEGMENT, ROWS), _place(tables, segments[1], h, H, SEGMENT, ROWS)


@triton.jit
def _place(tables, segment, h, H: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr):
    page = (segment.to(tl.uint64) * H + h.to(tl.uint64)) * SEGMENT
    chunk = page // ROWS
    inside = (page % ROWS).to(tl.int32)  # a chunk has less than 2 GiB
    return (
        tl.load(tables[0].to(tl.pointer_type(tl.int64)) + chunk), tl.load(tables[1].to(tl.pointer_type(tl.int64)) + chunk),
        tl.load(tables[2].to(tl.pointer_type(tl.int64)) + chunk), tl.load(tables[3].to(tl.pointer_type(tl.int64)) + chunk),
        tl.load(tables[4].to(tl.pointer_type(tl.int64)) + chunk), tl.load(tables[5].to(tl.pointer_type(tl.int64)) + chunk),
        inside,
    )  # fmt: skip


@triton.jit
def _load(
    step, b, places, start, end, stop, COLUMNS: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr,
    BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr, PAGE: tl.constexpr, UNIT_PAGES: tl.constexpr, SEGMENT: tl.constexpr,
    PADDED: tl.constexpr, MASKED: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """The summaries of a tile, whose `units` a thread needs the numbers of that it loads.

    Segments lie in chunks as a whole, so pages behind those that are scanned may be read. What is there is not used.

    Returns:
        means, int8 [units, BLOCK_K], bytes in the order of `multiplied_at`; their units, float32 [units, heads]
        codes, int8 [tokens of a unit * units, BYTES], in that order; their scales, float32 [tokens of a unit, units, heads]
        words of value codes, see `word_fields`; their scales, float32 [pages of a unit, units, heads]
    """
    tl.static_assert(PAGE == 4 and UNIT_PAGES == 4, "a scale of 4 numbers in 16 bits is loaded as one of 64 bits")
    units_at: tl.constexpr = 2 * SEGMENT // UNIT_PAGES
    tokens: tl.constexpr = UNIT_PAGES * PAGE
    run: tl.constexpr = SEGMENT // UNIT_PAGES
    unit_lane = tl.arange(0, units_at)
    page_of_unit = tl.arange(0, UNIT_PAGES)
    means = _addresses(places, unit_lane, 0, DK, UNIT_PAGES, run)
    units = _addresses(places, unit_lane, 1, 4, UNIT_PAGES, run)
    codes = _addresses(places, unit_lane, 2, tokens * (DK // 4), UNIT_PAGES, run)
    scales = _addresses(places, unit_lane, 3, tokens * 2, UNIT_PAGES, run)
    value_scales = _addresses(places, unit_lane, 5, UNIT_PAGES * 2, UNIT_PAGES, run)
    # A thread loads 8 bytes at once where rows are multiples of that.
    token = tl.arange(0, tokens)
    byte = tl.arange(0, BYTES)
    aligned: tl.constexpr = 8 if DK % 32 == 0 else 4
    code = tl.load(
        tl.multiple_of(codes.to(tl.pointer_type(tl.int8)), aligned)[:, None, None] + (token * (DK // 4))[None, :, None]
        + byte[None, None, :],
        mask=(byte < DK // 4)[None, None, :], other=0,
    )  # fmt: skip
    part = tl.arange(0, BLOCK_K // 32) * 32
    column = part[None, :, None] + tl.arange(0, 32)[None, None, :]
    mean = tl.load(
        tl.multiple_of(means.to(tl.pointer_type(tl.int8)), 8)[:, None, None] + column, mask=column < DK, other=0
    )
    # The same number for four heads, from addresses that Triton knows nothing about: it then deals the first dimensions out to
    # threads, as tensor cores do with rows of products.
    alike = tl.arange(0, 4).to(tl.int64) * 0
    unit = tl.load((units[None, :] + alike[:, None]).to(tl.pointer_type(tl.float32)))
    scale = (scales[None, :] + alike[:, None])[:, :, None] + (page_of_unit * (PAGE * 2))[None, None, :]
    pages = start + unit_lane[:, None] * UNIT_PAGES + page_of_unit[None, :]
    inside = pages < end
    if PADDED:  # pages of padding have no codes
        inside = inside & candidates(step, b, pages, 0, stop, PAGE, PADDED)
    # Numbers of pages that are not scanned may be anything: 4 times -1, which is a token that is absent, or 4 times 0.
    scale = tl.load(scale.to(tl.pointer_type(tl.int64)))
    scale = four_numbers(tl.where(inside[None, :, :], scale, -0x407F407F407F4080 if MASKED else 0), COMPILED)
    value_scale = (value_scales[None, :] + alike[:, None]).to(tl.pointer_type(tl.int64))
    value_scale = four_numbers(tl.load(value_scale), COMPILED)
    # Units such that a thread multiplies the words that it loads: [units // 4, word, 2, 2, pages of a unit]
    words: tl.constexpr = VALUE_BYTES // 4
    word = tl.reshape(tl.arange(0, words), (1, words, 1, 1, 1))
    values = _addresses(places, tl.arange(0, units_at // 4) * 4, 4, DV, UNIT_PAGES, run)
    values = tl.reshape(values, (units_at // 4, 1, 1, 1, 1)) + word * 4
    inner = tl.reshape(tl.arange(0, 2) * DV, (1, 1, 2, 1, 1))
    inner = inner + tl.reshape(tl.arange(0, 2) * (2 * DV), (1, 1, 1, 2, 1))
    inner = inner + tl.reshape(page_of_unit * (DV // 4), (1, 1, 1, 1, UNIT_PAGES))
    value_word = tl.load((values + inner).to(tl.pointer_type(tl.int32)), mask=word < DV // 16, other=0)
    fours: tl.constexpr = COLUMNS // 4
    unit = tl.permute(tl.broadcast_to(unit[None, :, :], (fours, 4, units_at)), (2, 0, 1))
    shape: tl.constexpr = (fours, 4, units_at, UNIT_PAGES, 2, 2)
    scale = tl.permute(tl.broadcast_to(scale[None, :, :, :, :, :], shape), (3, 4, 5, 2, 0, 1))
    value_scale = tl.permute(
        tl.broadcast_to(value_scale[None, :, :, :, :], (fours, 4, units_at, 2, 2)), (3, 4, 2, 0, 1)
    )
    code = tl.reshape(code, (units_at, tokens, BYTES // 32, 4, 2, 4))
    mean = tl.reshape(mean, (units_at, BLOCK_K // 32, 4, 2, 4))
    return (
        tl.reshape(tl.permute(mean, (0, 1, 3, 2, 4)), (units_at, BLOCK_K)), tl.reshape(unit, (units_at, COLUMNS)),
        tl.reshape(tl.permute(code, (1, 0, 2, 4, 3, 5)), (tokens * units_at, BYTES)),
        tl.reshape(scale, (tokens, units_at, COLUMNS)), value_word, tl.reshape(value_scale, (UNIT_PAGES, units_at, COLUMNS)),
    )  # fmt: skip


@triton.jit
def _addresses(places, unit, ARRAY: tl.constexpr, BYTES: tl.constexpr, UNIT_PAGES: tl.constexpr, RUN: tl.constexpr):
    """Addresses of the units `unit` of a tile in one array, where a unit has BYTES. A segment has RUN units."""
    first = places[0][ARRAY] + places[0][6] // UNIT_PAGES * BYTES + unit * BYTES
    second = places[1][ARRAY] + places[1][6] // UNIT_PAGES * BYTES + (unit - RUN) * BYTES
    return tl.where(unit >= RUN, second, first)


@triton.jit
def _whole(products, COLUMNS: tl.constexpr):
    """Products of integers, from those of their digits: [rows, COLUMNS], float32."""
    pairs = tl.reshape(products, (products.shape[0], COLUMNS, 2))
    return tl.sum(pairs * tl.where(tl.arange(0, 2) == 0, 256, 1)[None, None, :], 2).to(tl.float32)
