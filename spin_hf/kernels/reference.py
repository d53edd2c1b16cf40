"""PyTorch operations of the decode path: the specification of the decode kernels, and the CPU backend.

All functions take tensors and numbers only. A growing array is a list of *chunks* of equal size; row ids are consecutive
across chunks (see `storage/chunked_array.py`). Dims: B sequences, H KV heads, G query heads per KV head, Q query tokens,
N pages, P tokens per page, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .descriptor_fields import BINS_PER_NAT, NUM_BINS, Rating

NUM_BUCKETS = 64
"""Age buckets of the eviction policy, one step each; older slots share the last bucket (SPIN, bucketed LRU)."""

_SCORE_TILE_ELEMENTS = 1 << 25
"""Upper limit of elements of a float32 score tile in `attend`: 128 MiB."""


# ---------------------------------------------------------------------------------------------------- rows of chunks


def _per_chunk(chunks: Sequence[Tensor], rows: Tensor) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Yield (chunk, indices into `rows`, rows inside the chunk) for every chunk that `rows` (1-D) touches."""
    size = chunks[0].shape[0]
    number = torch.div(rows, size, rounding_mode="floor")
    for index in number.unique().tolist():
        here = (number == index).nonzero().squeeze(1)
        yield chunks[index], here, rows[here] - index * size


