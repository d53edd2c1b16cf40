"""`output_attentions=True`: whether a call wants attention weights, and the weights of layers without pages.

transformers collects weights by hooks on attention modules, which read the second result of the attention function. Two signs
say that they are collected: the argument `output_attentions`, which not every model passes on, and the collector that the hooks
write to. Layers without pages (sliding window, latents) use the config's previous implementation. Of those only eager attention
returns weights, so for sdpa they are computed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import AttentionError

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # then the argument alone decides
    _active_collector = None

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def are_wanted(kwargs: dict[str, Any]) -> bool:
    """Whether the weights of this call are collected.

    Args:
        kwargs: keyword arguments of the attention function.
    """
    if kwargs.get("output_attentions"):
        return True
    if _active_collector is None or torch.compiler.is_compiling():  # Dynamo cannot read a context variable
        return False
    collected = _active_collector.get()
    return collected is not None and "attentions" in collected


def attention_of(implementation: str, attention: Attention) -> Attention:
    """A function that computes the same as `attention`, the function of `implementation`, and returns the weights too.

    Raises:
        AttentionError: `implementation` is neither eager nor sdpa.
    """
    if implementation == "eager":
        return attention
    if implementation == "sdpa":
        return dense_attention
    raise AttentionError(
        f"output_attentions=True: expected the layers without pages to be served by eager or sdpa attention, got "
        f'{implementation!r}; load the model with attn_implementation="eager"'
    )


def dense_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Transformers' sdpa attention, with the weights [B, heads, Q, tokens] that eager attention returns."""
    if kwargs.get("position_bias") is not None:
        raise AttentionError(
            "output_attentions=True: expected no position bias, got one; use a DynamicCache for this model"
        )
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if kwargs.get("softcap") is not None:
        scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    empty_rows = None
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        empty_rows = ~attention_mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~(attention_mask | empty_rows), float("-inf"))
    elif attention_mask is not None:
        scores = scores + attention_mask
    sinks = kwargs.get("s_aux")
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1).to(query.dtype)
    weights = weights if sinks is None else weights[..., :-1]
    weights = weights if empty_rows is None else weights.masked_fill(empty_rows, 0.0)
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
