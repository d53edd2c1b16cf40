"""torch's fused attention with its log-sum-exp, so that attention over disjoint sets of tokens can be merged.

    causal        new tokens: queries and keys at the same positions; keys are repeated for the query heads, unless the kernel
                  takes fewer heads of keys (cuDNN, flash on a GPU)
    the last ones queries at the end of the keys: flash on a GPU takes them in one call, as its causal mask ends with the last
                  token; else causal and not causal, merged
    not causal    earlier tokens, without a mask: the query heads of a KV head become more queries, unless there are many
                  queries and the kernel takes fewer heads of keys; then queries are not copied

torch chooses the kernel (cuDNN, flash, memory-efficient) by device, dtype and shapes, as for `scaled_dot_product_attention`.
The kernel is called directly, because that function does not return the log-sum-exp. Instead of cuDNN small products get flash:
cuDNN prepares each new shape, and prompts have any length.

Where torch has no fused kernel (float64 on a GPU, odd head sizes), `reference.attend` computes the same in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from .reference import attend, merge_attention

MOST_PARTIALS = 6
"""Most partial results that are merged at a time. Each takes as much memory as the output."""
_TILE_QUERIES = 128
"""Queries that a program of a fused kernel takes. Fewer of one head leave it idle in part."""
_LEAST_CUDNN = 4e11
"""Floating-point operations of a call from which cuDNN is used. It prepares a new shape for 17 ms. On an H200 it does 560
TFLOP/s and flash 325, which makes up for that in 32 layers of so many operations: 7,000 new tokens of an 8B model."""
_MOST_DIM = 256
"""Largest head size of flash."""
_DIM_MULTIPLE = 8
"""Fused kernels need head sizes that are multiples of this. Other sizes are padded with zeros."""


def fused_attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over tokens without padding.

    Args:
        query: [B, H, G, Q, Dk].
        keys, values: [B, H, M, Dk] and [B, H, M, Dv].
        scale: factor of the scores.
        causal: whether query i attends to tokens 0 to i + M - Q, M >= Q; else to all tokens.
        softcap: as for `reference.attend`.
    Returns:
        out: [B, H, G, Q, Dv], the query's dtype, or float32 where no fused kernel serves.
        lse: [B, H, G, Q], float32: log-sum-exp of the scaled scores.
    """
    num_queries, num_tokens = query.shape[3], keys.shape[2]
    if causal and num_queries == 1:
        causal = False
    of_last = causal and num_tokens > num_queries
    if of_last and (softcap is not None or not _flash_serves_last(query, keys, values)):
        earlier = num_tokens - num_queries
        sides = ((keys[:, :, side], values[:, :, side]) for side in (slice(earlier), slice(earlier, None)))
        return merge_attention([
            fused_attention(query, *side, scale, last, softcap) for side, last in zip(sides, (False, True), strict=True)
        ])  # fmt: skip
    group, dim, shape = query.shape[2], values.shape[3], query.shape[:4]
    apart = causal or (group > 1 and num_queries >= _TILE_QUERIES)
    q, k, v = (_padded(states) for states in (query.flatten(1, 2) if apart else query.flatten(2, 3), keys, values))
    kernel: Kernel | None = _flash
    if not of_last:
        kernel = None if softcap is not None else _chosen_kernel(q, k, v, scale, causal)
    if kernel is None and softcap is None and apart and group > 1:
        if causal:
            k, v = (states.repeat_interleave(group, 1) for states in (k, v))
        else:
            q, apart = _padded(query.flatten(2, 3)), False
        kernel = _chosen_kernel(q, k, v, scale, causal)
    if kernel is None:
        mask = torch.ones((num_queries if causal else 1, num_tokens), dtype=torch.bool, device=query.device)
        return attend(query, keys, values, (mask.tril() if causal else mask)[None, None, None], scale, softcap)
    out, lse = kernel(q, k, v, scale, causal)
    if lse.shape != q.shape[:3]:  # another kernel's has a last dimension of one, or is padded
        lse = lse.reshape(*q.shape[:2], -1)[..., : q.shape[2]]
    return (out if out.shape[3] == dim else out[..., :dim]).view(*shape, dim), lse.float().view(shape)


def reads_in_place(key_dim: int, value_dim: int, dtype: torch.dtype) -> bool:
    """Whether `fused_attention` without a softcap copies neither keys nor values of these sizes, and makes no scores."""
    cuda = torch.backends.cuda
    return (
        key_dim == value_dim and key_dim % _DIM_MULTIPLE == 0 and key_dim <= _MOST_DIM and dtype.itemsize <= 4
        and (cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled())
    )  # fmt: skip


def _flash_serves_last(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether flash computes causal attention of the last queries in one call: on a GPU it aligns the mask to the last token.

    `torch.nn.attention.bias.causal_lower_right` relies on that too.
    """
    if not _is_on_gpu(query):
        return False
    groups = query.shape[2] > 1
    params = torch.backends.cuda.SDPAParams(query.flatten(1, 2), keys, values, None, 0.0, False, groups)
    return torch.backends.cuda.can_use_flash_attention(params)


def _chosen_kernel(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> Kernel | None:
    """The fused kernel that torch chooses for these states; None if none serves them as they are."""
    groups = keys.shape[1] != query.shape[1]
    if groups and not _is_on_gpu(query):
        return None
    chosen = torch._fused_sdp_choice(query, keys, values, None, 0.0, causal, scale=scale, enable_gqa=groups)
    if chosen == SDPBackend.CUDNN_ATTENTION.value and _operations(query, keys, values, causal) < _LEAST_CUDNN:
        params = torch.backends.cuda.SDPAParams(query, keys, values, None, 0.0, causal, groups)
        if torch.backends.cuda.can_use_flash_attention(params):
            return _flash
    return (_WITH_GROUPS if groups else _KERNELS).get(chosen)


def _is_on_gpu(query: Tensor) -> bool:
    return query.device.type == "cuda"


def _operations(query: Tensor, keys: Tensor, values: Tensor, causal: bool) -> float:
    pairs = query.shape[:3].numel() * keys.shape[2] / (2 if causal else 1)
    return 2.0 * pairs * (query.shape[3] + values.shape[3])


def _padded(states: Tensor) -> Tensor:
    missing = -states.shape[-1] % _DIM_MULTIPLE
    return F.pad(states, (0, missing)) if missing else states


def _cudnn(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, keys, values, None, True, 0.0, causal, scale=scale
    )
    return found[0], found[1]


def _flash(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values, 0.0, causal, scale=scale)
    found = torch.ops.aten._scaled_dot_product_flash_attention(query, keys, values, 0.0, causal, scale=scale)
    return found[0], found[1]


def _efficient(query: Tensor, keys: Tensor, values: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, keys, values, None, True, 0.0, causal, scale=scale
    )
    return found[0], found[1]


Kernel = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]

_WITH_GROUPS: dict[int, Kernel] = {
    SDPBackend.CUDNN_ATTENTION.value: _cudnn,
    SDPBackend.FLASH_ATTENTION.value: _flash,
}
"""Kernels that take fewer heads of keys and values than of queries."""
_KERNELS: dict[int, Kernel] = {
    SDPBackend.CUDNN_ATTENTION.value: _cudnn,
    SDPBackend.FLASH_ATTENTION.value: _flash,
    SDPBackend.EFFICIENT_ATTENTION.value: _efficient,
}
