"""Estimated attention to pages that are not selected: additional splits of split-KV attention, over mean keys and values.

    weight of a page   tokens * exp(logit), with the logit scale * q . mean key in LOGITS (or its correction by reranking)
    pages              all candidates except the selected ones, whose logits `choose_kernel` set to -infinity
                       ZONE: only those in bins down to an edge

The kernel reads each mean value once, at memory bandwidth. `attend_kernel` merges the split outputs. The specification is
`Method.estimate` of RetroInfer and Bisection.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common import (
    DIRECTORY, DIRECTORY_STRIDE, FIRST, LOGITS, NUM_SELECTED, PAGE_CAPACITY, PLAN_FIELDS, POSITION, SCALE_1,
    SCORES, STOP, SUMMARY_1, log_tokens, own_layer, own_step, score_bins, segment_vectors, triton_dtype, wait_for_launch,
)  # fmt: skip
from ..descriptor_fields import BINS_PER_NAT, NUM_BINS
from ..launch import Launch, LaunchShape, LayerBuffers, StepBuffers, power_of_two, dependent
from ..recipe import KernelRecipe


def estimate_rest(
    launch: Launch, buffers: StepBuffers, layer: LayerBuffers, plan: Tensor, *, group: int, softcap: float | None,
    recipe: KernelRecipe, shape: LaunchShape,
) -> None:  # fmt: skip
    """Write the split outputs of estimated pages, for one query of `group` heads per KV head."""
    quantized = shape.quantized[1]
    runs = shape.segments_at_a_time(shape.block_v, 1 if quantized else shape.dtype.itemsize)
    launch(
        estimate_kernel, (buffers.num_streams, buffers.splits.estimate), buffers.step, layer.descriptor, plan,
        buffers.zone_edges, buffers.split_outputs, softcap or 1.0, CAPPED=softcap is not None, ZONE=recipe.estimates_zone,
        QUANTIZED=quantized, SUMMARY=triton_dtype(shape.dtype), H=shape.num_heads, G=group,
        BLOCK_G=max(16, power_of_two(group)), DV=shape.value_dim, BLOCK_V=shape.block_v, PAGE=shape.page_size,
        SEGMENT=shape.segment_pages, ROWS=shape.rows_per_chunk, PADDED=shape.padded, RUNS=runs, BINS=NUM_BINS,
        PER_NAT=BINS_PER_NAT, SPLITS=buffers.splits.attend, DTYPE=triton_dtype(shape.dtype), COMPILED=shape.compiled,
        APART=shape.apart, num_warps=4, num_stages=1, **dependent(shape),
    )  # fmt: skip


@triton.jit
def estimate_kernel(
    step, layer, plan, edges, split_outputs, softcap,
    CAPPED: tl.constexpr, ZONE: tl.constexpr, QUANTIZED: tl.constexpr, SUMMARY: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, BLOCK_G: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr, PAGE: tl.constexpr,
    SEGMENT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr, RUNS: tl.constexpr, BINS: tl.constexpr,
    PER_NAT: tl.constexpr, SPLITS: tl.constexpr, DTYPE: tl.constexpr, COMPILED: tl.constexpr, APART: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (b * H + h, i) handles split i of the segments.

    Args:
        edges: int32 [B * H]: the last bin that is estimated, if ZONE.
        split_outputs: float32 [B * H, SPLITS + num_programs(1), 2, G, DV], also given to `attend_kernel`. Entry SPLITS + i is
            written.
        SUMMARY: dtype of the mean values, unless they are QUANTIZED.
        RUNS: segments per tile.
        DTYPE: in which weights and values are multiplied.
        COMPILED: whether the kernel is compiled for a device; else it is interpreted.
    """
    wait_for_launch(PDL)
    bh = tl.program_id(0)
    split = tl.program_id(1)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    step = own_step(step, b, APART)
    layer = own_layer(layer, b, APART)
    if APART and tl.load(step + POSITION) < 0:  # no sequence
        return
    row = plan + b * PLAN_FIELDS
    capacity = tl.load(step + PAGE_CAPACITY)
    logits = tl.load(step + LOGITS).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * G * capacity
    scores = tl.load(step + SCORES).to(tl.pointer_type(tl.float32)) + bh.to(tl.int64) * capacity
    first = tl.load(row + FIRST)
    stop = tl.load(row + STOP)
    group = tl.arange(0, BLOCK_G)
    column = tl.arange(0, BLOCK_V)
    lane = tl.arange(0, RUNS * SEGMENT)
    most = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    share = tl.cdiv(tl.cdiv(stop, SEGMENT * RUNS), tl.num_programs(1)) * RUNS
    begin = split * share
    end = tl.minimum(begin + share, tl.cdiv(stop, SEGMENT))
    if (tl.load(row + NUM_SELECTED) < stop - first) & (begin < end):
        table = tl.load(layer + SUMMARY_1)
        units = tl.load(layer + SCALE_1)
        directory = tl.load(step + DIRECTORY).to(tl.pointer_type(tl.int32)) + b * tl.load(step + DIRECTORY_STRIDE)
        edge = tl.load(edges + bh)
        for segment in range(begin, end, RUNS):
            pages = segment * SEGMENT + lane
            inside = (pages >= first) & (pages < stop)
            values, unit = segment_vectors(
                directory, table, units, h, segment, end, stop, tl.int8 if QUANTIZED else SUMMARY, H, DV, BLOCK_V,
                SEGMENT, ROWS, RUNS,
            )  # fmt: skip
            each = tl.load(
                logits + group[:, None] * capacity + pages[None, :], mask=(group < G)[:, None] & inside[None, :],
                other=float("-inf"),
            )  # fmt: skip
            if ZONE:
                score = tl.load(scores + pages, mask=inside, other=float("-inf"))
                in_zone = (score > float("-inf")) & (score_bins(score, BINS, PER_NAT) <= edge)
                each = tl.where(in_zone[None, :], each, float("-inf"))
            if CAPPED:
                capped = softcap * (2.0 * tl.sigmoid(2.0 * each / softcap) - 1.0)  # softcap * tanh(each / softcap)
                each = tl.where(each == float("-inf"), each, capped)
            each += log_tokens(step, b, pages, inside, PAGE, PADDED)[None, :]
            higher = tl.maximum(most, tl.max(each, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            decay = tl.exp(most - shift)
            weights = tl.exp(each - shift[:, None])
            total = total * decay + tl.sum(weights, 1)
            weights = (weights * unit[None, :]).to(DTYPE)
            if QUANTIZED and COMPILED:
                values = whole_numbers(values, DTYPE)
            acc = acc * decay[:, None] + tl.dot(weights, values.to(DTYPE), input_precision="ieee")
            most = higher
    lse = tl.where(total > 0, most + tl.log(tl.maximum(total, 1e-37)), float("-inf"))
    acc = acc / tl.maximum(total, 1e-37)[:, None]
    entry = bh * (SPLITS + tl.num_programs(1)) + SPLITS + split
    mine = split_outputs + (entry * 2 * G + group)[:, None] * DV + column[None, :]
    there = (group < G)[:, None] & (column < DV)[None, :]
    tl.store(mine, acc, mask=there)
    tl.store(mine + G * DV, tl.broadcast_to(lse[:, None], (BLOCK_G, BLOCK_V)), mask=there)


@triton.jit
def whole_numbers(codes, dtype: tl.constexpr):
    """Convert int8 codes to a floating dtype, exactly and in place in registers.

    The GPU's conversion instruction has an eighth of the normal throughput; this needs about two operations per number. Inline
    assembly also hides the conversion from Triton, which would move the codes byte by byte through shared memory first.
    """
    if dtype == tl.bfloat16:  # 128 + the low seven bits, less 128 or 256; lop3: (a & b) | c, below (a ^ b) | c
        made = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 two, one, off, unit;
            mov.b32 unit, 0x3f803f80;
            prmt.b32 two, $2, 0, 0x4140;
            lop3.b32 one, two, 0x007f007f, 0x43004300, 0xea;
            lop3.b32 off, two, 0x00800080, 0xc300c300, 0xea;
            fma.rn.bf16x2 $0, one, unit, off;
            prmt.b32 two, $2, 0, 0x4342;
            lop3.b32 one, two, 0x007f007f, 0x43004300, 0xea;
            lop3.b32 off, two, 0x00800080, 0xc300c300, 0xea;
            fma.rn.bf16x2 $1, one, unit, off;
            }
            """,
            "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=False, pack=4,
        )  # fmt: skip
    elif dtype == tl.float16:  # 1024 + 128 + the number, less that
        made = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 two, off;
            mov.b32 off, 0xe480e480;
            prmt.b32 two, $2, 0, 0x4140;
            lop3.b32 two, two, 0x00800080, 0x64006400, 0xbe;
            add.rn.f16x2 $0, two, off;
            prmt.b32 two, $2, 0, 0x4342;
            lop3.b32 two, two, 0x00800080, 0x64006400, 0xbe;
            add.rn.f16x2 $1, two, off;
            }
            """,
            "=r,=r,r", [codes], dtype=tl.float16, is_pure=False, pack=4,
        )  # fmt: skip
    else:
        made = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [codes.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        ).to(dtype)
    return made
