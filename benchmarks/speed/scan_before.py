# ruff: noqa: N803, N806, E501, I001, RUF100
"""The scan before it was dealt out by units, for `benchmarks.speed.scan` to compare with. One pass over all coded pages: log weights of pages, their total, and the estimate of all candidates.

    program (b * H + h, split)    one split of the pages, in tiles of pages; of each tile
        units     products of states with int8 means                                    [units, heads]
        tokens    products of states with the fields of codes, plus that of the unit    [tokens, heads]
        pages     sum of exp2 over their tokens: log weight to LOGITS                   [pages, heads]
        values    fields of the pages' value codes, times weight and scale of pages     [Dv, heads]

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

from spin_hf.kernels.common import (
    DIRECTORY, DIRECTORY_STRIDE, FIRST, LOGITS, NUM_SELECTED, PAGE_CAPACITY, PLAN_FIELDS, SCALE_0, STOP, SUMMARY_0,
    SUMMARY_1, SUMMARY_2, SUMMARY_3, SUMMARY_4, POSITION, candidates, own_layer, own_step, triton_dtype,
    wait_for_launch,
)  # fmt: skip
from spin_hf.kernels.launch import (
    Launch,
    LaunchShape,
    LayerBuffers,
    ScanBuffers,
    ScanTuning,
    StepBuffers,
    code_bytes,
    scan_columns,
    dependent,
)
from spin_hf.kernels.reference_scan import UNIT_PAGES
from spin_hf.kernels.decode.coded_fields import (
    code_parts,
    halves,
    multiplied_at,
    natural_log,
    power2,
    value_fields,
    whole_sums,
)

_LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


def scan_pages(
    launch: Launch, buffers: StepBuffers, scan: ScanBuffers, layer: LayerBuffers, plan: Tensor, *, group: int,
    softcap: float | None, shape: LaunchShape, tuning: ScanTuning | None = None,
) -> None:  # fmt: skip
    """Scan all pages for one query of a step, by the operands of `project_queries`. Writes nothing if the budget covers all."""
    columns, rows = scan_columns(group, shape)
    tuning = _tuning(rows, shape) if tuning is None else tuning
    launch(
        scan_kernel, (buffers.num_streams, buffers.splits.score), buffers.step, layer.descriptor, scan.mean_operand,
        scan.code_operand, scan.factors, plan, buffers.stats, scan.partials,
        (softcap or 1.0) * _LOG2_E, CAPPED=softcap is not None, DIGITS=shape.multiplies_int8,
        VALUES=triton_dtype(shape.coded_dtype), COMPILED=shape.compiled, H=shape.num_heads, G=group, COLUMNS=columns,
        ROWS_OF=rows, DK=shape.key_dim, DV=shape.value_dim, BLOCK_K=shape.block_k, BYTES=code_bytes(shape.key_dim),
        VALUE_BYTES=code_bytes(shape.value_dim), PAGE=shape.page_size, UNIT_PAGES=UNIT_PAGES, SEGMENT=shape.segment_pages,
        ROWS=shape.rows_per_chunk, PADDED=shape.padded, TILE=tuning.tile,
        M_WARPS=min(tuning.warps, tuning.tile * shape.page_size // 16), ALIGNED=min(8, _alignment(shape.key_dim // 4)),
        VALUE_ALIGNED=_alignment(shape.value_dim // 4), APART=shape.apart, num_warps=tuning.warps, num_stages=1,
        **dependent(shape),
    )  # fmt: skip


def _tuning(rows: int, shape: LaunchShape) -> ScanTuning:
    """Measured on an H200 for 8 operand rows: few warps with many registers, as each warp has barriers of its own only."""
    if max(shape.key_dim, shape.value_dim) > 128 or shape.coded_dtype == torch.float32 or rows > 16:
        return ScanTuning(tile=32, warps=4)
    return ScanTuning(tile=64 if rows <= 8 else 32, warps=2)


def _alignment(row_bytes: int) -> int:
    """The alignment of rows of a chunk, in bytes, up to 16."""
    return min(16, row_bytes & -row_bytes)


@triton.jit
def pinned(numbers, COMPILED: tl.constexpr):
    """int8 numbers unchanged, bfloat16 numbers as float32.

    Triton changes the layout of loaded numbers, with a barrier that later loads wait for, not before this.
    """
    if not COMPILED:
        numbers = numbers if numbers.dtype == tl.int8 else numbers.to(tl.float32)
    elif numbers.dtype == tl.int8:
        numbers = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [numbers], dtype=tl.int8, is_pure=False, pack=4)
    else:
        numbers = tl.inline_asm_elementwise(
            "{ .reg .b16 zero; mov.b16 zero, 0; mov.b32 $0, {zero, $1}; }", "=r,h", [numbers], dtype=tl.float32,
            is_pure=False, pack=1,
        )  # fmt: skip
    return numbers


@triton.jit
def field_places(VALUE_BYTES: tl.constexpr, DV: tl.constexpr):
    """Where the fields of `value_fields` are stored: field f of byte i at 4 * i + f. And whether there is such a field."""
    number = tl.arange(0, 4 * VALUE_BYTES)
    byte = number % VALUE_BYTES
    return 4 * byte + number // VALUE_BYTES, byte < DV // 4


@triton.jit
def value_weights(weights, scale):
    """Weights [n, C] of values with scales [n], for `halves`: up to 32768. NaN of pages without codes counts as 0."""
    scale = tl.where(tl.abs(scale) < 32768.0, scale, 0.0)
    return tl.minimum(weights * scale[:, None], 32768.0)


@triton.jit
def scan_kernel(
    step, layer, mean_operand, code_operand, factors, plan, stats, partials, softcap,
    CAPPED: tl.constexpr, DIGITS: tl.constexpr, VALUES: tl.constexpr, COMPILED: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS_OF: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr,
    BYTES: tl.constexpr, VALUE_BYTES: tl.constexpr, PAGE: tl.constexpr, UNIT_PAGES: tl.constexpr, SEGMENT: tl.constexpr,
    ROWS: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, M_WARPS: tl.constexpr,
    ALIGNED: tl.constexpr, VALUE_ALIGNED: tl.constexpr, APART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, split) scans one split of the pages.

    Args:
        mean_operand, code_operand, factors: written by `project_kernel`.
        stats: float32 [B * H, num_programs(1), 2, COLUMNS]: maximum and sum of exponentials of each split's log weights, of
            candidates and sinks. Written.
        partials: float32 [B * H, num_programs(1), G, DV + 2], see `ScanBuffers`. Written.
        softcap: of logits in powers of two, if CAPPED.
        VALUES: dtype in which weights and values are multiplied.
        COMPILED: whether the kernel is compiled for a device; else it is interpreted.
        ALIGNED, VALUE_ALIGNED: alignment of the codes of a key, and of a value, in bytes.
        TILE: pages per tile: up to 4 segments, or a part of one.
        M_WARPS: warps that products with codes divide rows among.
        ROWS: pages per chunk of all arrays but the means, which have ROWS / UNIT_PAGES units.

    Summaries, in this order: means of units, codes of keys, their scales, codes of mean values, their scales.
    """
    wait_for_launch(PDL)
    bh = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    step = own_step(step, b, APART)
    layer = own_layer(layer, b, APART)
    if APART and tl.load(step + POSITION) < 0:  # no sequence
        return
    row = plan + b * PLAN_FIELDS
    capacity = tl.load(step + PAGE_CAPACITY)
    logits = tl.load(step + LOGITS).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * G * capacity
    first = tl.load(row + FIRST)
    stop = tl.load(row + STOP)
    tokens_at: tl.constexpr = TILE * PAGE
    group = tl.arange(0, COLUMNS)
    page_lane = tl.arange(0, TILE)
    token_lane = tl.arange(0, tokens_at)
    byte = tl.arange(0, BYTES)
    column = tl.arange(0, BLOCK_K)
    most = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([tokens_at, COLUMNS], tl.float32)
    of_sinks = tl.zeros([COLUMNS], tl.float32)
    acc = tl.zeros([4 * VALUE_BYTES, 2 * COLUMNS], tl.float32)
    share = tl.cdiv(tl.cdiv(stop, TILE), num_splits) * TILE
    begin = split * share
    end = tl.minimum(begin + share, stop)
    if (tl.load(row + NUM_SELECTED) < stop - first) & (begin < end):
        directory = tl.load(step + DIRECTORY).to(tl.pointer_type(tl.int32)) + b * tl.load(step + DIRECTORY_STRIDE)
        operand_row = tl.arange(0, ROWS_OF)
        of_means = tl.load(
            mean_operand + bh * ROWS_OF * BLOCK_K + operand_row[None, :] * BLOCK_K + multiplied_at(column)[:, None]
        )
        operand = code_operand + bh * 4 * ROWS_OF * BYTES + operand_row[None, :] * BYTES + byte[:, None]
        of_one, of_two = tl.load(operand), tl.load(operand + ROWS_OF * BYTES)
        of_three, of_four = tl.load(operand + 2 * ROWS_OF * BYTES), tl.load(operand + 3 * ROWS_OF * BYTES)
        factor = factors + bh * 4 * COLUMNS + group
        code_factor, code_constant = tl.load(factor), tl.load(factor + COLUMNS)
        mean_factor, constant = tl.load(factor + 2 * COLUMNS), tl.load(factor + 3 * COLUMNS)
        tables = (
            tl.load(layer + SUMMARY_0), tl.load(layer + SCALE_0), tl.load(layer + SUMMARY_1), tl.load(layer + SUMMARY_2),
            tl.load(layer + SUMMARY_3), tl.load(layer + SUMMARY_4),
        )  # fmt: skip
        # Segments are looked up two tiles ahead, addresses one tile ahead: no load waits for one of the same tile.
        places = _places(tables, _segments(directory, begin, end, SEGMENT, TILE), h, begin, H, SEGMENT, ROWS, TILE)
        segments = _segments(directory, begin + TILE, end, SEGMENT, TILE)
        for start in range(begin, end, TILE):
            # All loads before the first use of one of them, as that comes with a barrier, which no load can pass.
            mean, unit, code, scale, value_code, value_scale = _load(
                places, start, end, DK, DV, BLOCK_K, BYTES, VALUE_BYTES, PAGE, UNIT_PAGES, SEGMENT, TILE, M_WARPS,
                ALIGNED, VALUE_ALIGNED,
            )  # fmt: skip
            places = _places(tables, segments, h, start + TILE, H, SEGMENT, ROWS, TILE)
            segments = _segments(directory, start + 2 * TILE, end, SEGMENT, TILE)
            scale, mean = pinned(scale, COMPILED), pinned(mean, COMPILED)
            value_scale = value_scale.to(tl.float32)
            if DIGITS:
                middle = _whole(tl.dot(mean, of_means, out_dtype=tl.int32), COLUMNS)
                one, two, three, four = code_parts(code, COMPILED)
                sums = tl.dot(one, of_one, out_dtype=tl.int32)
                sums = tl.dot(two, of_two, acc=sums, out_dtype=tl.int32)
                sums = tl.dot(three, of_three, acc=sums, out_dtype=tl.int32)
                sums = tl.dot(four, of_four, acc=sums, out_dtype=tl.int32)
                inner = _whole(sums, COLUMNS)
            else:
                middle = tl.dot(mean.to(tl.float32), of_means, input_precision="ieee")
                one, two, three, four = code_parts(code, COMPILED)
                inner = tl.dot(one.to(tl.float32), of_one, input_precision="ieee")
                inner = tl.dot(two.to(tl.float32), of_two, acc=inner, input_precision="ieee")
                inner = tl.dot(three.to(tl.float32), of_three, acc=inner, input_precision="ieee")
                inner = tl.dot(four.to(tl.float32), of_four, acc=inner, input_precision="ieee")
            middle = middle * (unit[:, None] * mean_factor[None, :]) + constant[None, :]
            shared: tl.constexpr = (TILE // UNIT_PAGES, UNIT_PAGES * PAGE, COLUMNS)
            middle = tl.reshape(tl.broadcast_to(middle[:, None, :], shared), (tokens_at, COLUMNS))
            products = (inner * code_factor[None, :] - code_constant[None, :]) * scale[:, None] + middle
            if CAPPED:
                products = softcap * (
                    2.0 * tl.sigmoid(2.0 * products / softcap) - 1.0
                )  # softcap * tanh(products / softcap)
            present = (scale >= 0.0) & (token_lane < (end - start) * PAGE)
            if PADDED:  # pages of padding have no codes
                present = present & candidates(step, b, start + token_lane // PAGE, 0, stop, PAGE, PADDED)
            products = tl.where(present[:, None], products, float("-inf"))
            higher = tl.maximum(most, tl.ceil(tl.max(products, 0)))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            decay = tl.exp2(most - shift)
            tokens = power2(products - shift[None, :], COMPILED)
            each = tl.sum(tl.reshape(tokens, (TILE, PAGE, COLUMNS)), 1)
            pages = start + page_lane
            logs = natural_log(each, shift[None, :], COMPILED)
            tl.store(
                logits + group[None, :] * capacity + pages[:, None], logs,
                mask=(group < G)[None, :] & (pages < end)[:, None],
            )  # fmt: skip
            of_sinks = of_sinks * decay
            if start < first:  # sinks are not estimated
                sink = (token_lane < (first - start) * PAGE)[:, None]
                of_sinks += tl.sum(tl.where(sink, tokens, 0.0), 0)
                tokens = tl.where(sink, 0.0, tokens)
                each = tl.where((pages >= first)[:, None], each, 0.0)
            total = total * decay[None, :] + tokens
            both = tl.reshape(tl.join(decay, decay), (2 * COLUMNS,))
            parts = tl.trans(value_fields(value_code, VALUES, COMPILED))
            each = halves(value_weights(each, value_scale), VALUES)
            acc = tl.dot(parts, each, acc=acc * both[None, :], input_precision="ieee")
            most = higher
    place = stats + ((bh * num_splits + split) * 2) * COLUMNS + group
    tl.store(place, most * LN_2)
    weight = tl.sum(total, 0)
    tl.store(place + COLUMNS, weight + of_sinks)
    number, inside = field_places(VALUE_BYTES, DV)
    place = partials + ((bh * num_splits + split) * G + group) * (DV + 2)
    inside = inside & (begin < end)  # the sums of other splits have weight 0, and are not read
    tl.store(place[None, :] + number[:, None], whole_sums(acc), mask=inside[:, None] & (group < G)[None, :])
    tl.store(place + DV, most, mask=group < G)
    tl.store(place + DV + 1, weight, mask=group < G)


@triton.jit
def _in_place(byte):
    """The byte of a code that stands at place `byte` of an operand: a thread that loads 8 bytes at once multiplies 4 and 4."""
    return byte // 32 * 32 + byte % 16 // 4 * 8 + byte % 32 // 16 * 4 + byte % 4


@triton.jit
def _segments(directory, start, end, SEGMENT: tl.constexpr, TILE: tl.constexpr):
    """Where the segments of the tile from page `start` on lie: four numbers, of which a tile of fewer segments repeats some.

    Past the pages that a program scans these are the last ones: nothing is loaded from them.
    """
    last = (end - 1) // SEGMENT
    segment = start // SEGMENT
    one = tl.load(directory + tl.minimum(segment, last))
    two, three, four = one, one, one
    if TILE >= 2 * SEGMENT:
        two = tl.load(directory + tl.minimum(segment + 1, last))
    if TILE >= 4 * SEGMENT:
        three = tl.load(directory + tl.minimum(segment + 2, last))
        four = tl.load(directory + tl.minimum(segment + 3, last))
    return one, two, three, four


@triton.jit
def _places(tables, segments, h, start, H: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """The chunks of the six arrays, and the first page in them, for each of `segments`."""
    one = _place(tables, segments[0], h, start, H, SEGMENT, ROWS, TILE)
    two, three, four = one, one, one
    if TILE >= 2 * SEGMENT:
        two = _place(tables, segments[1], h, start, H, SEGMENT, ROWS, TILE)
    if TILE >= 4 * SEGMENT:
        three = _place(tables, segments[2], h, start, H, SEGMENT, ROWS, TILE)
        four = _place(tables, segments[3], h, start, H, SEGMENT, ROWS, TILE)
    return one, two, three, four


@triton.jit
def _place(tables, segment, h, start, H: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    page = (segment.to(tl.uint64) * H + h.to(tl.uint64)) * SEGMENT
    if TILE < SEGMENT:
        page += start % SEGMENT
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
    places, start, end, DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BYTES: tl.constexpr,
    VALUE_BYTES: tl.constexpr, PAGE: tl.constexpr, UNIT_PAGES: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr,
    M_WARPS: tl.constexpr, ALIGNED: tl.constexpr, VALUE_ALIGNED: tl.constexpr,
):  # fmt: skip
    """Means, units, codes, their scales, value codes, and their scales of the pages from `start` on, before `end`."""
    units_at: tl.constexpr = TILE // UNIT_PAGES
    page_lane = tl.arange(0, TILE)
    unit_lane = tl.arange(0, units_at)
    token_lane = tl.arange(0, TILE * PAGE)
    # Tokens and bytes of codes such that a thread multiplies on tensor cores what it has loaded (8 bytes at once).
    code_lane = token_lane // (16 * M_WARPS) * (16 * M_WARPS) + token_lane % 8
    code_lane += token_lane % (8 * M_WARPS) // 8 * 16 + token_lane // (8 * M_WARPS) % 2 * 8
    byte = tl.arange(0, BYTES)
    value_byte = tl.arange(0, VALUE_BYTES)
    column = tl.arange(0, BLOCK_K)
    means = _addresses(places, unit_lane, 0, units_at, SEGMENT // UNIT_PAGES, DK, UNIT_PAGES, 1)
    units = _addresses(places, unit_lane, 1, units_at, SEGMENT // UNIT_PAGES, 4, UNIT_PAGES, 1)
    codes = _addresses(places, code_lane, 2, TILE * PAGE, SEGMENT * PAGE, DK // 4, 1, PAGE)
    scales = _addresses(places, token_lane, 3, TILE * PAGE, SEGMENT * PAGE, 2, 1, PAGE)
    values = _addresses(places, page_lane, 4, TILE, SEGMENT, DV // 4, 1, 1)
    value_scales = _addresses(places, page_lane, 5, TILE, SEGMENT, 2, 1, 1)
    # Segments lie in chunks as a whole, so pages from `end` on may be read. What is there is not used.
    here = start < end
    value_code = tl.load(
        tl.multiple_of(values.to(tl.pointer_type(tl.int8)), VALUE_ALIGNED)[:, None] + value_byte[None, :],
        mask=here & (value_byte < DV // 4)[None, :], other=0,
    )  # fmt: skip
    value_scale = tl.load(value_scales.to(tl.pointer_type(tl.bfloat16)), mask=here, other=0.0)
    unit = tl.load(units.to(tl.pointer_type(tl.float32)), mask=here, other=0.0)
    scale = tl.load(scales.to(tl.pointer_type(tl.bfloat16)), mask=here, other=-1.0)
    mean = tl.load(
        tl.multiple_of(means.to(tl.pointer_type(tl.int8)), 16)[:, None] + column[None, :],
        mask=here & (column < DK)[None, :], other=0,
    )  # fmt: skip
    code = tl.load(
        tl.multiple_of(codes.to(tl.pointer_type(tl.int8)), ALIGNED)[:, None] + byte[None, :],
        mask=here & (byte < DK // 4)[None, :], other=0,
    )  # fmt: skip
    code = tl.reshape(code, (TILE * PAGE // (16 * M_WARPS), 2, M_WARPS, 8, BYTES // 32, 4, 2, 4))
    code = tl.reshape(tl.permute(code, (0, 2, 1, 3, 4, 6, 5, 7)), (TILE * PAGE, BYTES))
    return mean, unit, code, scale, value_code, value_scale


@triton.jit
def _addresses(
    places, lane, ARRAY: tl.constexpr, ITEMS: tl.constexpr, RUN: tl.constexpr, BYTES: tl.constexpr, PER_ITEM: tl.constexpr,
    PER_PAGE: tl.constexpr,
):  # fmt: skip
    """Addresses of the items `lane` of a tile in one array. A tile has ITEMS, a segment RUN, an item has BYTES.

    Args:
        PER_ITEM, PER_PAGE: pages of an item, or items of a page.
    """
    found = (places[0][ARRAY] + places[0][6] // PER_ITEM * (PER_PAGE * BYTES)) + lane * BYTES
    for run in tl.static_range(1, 4):
        if run * RUN < ITEMS:
            own = places[run][ARRAY] + places[run][6] // PER_ITEM * (PER_PAGE * BYTES)
            found = tl.where(lane >= run * RUN, own + (lane - run * RUN) * BYTES, found)
    return found


@triton.jit
def _whole(products, COLUMNS: tl.constexpr):
    """Products of integers, from those of their digits: [rows, COLUMNS], float32."""
    pairs = tl.reshape(products, (products.shape[0], COLUMNS, 2))
    return tl.sum(pairs * tl.where(tl.arange(0, 2) == 0, 256, 1)[None, None, :], 2).to(tl.float32)
