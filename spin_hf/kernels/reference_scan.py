"""Specification of the scan over coded pages, and of the attention that uses it (`decode/scan_pages.py`, `attend_pages.py`).

    codes       D / 4 bytes of a vector; byte i has four fields of 2 bits, lowest first: f0 f1 f2 f3

                i < D / 8     two coordinates of the first quarter    2i = f0 + 4 f1, 2i + 1 = f2 + 4 f3    (less 7.5)
                i >= D / 8    four of the second and third            4i - D / 4 + j = fj                   (less 1.5)

                The last quarter of the coordinates has no code. A level is a code less half of the largest one, so a level of
                four bits is (f0 - 1.5) + 4 (f1 - 1.5). All bytes are therefore decoded alike.

    logit       scale * q . origin + (scale * q @ inverse) . (mean of the unit + scale of the token * level * width)
    log weight  of a page: log sum of exp(logit) over its tokens; a token with a scale below 0 is absent (padding)
    estimate    sum over pages of weight * (scale of the page * level * width) @ values.T + origin of the values
    unread      the estimate of all pages, less that of the pages that are read exactly

A unit is `UNIT_PAGES` consecutive pages. B sequences, H KV heads, G query heads per KV head, N pages, P tokens per page.
Everything is computed in the dtype of the queries: float64 gives the numbers that kernels are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNIT_PAGES = 4
"""Pages that share a mean key."""


@dataclass(frozen=True)
class CodedBasis:
    """The coordinates of one layer's codes.

    Attributes:
        inverse: [B, H, D, D]: queries are transformed by q @ inverse.
        origin, widths: [B, H, D]: the key that all coordinates are relative to; distance of two levels at scale 1.
        value_axes: [B, H, Dv, Dv]: values are coordinates @ value_axes.T + value_origin.
        value_origin, value_widths: [B, H, Dv].
        forward: [B, H, D, D]: keys are encoded as (key - origin) @ forward.
    """

    inverse: Tensor
    origin: Tensor
    widths: Tensor
    value_axes: Tensor
    value_origin: Tensor
    value_widths: Tensor
    forward: Tensor


@dataclass(frozen=True)
class CodedPages:
    """Codes of N pages.

    Attributes:
        mean, unit: int8 [B, H, ceil(N / UNIT_PAGES), D], and the scale of each mean.
        codes, scale: uint8 [B, H, N, P, D / 4], and bfloat16 [B, H, N, P], below 0 for absent tokens.
        value_codes, value_scale: uint8 [B, H, N, Dv / 4], and bfloat16 [B, H, N].
    """

    mean: Tensor
    unit: Tensor
    codes: Tensor
    scale: Tensor
    value_codes: Tensor
    value_scale: Tensor


def pack(numbers: Tensor) -> Tensor:
    """Codes [..., D / 4], uint8, of numbers [..., 3 D / 4]: 0 to 15 in the first third, 0 to 3 in the others."""
    third = numbers.shape[-1] // 3
    fine, rough = numbers.to(torch.uint8).split([third, 2 * third], -1)
    fine = fine.unflatten(-1, (-1, 2))
    rough = rough.unflatten(-1, (-1, 4))
    bits = torch.tensor([0, 2, 4, 6], device=numbers.device)
    packed = fine[..., 0] | (fine[..., 1] << 4), (rough << bits).sum(-1).to(torch.uint8)
    return torch.cat(packed, -1)


def fields(codes: Tensor) -> Tensor:
    """Fields [..., 4 * bytes], int64, of codes [..., bytes]."""
    bits = torch.tensor([0, 2, 4, 6], device=codes.device)
    return ((codes.long().unsqueeze(-1) >> bits) & 3).flatten(-2)


def levels(centred: Tensor) -> Tensor:
    """Coordinates [..., D] from what any linear function made of centred fields (field - 1.5) [..., D]."""
    half = centred.shape[-1] // 2
    fine, rough = centred.split([half, half], -1)
    fine = fine[..., ::2] + 4 * fine[..., 1::2]
    return torch.cat([fine, rough, torch.zeros_like(fine)], -1)


def unpack(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Levels [..., D] of codes [..., D / 4]; 0 in the last quarter."""
    return levels(fields(codes).to(dtype) - 1.5)


