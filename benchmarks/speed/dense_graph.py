"""Dense flash decoding in a CUDA graph captured by hand: what a serving engine does, and the floor with attention left out.

program (sequence and KV head, split)   attends to its share of all tokens of one sequence
program (sequence and query head)       merges the shares
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin


@triton.jit
def _flash_part(
    query, keys, values, out, lse, length, scale,
    G: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head, part = tl.program_id(0), tl.program_id(1)
    groups, dims, tile = tl.arange(0, BLOCK_G), tl.arange(0, D), tl.arange(0, TILE)
    q = tl.load(query + (head * G + groups[:, None]) * D + dims, mask=groups[:, None] < G, other=0.0)
    per_part = tl.cdiv(tl.cdiv(length, SPLITS), TILE) * TILE
    first = part * per_part
    best, total = tl.full([BLOCK_G], -float("inf"), tl.float32), tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, D], tl.float32)
    base = head.to(tl.int64) * length * D
    for start in range(first, min(first + per_part, length), TILE):
        tokens = start + tile
        at = base + tokens[:, None].to(tl.int64) * D + dims
        k = tl.load(keys + at, mask=tokens[:, None] < length, other=0.0)
        v = tl.load(values + at, mask=tokens[:, None] < length, other=0.0)
        scores = tl.where(tokens[None, :] < length, tl.dot(q, tl.trans(k)) * scale, -float("inf"))
        new = tl.maximum(best, tl.max(scores, 1))
        weights, old = tl.exp(scores - new[:, None]), tl.exp(best - new)
        total = total * old + tl.sum(weights, 1)
        acc = acc * old[:, None] + tl.dot(weights.to(v.dtype), v)
        best = new
    at = (head * SPLITS + part) * BLOCK_G + groups
    some = tl.maximum(total, 1e-37)  # a share may be empty
    tl.store(out + at[:, None] * D + dims, acc / some[:, None])
    tl.store(lse + at, tl.where(total > 0, best + tl.log(some), -float("inf")))


@triton.jit
def _merge_parts(
    parts, lse, out, G: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)  # of a query head
    head, group = row // G, row % G
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, D)
    at = (head * SPLITS + splits) * BLOCK_G + group
    values = tl.load(lse + at)
    weights = tl.exp(values - tl.max(values, 0))
    merged = tl.sum(tl.load(parts + at[:, None] * D + dims[None, :]) * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + row * D + dims, merged.to(out.dtype.element_ty))


class DenseLayer(CacheLayerMixin):
    """All keys and values at fixed addresses; the last token is written anew by every step."""

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None: ...

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        return -1


def flash_decode(module: Any, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Any, scaling: float,
                 **kwargs: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention of one query a sequence [B, heads, 1, D] to all its tokens; the floor: `flash_decode.attends` False."""
    if not flash_decode.attends:  # type: ignore[attr-defined]
        return query.transpose(1, 2), None
    batch, heads, dim, splits = *keys.shape[:2], keys.shape[3], flash_decode.splits  # type: ignore[attr-defined]
    group, streams = query.shape[1] // heads, batch * heads
    assert query[:, :, 0].is_contiguous()
    parts = torch.empty(streams, splits, 16, dim, device=query.device)
    lse = torch.empty(streams, splits, 16, device=query.device)
    _flash_part[(streams, splits)](
        query, keys, values, parts, lse, keys.shape[2], scaling, G=group, BLOCK_G=16, D=dim, SPLITS=splits, TILE=64,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    out = torch.empty(batch, 1, query.shape[1], dim, device=query.device, dtype=query.dtype)
    _merge_parts[(batch * query.shape[1],)](parts, lse, out, G=group, BLOCK_G=16, D=dim, SPLITS=splits, num_warps=4)
    return out, None


AttentionInterface.register("bench_flash", flash_decode)
AttentionMaskInterface.register("bench_flash", lambda *args, **kwargs: None)


def splits_of(batch: int) -> list[int]:
    """Numbers of splits that are tried: as many programs for a batch as for one sequence."""
    return sorted({1 << max(0, (programs // batch).bit_length() - 1) for programs in (32, 64, 128)})


@torch.no_grad()
def in_graph(
    model: Any, cache: Cache, num_tokens: int, attends: bool, batch: int = 1, bench: Callable[[Any], float] | None = None
) -> dict[str, Any]:  # fmt: skip
    """Milliseconds of a replayed step of a token of each sequence; the number of splits is the best of three.

    Args:
        bench: times a replay, in milliseconds; None for the median of what fits 200 ms.
    """
    token = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
    at = torch.full((batch, 1), num_tokens, device="cuda")
    flash_decode.attends = attends  # type: ignore[attr-defined]
    call = {"input_ids": token, "position_ids": at, "past_key_values": cache, "logits_to_keep": 1}
    previous, model.config._attn_implementation = model.config._attn_implementation, "bench_flash"
    took: dict[int, float] = {}
    try:
        for splits in splits_of(batch) if attends else (32,):
            flash_decode.splits = splits  # type: ignore[attr-defined]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    model(**call)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(**call)
            if bench is None:
                took[splits] = triton.testing.do_bench(graph.replay, warmup=30, rep=200, return_mode="median")
            else:
                took[splits] = bench(graph.replay)
            del graph
    finally:
        model.config._attn_implementation = previous
    best = min(took, key=lambda splits: took[splits])
    return {"tpot_ms": round(took[best], 3), **({"splits": best} if attends else {})}