def take_rows(chunks: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Gather rows of a chunked array.

    Args:
        chunks: tensors [rows_per_chunk, *row_shape] of one dtype and device.
        rows: int64 ids of any shape, on the chunks' device.
    Returns:
        [*rows.shape, *row_shape], a copy.
    """
    flat = rows.reshape(-1)
    row_shape = chunks[0].shape[1:]
    if len(chunks) == 1:
        return chunks[0].index_select(0, flat).view(*rows.shape, *row_shape)
    out = chunks[0].new_empty((flat.shape[0], *row_shape))
    for chunk, here, inside in _per_chunk(chunks, flat):
        out[here] = chunk[inside]
    return out.view(*rows.shape, *row_shape)


def put_rows(chunks: Sequence[Tensor], rows: Tensor, values: Tensor) -> None:
    """Write `values` [*rows.shape, *row_shape] to distinct rows of a chunked array. Mutates the chunks."""
    rows_to_put(chunks, rows, values)()


def rows_to_put(chunks: Sequence[Tensor], rows: Tensor, values: Tensor) -> Callable[[], None]:
    """As `put_rows`, in two phases: allocates at once, and returns a function that writes without allocating."""
    flat = rows.reshape(-1)
    values = values.reshape(flat.shape[0], *chunks[0].shape[1:]).to(chunks[0].dtype)
    writes = [(chunk, inside, values[here]) for chunk, here, inside in _per_chunk(chunks, flat)]

    def write() -> None:
        for chunk, inside, content in writes:
            chunk[inside] = content

    return write


def put_tokens(
    pages: Tensor, first: int, fields: Sequence[Tensor], split: Callable[[Tensor], Sequence[Tensor]]
) -> None:
    """Write consecutive tokens into the pages of consecutive segments. Mutates `pages`.

    Args:
        pages: [segments, H, pages of a segment, row elements].
        first: place of the first token, counted from the first page.
        fields: the stored fields of the tokens (keys, values, scales), each [H, n, width]. They fit behind `first`.
        split: returns views [..., P, width] of these fields in rows, as `PageLayout.split`.
    """
    places, count, done = split(pages), fields[0].shape[1], 0
    num_pages, page_size = places[0].shape[2:4]
    while done < count:
        page, offset = divmod(first + done, page_size)
        segment, page = divmod(page, num_pages)
        tokens = count - done
        if offset or tokens < page_size:  # a part of a page
            tokens = min(tokens, page_size - offset)
            targets = [place[segment, :, page, offset : offset + tokens] for place in places]
            shape: tuple[int, ...] = (tokens,)
        elif page or tokens < num_pages * page_size:  # pages of a segment
            number = min(tokens // page_size, num_pages - page)
            targets, shape = [place[segment, :, page : page + number] for place in places], (number, page_size)
        else:  # whole segments
            number = tokens // (num_pages * page_size)
            targets = [place[segment : segment + number].transpose(0, 1) for place in places]
            shape = number, num_pages, page_size
        tokens = math.prod(shape)
        for target, field in zip(targets, fields, strict=True):
            target.copy_(field[:, done : done + tokens].view(field.shape[0], *shape, field.shape[2]))
        done += tokens


def split_pages(pages: Tensor, page_size: int, key_dim: int) -> tuple[Tensor, Tensor]:
    """Views of the keys [..., P, Dk] and the values [..., P, Dv] of pages [..., P * (Dk + Dv)]."""
    keys, values = pages.tensor_split([page_size * key_dim], dim=-1)
    each, value_dim = (*pages.shape[:-1], page_size), values.shape[-1] // page_size
    return keys.view(*each, key_dim), values.view(*each, value_dim)


def quantize(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize vectors to int8, one scale per vector: |vectors - values * scale| <= scale / 2.

    Args:
        vectors: [..., D], float32.
    Returns:
        values: [..., D], int8, in [-127, 127], halves rounded to even; scale: [...], float32, > 0, or non-finite as the vector.
    """
    scale = vectors.abs().amax(-1) * (1 / 127)  # not `/ 127`: CPU and GPU round that differently
    scale = torch.where(scale == 0, 1.0, scale)  # a vector that underflows is stored as zeros
    return torch.round(vectors / scale.unsqueeze(-1)).to(torch.int8), scale


def page_means(states: Tensor, valid: Tensor) -> Tensor:
    """The mean of each page over its valid tokens.

    Args:
        states: [B, H, n, P, D]; valid: [B, 1 or H, n, P], bool.
    Returns:
        [B, H, n, D], float32; zeros for a page without a valid token.
    """
    total = states.masked_fill(~valid.unsqueeze(-1), 0.0).sum(-2, dtype=torch.float32)
    return total / valid.sum(-1, keepdim=True).clamp(min=1)


def move_tokens(content: Tensor, order: Tensor, page_size: int, fields: Sequence[tuple[int, int]]) -> Tensor:
    """Permute tokens within and between pages.

    Args:
        content: [B, H, n, row elements].
        order: [B, H, n * P], int64: place i gets the token at place order[i].
        fields: (first element in a row, elements per token) of each stored field.
    Returns:
        A copy of the shape of `content`; elements outside all fields are undefined.
    """
    moved = torch.empty_like(content)
    for first, width in fields:
        tokens = content[..., first : first + page_size * width].unflatten(3, (page_size, width)).flatten(2, 3)
        index = order.unsqueeze(-1).expand(-1, -1, -1, width)
        moved[..., first : first + page_size * width] = tokens.gather(2, index).view(
            *content.shape[:3], page_size * width
        )
    return moved


# ------------------------------------------------------------------------------------------------------------ select


def page_zones(valid_per_page: Tensor, num_sink_tokens: int, recent_window: int) -> tuple[Tensor, Tensor]:
    """Split the pages of each sequence into fixed pages, which are always attended to, and candidates for selection.

    A page is fixed if it holds one of the first `num_sink_tokens` or of the last `recent_window` valid tokens. A page
    without a valid token is neither. The query's own token is the last valid one.

    Args:
        valid_per_page: [B, N], int64: valid tokens of each page, up to the query.
    Returns:
        fixed, candidates: [B, N], bool, disjoint.
    """
    upto = valid_per_page.cumsum(1)
    before, after = upto - valid_per_page, upto[:, -1:] - upto
    filled = valid_per_page > 0
    fixed = filled & ((before < num_sink_tokens) | (after < recent_window))
    return fixed, filled & ~fixed


def list_pages(chosen: Tensor) -> Tensor:
    """The page numbers that are True in `chosen` [B, N], ascending: [B, largest count of a row], padded with -1."""
    width = int(chosen.sum(1).max())
    order = torch.argsort(chosen.to(torch.int8), dim=1, descending=True, stable=True)[:, :width]
    return torch.where(chosen.gather(1, order), order, -1)


def select_top_pages(scores: Tensor, num_pages: Tensor) -> Tensor:
    """Select the highest-scoring pages of every KV head.

    Args:
        scores: [B, H, N], float32; -inf excludes a page, +inf selects it first.
        num_pages: [B], int64: pages to select in each sequence.
    Returns:
        Page numbers [B, H, max(num_pages)], int64, best first, padded with -1.
    """
    width = min(int(num_pages.max()), scores.shape[-1])
    best, pages = scores.topk(width, dim=-1)
    wanted = torch.arange(width, device=scores.device) < num_pages[:, None, None]
    return torch.where(wanted & (best > float("-inf")), pages, -1)


def group_scores(logits: Tensor, candidates: Tensor, rating: Rating, log_tokens: Tensor | None = None) -> Tensor:
    """Scores of pages for each KV head, from the logits of its query heads.

    Args:
        logits: [B, H, G, N], float32.
        candidates: [B, N], bool: the pages that the softmax is over.
        rating: see `Rating`.
        log_tokens: [B, N]: logarithm of each page's token count, added to its logits in the softmax; None for no weights.
            With MEAN, it is added to the score too.
    Returns:
        [B, H, N], logarithms; -inf for pages that are not candidates.
    """
    others = ~candidates[:, None, None]
    logits = logits.masked_fill(others, float("-inf"))
    if rating == Rating.BOUND:
        highest = logits.amax((2, 3), keepdim=True)
        lowest = logits.masked_fill(others, float("inf")).amin(3, keepdim=True).amax(2, keepdim=True)
        return ((logits - highest) * (30.0 / (highest - lowest).clamp(min=1e-20))).amax(2)
    weights = logits if log_tokens is None else logits + log_tokens[:, None, None]
    log_probabilities = logits - weights.logsumexp(3, keepdim=True)
    if rating == Rating.LIKELIEST:
        return log_probabilities.amax(2)
    mean = log_probabilities.logsumexp(2) - math.log(logits.shape[2])
    return mean if log_tokens is None else mean + log_tokens[:, None]


def score_bins(log_scores: Tensor) -> Tensor:
    """Bins of scores, best first: 0 for infinity, then 64 bins per nat downward from 0.

    Args:
        log_scores: logarithms of at most about 0, any shape.
    Returns:
        int64, the same shape, in [0, NUM_BINS).
    """
    depth = ((-log_scores).clamp(min=0) * BINS_PER_NAT).clamp(max=NUM_BINS - 2).long()
    return torch.where(log_scores == float("inf"), 0, 1 + depth)


def pages_down_to(log_scores: Tensor, num_pages: Tensor) -> Tensor:
    """The best `num_pages` pages of every KV head, and all other pages in the bin of the last one.

    Args:
        log_scores: [B, H, N], as for `score_bins`; -inf excludes a page.
        num_pages: [B], int64: lower limit of the number of pages.
    Returns:
        [B, H, N], bool; every candidate if there are fewer than `num_pages`.
    """
    bins = score_bins(log_scores).masked_fill(log_scores == float("-inf"), NUM_BINS)
    ranked = bins.sort(-1).values
    last = (num_pages - 1).clamp(0, bins.shape[-1] - 1)[:, None, None].expand(*bins.shape[:2], 1)
    edge = ranked.gather(2, last)
    return (bins <= edge) & (bins < NUM_BINS) & (num_pages > 0)[:, None, None]


# ---------------------------------------------------------------------------------------------------------- retrieve


def admit_pages(
    page_slot: Tensor, slot_page: Tensor, slot_step: Tensor, pages: Tensor, step: int
) -> tuple[Tensor, Tensor, int]:
    """Make pages resident: look-up, miss list, victims by bucketed LRU, new page table. Contents are not moved.

    Free slots are taken first, then those of the oldest bucket; within a bucket by slot number. Slots of the pages in
    this call are never victims.

    Args:
        page_slot: [B, H, N], int32: the slot of each page, -1 where it is not resident. Mutated.
        slot_page: [B, H, C], int32: the page in each slot, -1 where it is free. Mutated.
        slot_step: [B, H, C], int64: the step that last touched each slot. Mutated.
        pages: [B, H, n], int64, distinct in each row, -1 for none; n <= C.
        step: the current step.
    Returns:
        slots: [B, H, n], int64, the slot of each page, -1 for none.
        missed: [B, H, n], bool, True where the content must be loaded.
        evicted: number of evicted pages.
    """
    wanted = pages >= 0
    slots = torch.where(wanted, page_slot.gather(2, pages.clamp(min=0)).long(), -1)
    missed = wanted & (slots < 0)
    age = (step - slot_step).clamp(0, NUM_BUCKETS - 1).masked_fill_(slot_page < 0, NUM_BUCKETS)
    b, h, i = (slots >= 0).nonzero(as_tuple=True)
    age[b, h, slots[b, h, i]] = -1
    victims = torch.argsort(age, dim=2, descending=True, stable=True)
    evicted = 0
    b, h, i = missed.nonzero(as_tuple=True)
    if b.numel():
        slot = victims[b, h, (missed.cumsum(2) - 1)[b, h, i]]
        old = slot_page[b, h, slot].long()
        held = old >= 0
        evicted = int(held.sum())
        page_slot[b[held], h[held], old[held]] = -1
        page_slot[b, h, pages[b, h, i]] = slot.int()
        slot_page[b, h, slot] = pages[b, h, i].int()
        slots[b, h, i] = slot
    b, h, i = wanted.nonzero(as_tuple=True)
    slot_step[b, h, slots[b, h, i]] = step
    return slots, missed, evicted


# ------------------------------------------------------------------------------------------------------------ attend


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float | None = None,
    logit_correction: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Exact softmax attention over the given tokens, in float32. Also returns the log-sum-exp, for `merge_attention`.

    Args:
        query: [B, H, G, Q, Dk].
        keys, values: [B, H, M, Dk] and [B, H, M, Dv].
        mask: broadcastable to [B, H, G, Q, M]; bool, True where a query may attend, or float, added to the scores.
            Tokens that no query may attend to (False, -inf) are ignored, even if they are NaN.
        scale: factor of the scores, applied before `softcap`.
        softcap: scores become softcap * tanh(scores / softcap); None for no cap.
        logit_correction: [B, H, G, 1, M], float32: added to the scaled scores before `softcap`; None for none.
    Returns:
        out: [B, H, G, Q, Dv], float32; zeros for a query without tokens.
        lse: [B, H, G, Q], float32: log-sum-exp of the scores; -inf for a query without tokens.
    """
    keys, values = keys.float(), values.float()
    bias = None if mask.dtype == torch.bool else mask
    mask = mask if bias is None else mask > float("-inf")
    values = values.masked_fill(~mask.any(2).any(2).unsqueeze(-1), 0.0)
    tile = max(1, _SCORE_TILE_ELEMENTS // max(1, query[..., 0, 0].numel() * keys.shape[-2]))
    tiles = []
    for start in range(0, query.shape[3], tile):
        queries = query[..., start : start + tile, :].float()
        tokens = slice(start, start + tile) if mask.shape[-2] > 1 else slice(None)
        heads = queries.shape[2:4]  # heads and tokens of a KV head are rows of one product, so keys are not repeated
        scores = (queries.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, heads) * scale
        if logit_correction is not None:
            scores = scores + logit_correction
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if bias is not None:
            scores = scores + bias[..., tokens, :]
        scores = scores.masked_fill(~mask[..., tokens, :], float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0).unsqueeze(-1))
        tiles.append(((weights.flatten(2, 3) @ values).unflatten(2, heads), lse))
    return torch.cat([out for out, _ in tiles], 3), torch.cat([lse for _, lse in tiles], 3)


def merge_attention(splits: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint token sets, given (out, lse) of each set as `attend` returns them, in float32."""
    if len(splits) == 1:
        return splits[0]
    lses = torch.stack([lse for _, lse in splits])
    total = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - total.masked_fill(total == float("-inf"), 0.0)).unsqueeze(-1)
    merged = splits[0][0] * weights[0]
    for (out, _), weight in zip(splits[1:], weights[1:], strict=True):
        merged.addcmul_(out, weight)
    return merged, total


def apply_attention_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Add one learned logit per query head to the softmax's denominator (gpt-oss): out * e^lse / (e^lse + e^sink).

    Args:
        out, lse: as `attend` returns them.
        sinks: [H * G], the logits.
    """
    return out * torch.sigmoid(lse - sinks.float().view(out.shape[1], out.shape[2], 1)).unsqueeze(-1)


def merge_into(partials: Sequence[tuple[Tensor, Tensor]], sinks: Tensor | None, out: Tensor) -> None:
    """As `merge_attention` and, if there are sinks, `apply_attention_sinks`; written to `out` [B, Q, H * G, Dv]."""
    merged, lse = merge_attention(partials)
    merged = merged if sinks is None else apply_attention_sinks(merged, lse, sinks)
    out.copy_(merged.flatten(1, 2).transpose(1, 2))


def dense_attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Dense attention by torch's fused kernel.

    Args:
        query: [B, H * G, Q, Dk]; keys, values: [B, H, M, Dk] and [B, H, M, Dv].
        mask: bool, broadcastable to [B, H * G, Q, M]; None for causal with Q == M.
    Returns:
        [B, H * G, Q, Dv], the query's dtype.
    """
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=mask is None and query.shape[2] > 1, scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )  # fmt: skip