def page_log_weights(
    query: Tensor, basis: CodedBasis, pages: CodedPages, scale: float, softcap: float | None = None
) -> Tensor:
    """Log weights of pages; -infinity for pages without tokens.

    Args:
        query: [B, H, G, D].
    Returns:
        [B, H, G, N].
    """
    dtype, num_pages = query.dtype, pages.codes.shape[2]
    states = query @ basis.inverse.to(dtype) * scale
    constant = (query * scale * basis.origin.to(dtype).unsqueeze(2)).sum(-1)
    means = pages.mean.to(dtype) * pages.unit.to(dtype).unsqueeze(-1)
    middle = (states @ means.mT).repeat_interleave(UNIT_PAGES, 3)[..., :num_pages]
    inside = unpack(pages.codes, dtype) * (
        pages.scale.to(dtype).unsqueeze(-1) * basis.widths.to(dtype)[:, :, None, None]
    )
    logits = torch.einsum("bhgd,bhnpd->bhgnp", states, inside) + (middle + constant.unsqueeze(-1)).unsqueeze(-1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.masked_fill(pages.scale.unsqueeze(2) < 0, -torch.inf).logsumexp(-1)


def coded_sum(weights: Tensor, pages: CodedPages) -> Tensor:
    """Sum over pages of weight * scale * (field - 1.5): [B, H, G, Dv], of weights [B, H, G, N]. What kernels accumulate."""
    parts = (fields(pages.value_codes) - 1.5).to(weights.dtype)
    return (weights * pages.value_scale.to(weights.dtype).unsqueeze(2)) @ parts


def decoded_sum(total: Tensor, basis: CodedBasis, weight: Tensor) -> Tensor:
    """Sum of weighted values [B, H, G, Dv], from a `coded_sum` and the sum of its weights [B, H, G]."""
    dtype = total.dtype
    coordinates = levels(total) * basis.value_widths.to(dtype).unsqueeze(2)
    values = coordinates @ basis.value_axes.to(dtype).mT
    return values + weight.unsqueeze(-1) * basis.value_origin.to(dtype).unsqueeze(2)


def estimate(log_weights: Tensor, estimated: Tensor, basis: CodedBasis, pages: CodedPages) -> tuple[Tensor, Tensor]:
    """Attention to the pages `estimated` [B, H, N] by their codes.

    Args:
        log_weights: [B, H, G, N], from `page_log_weights`.
    Returns:
        out [B, H, G, Dv] and lse [B, H, G], as `reference.attend`: to be merged by `reference.merge_attention`.
    """
    chosen = log_weights.masked_fill(~estimated.unsqueeze(2), -torch.inf)
    lse = chosen.logsumexp(-1)
    weights = (chosen - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return decoded_sum(coded_sum(weights, pages), basis, weights.sum(-1)), lse


def subtract(
    log_weights: Tensor, candidates: Tensor, read: Tensor, basis: CodedBasis, pages: CodedPages
) -> tuple[Tensor, Tensor]:
    """As `estimate` of `candidates & ~read`, in the order of the kernels: all candidates, less those that are read.

    All weights are relative to a power of two, at least as large as each of them: moving it rounds nothing.
    """
    most = log_weights.masked_fill(~candidates.unsqueeze(2), -torch.inf).amax(-1)
    power = (most.masked_fill(most == -torch.inf, 0.0) * 1.4426950408889634).ceil() * 0.6931471805599453
    weights = (log_weights - power.unsqueeze(-1)).exp()
    scanned, taken = weights * candidates.unsqueeze(2), weights * (candidates & read).unsqueeze(2)
    weight = scanned.sum(-1) - taken.sum(-1)
    total = decoded_sum(coded_sum(scanned, pages), basis, scanned.sum(-1))
    total = total - decoded_sum(coded_sum(taken, pages), basis, taken.sum(-1))
    some = (candidates & ~read).any(-1).unsqueeze(2) & (weight > 0)
    out = total / weight.where(some, torch.ones_like(weight)).unsqueeze(-1)
    return out * some.unsqueeze(-1), (power + weight.log()).masked_fill(~some, -torch.inf)
