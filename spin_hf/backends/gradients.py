"""Gradients for new tokens after a prefix without gradients (training-time use).

    forward     as in inference; saves queries, keys and values of the new tokens for autograd
    backward    recomputes dense attention over the cached prefix and the new tokens, with a graph

Inference without `torch.no_grad()` therefore costs nothing more. Gradients are those of dense attention. They are exact if the
forward was dense: a prompt, more than `MAX_QUERIES` tokens in one call, a given mask, or a budget that covers the
context. Other cases raise in the backward pass, because most forwards have none:

    sparse step                           page selection has no gradient
    earlier tokens carried a graph        the cache stores no graph, so they would silently get no gradient
    earlier tokens cropped or replaced    the prefix of the forward no longer exists
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..attention.masks import is_internal, over_tokens
from ..errors import AttentionError
from ..kernels.descriptor_fields import MAX_QUERIES
from ..state import CacheState, LayerState
from ..storage.page_table import PageTable
from .base import Call
from .dense import fused


def with_gradients(
    state: CacheState, layer: LayerState, attends_all: bool, out: Tensor, query: Tensor, key: Tensor, value: Tensor,
    mask: Tensor | None, sinks: Tensor | None, append: bool, scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    """`out` with a backward pass.

    Args:
        attends_all: whether the budget covers the context.
        out: [B, Q, heads, Dv], which `SpinLayer.run` has just written for the other arguments.
    """
    sequences, num_queries = state.sequences, key.shape[2]
    given = None if mask is None or is_internal(mask) else mask
    starts_cache = sequences.start == 0 and num_queries > 1
    dense = given is not None or starts_cache or attends_all or not state.selects(num_queries)
    behind_graph = _carried_before(sequences, layer)
    step = Step(
        sequences, layer, sequences.start, sequences.past.now, sequences.mask.valid, dense, behind_graph, scale, softcap
    )
    if append and (key.requires_grad or value.requires_grad):
        _note_graph(sequences, layer)
    return _Attention.apply(out, step, query, key, value, given, sinks)


_carried: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()
"""Layer -> its first token that came with a graph, and `Past.now` at that time."""


def _carried_before(sequences: PageTable, layer: LayerState) -> bool:
    """Whether the cache still holds an earlier token that came with a graph."""
    carried = _carried.get(layer)
    if carried is None:
        return False
    token, since = carried
    return token < sequences.start and sequences.past.is_unchanged(since, token + 1)


def _note_graph(sequences: PageTable, layer: LayerState) -> None:
    if not _carried_before(sequences, layer):
        _carried[layer] = sequences.start, sequences.past.now


@dataclass(frozen=True)
class Step:
    """State of the cache at a forward, for its backward pass.

    Attributes:
        sequences, layer: page table and pages of the cache.
        start: tokens held before the forward.
        since: `Past.now` at the forward.
        valid: [B, tokens], bool, False for padding; None for no padding.
        dense: whether every query attended to all tokens that its mask allows.
        behind_graph: whether earlier tokens came with a graph.
        scale, softcap: as in `Call`.
    """

    sequences: PageTable
    layer: LayerState
    start: int
    since: int
    valid: Tensor | None
    dense: bool
    behind_graph: bool
    scale: float
    softcap: float | None

    def check(self) -> None:
        """Raise AttentionError if gradients would not be exact."""
        if not self.dense:
            raise AttentionError(
                "SpinCache: expected a backward pass through steps that attend to everything, got one through a sparse step; "
                f"give the cache budget=1.0, or more than {MAX_QUERIES} tokens in one forward, or use a DynamicCache"
            )
        if self.behind_graph:
            raise AttentionError(
                f"SpinCache: expected the {self.start} tokens before to come from forwards under torch.no_grad(), got a "
                "backward pass after tokens that carry gradients, which the cache does not keep; give all tokens that are to "
                "get gradients in one forward, or use a DynamicCache"
            )
        if not self.sequences.past.is_unchanged(self.since, self.start):
            raise AttentionError(
                f"SpinCache: expected the {self.start} tokens before to be held until the backward pass, got a cache that was "
                "cropped, reset or given another batch since; call backward first, or crop the new tokens only"
            )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
        """Differentiable dense attention [B, Q, heads, Dv] over the prefix and the new tokens."""
        num_queries, batch_size = query.shape[2], query.shape[0]
        if self.start:
            assert self.layer.store is not None
            with torch.no_grad():
                held = self.layer.store.held(self.start)
            key, value = (torch.cat([old.to(new), new], 2) for old, new in zip(held, (key, value), strict=True))
        length = self.start + num_queries
        if mask is not None:
            allowed: Tensor | None = over_tokens(mask, batch_size, query.shape[1], num_queries, length)
        elif self.start == 0 and self.valid is None and num_queries > 1:
            allowed = None
        else:
            tokens = torch.arange(length, device=query.device)
            allowed = (tokens <= tokens[self.start :].unsqueeze(1)).expand(batch_size, 1, -1, -1)
            if self.valid is not None:
                allowed = allowed & self.valid.to(query.device)[:, None, None, :length]
        call = Call(query.unflatten(1, (key.shape[1], -1)), self.scale, self.softcap, sinks)
        if call.is_plain:
            floats = allowed is not None and allowed.dtype != torch.bool
            out = fused(call, key, value, allowed.to(query.dtype) if floats and allowed is not None else allowed)
        else:
            out = _attend(call, key, value, allowed)
        return out.flatten(1, 2).transpose(1, 2)


class _Attention(torch.autograd.Function):
    """Attention computed without a graph. The backward pass recomputes it with one."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, step: Step, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.step = step
        ctx.save_for_backward(query, key, value, mask, sinks)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.step.check()
        needed = ctx.needs_input_grad[2:]
        inputs = [
            None if given is None else given.detach().requires_grad_(need)
            for given, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            out = ctx.step.attend(*inputs)
        wanted = [given for given in inputs if given is not None and given.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grads[0].to(out.dtype)))
        return None, None, *(next(found) if need else None for need in needed)


def _attend(call: Call, keys: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
    """Attention [B, H, G, Q, Dv] with softcap and sinks. A fully masked query gets zeros and no gradient."""
    heads = call.query.shape[1:3]
    query, num_queries = call.query.float(), call.query.shape[3]
    scores = (query.flatten(2, 3) @ keys.float().transpose(-1, -2)).unflatten(2, (heads[1], num_queries)) * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if allowed is None:
        allowed = torch.ones((num_queries, keys.shape[2]), dtype=torch.bool, device=keys.device).tril()
        allowed = allowed.expand(len(query), 1, -1, -1)
    allowed = allowed.unflatten(1, heads if allowed.shape[1] > 1 else (1, 1))
    if allowed.dtype != torch.bool:
        scores, allowed = scores + allowed, allowed > float("-inf")
    nothing = ~allowed.any(-1, keepdim=True)
    scores = scores.masked_fill(~(allowed | nothing), float("-inf"))
    if call.sinks is not None:
        sinks = call.sinks.float().view(1, *heads, 1, 1).expand(len(query), -1, -1, num_queries, 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = weights.masked_fill(nothing, 0.0)
    out = (weights.flatten(2, 3) @ values.float()).unflatten(2, (heads[1], num_queries))
    return out.to(call.query.dtype)
