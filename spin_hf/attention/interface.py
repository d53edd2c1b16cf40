"""The entry from transformers: the attention function and the mask function registered as "spin", and the custom op.

    cache.update(k, v)        returns the new keys and values, tagged with their layer (`handed_states.py`)
    mask function             passes the batch's padding to the cache
    attention function        reads the layer from keys and values and calls it
                              append -> index -> select -> retrieve -> attend
    spin_hf::attend           the same as one opaque op, for code that Dynamo traces: it does not see the state

Masks, as attention receives them (see `masks.py`):
    None                causal, no padding among the new tokens
    marker mask         causal; the cache has stored which tokens are padding (its shape does not grow with the context)
    validity mask       causal; contains which of the new tokens are padding
    [B, h, Q, n]        a given mask, boolean or additive, over all n tokens: applied as it is, with dense attention

Keys without a layer (no cache, another cache, dense layers of the cache) go to the config's previous implementation. Importing
this module registers both functions and nothing else.
"""

from __future__ import annotations

import itertools
import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import AttentionError
from . import handed_states, implementation, masks, returned_weights

logger = logging.getLogger("spin_hf")


class AttentionLayer(Protocol):
    """A paged layer, as far as the attention function uses it."""

    handle: int

    def fail(self) -> None:
        """Called if the step raised: the forward will not finish."""

    def take_pending(self) -> bool:
        """Whether `update` was called since the last attention, so that the tokens must be appended. Clears the flag."""

    def check_positions(self, position_ids: Tensor | None, mask: Tensor | None) -> None:
        """Raise AttentionError if the position ids of the new tokens are not those that the layer's method assumes."""

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, out: Tensor,
        append: bool, scale: float, softcap: float | None,
    ) -> None:  # fmt: skip
        """Append and attend; writes `out` [B, Q, heads, Dv]."""

    def run_for_weights(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, out: Tensor,
        append: bool, scale: float, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """As `run`, and returns the weights [B, heads, Q, tokens held]."""

    def with_gradients(
        self, out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None,
        append: bool, scale: float, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """`out`, as the step has just written it, with a backward pass."""


_layers: weakref.WeakValueDictionary[int, AttentionLayer] = weakref.WeakValueDictionary()
_handles = itertools.count(1)


def register_layer(layer: AttentionLayer) -> int:
    """A handle by which the custom op finds `layer` while it lives."""
    handle = next(_handles)
    _layers[handle] = layer
    return handle


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def _attend(
    layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, out: Tensor,
    append: bool, scale: float, softcap: float | None,
) -> None:  # fmt: skip
    """As `AttentionLayer.run`, without gradients. If it raises, the forward has failed."""
    try:
        with torch.no_grad():
            layer.run(query, key, value, mask, sinks, out, append, scale, softcap)
    except BaseException:
        layer.fail()
        raise


@torch.library.custom_op("spin_hf::attend", mutates_args=("out",), tags=(torch.Tag.cudagraph_unsafe,))
def _traced_attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, out: Tensor,
    handle: int, append: bool, scale: float, softcap: float | None,
) -> None:  # fmt: skip
    _attend(_layers[handle], query, key, value, mask, sinks, out, append, scale, softcap)


@_traced_attend.register_fake
def _attend_fake(*args: Any) -> None:
    return None


class _InferenceOnly(torch.autograd.Function):
    """For compiled code without `no_grad`: the forward runs, a backward pass, which would be wrong, raises."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        raise AttentionError(
            "SpinCache: expected inference of a compiled forward, got a backward pass; run the forward without compiling"
        )


# ------------------------------------------------------------------------------------------------------------ attention

# Model inputs and switches that models pass on in **kwargs and that do not change the result of attention.
_HARMLESS = {
    "attention_mask", "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "cumulative_seqlens_k",
    "cumulative_seqlens_q",
    "deterministic", "inputs_embeds", "input_ids", "is_first_iteration", "labels", "layer_idx",
    "logits_to_keep", "max_length_k", "max_length_q", "max_seqlen_k", "max_seqlen_q", "num_items_in_batch",
    "output_attentions", "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings",
    "position_ids", "return_dict", "seq_idx", "sliding_window", "token_type_ids", "training", "use_cache",
}  # fmt: skip
# Arguments by which models select tokens themselves; they pass them to implementations other than "eager" and "sdpa".
_CHOSEN = ("block_indices", "indices")
# Arguments that change the result and cannot be served from pages.
_REFUSED = {"alibi", "attention_bias", "block_indices", "block_mask", "cache", "head_mask", "indices", "position_bias"}


def spin_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention over the tokens held and the new tokens. Registered as "spin".

    The order of the arguments is that of transformers' own attention functions, because libraries that wrap registered
    functions pass some by position.

    Args:
        query: [B, heads, Q, Dk]; key, value: [B, H, Q, Dk] and [B, H, Q, Dv], as `SpinCache.update` returned them.
        attention_mask: see the module's head.
    Returns:
        [B, Q, heads, Dv] in the query's dtype; and with `output_attentions=True` the weights, [B, heads, Q, tokens held] in the
        query's dtype, zero for tokens that were not read; else None. Rows sum to 1, or to less if learned sinks or a method's
        estimates take probability.
    Raises:
        AttentionError: an argument changes the result and cannot be served, or keys or values are not what `update` returned.
    """
    layer: AttentionLayer | None = handed_states.owner(module, key, value)
    if layer is None:
        shares_pages = getattr(module, "is_kv_shared_layer", False) and kwargs.get("sliding_window") is None
        if shares_pages and torch.compiler.is_compiling():
            raise AttentionError(  # some versions of transformers copy shared keys while Dynamo traces, which loses the layer
                f"{type(module).__name__} under torch.compile: expected the keys of the layer it shares, got a copy of them; "
                "run this model without compiling, or delete its SpinCache first"
            )
        if masks.is_internal(attention_mask):
            raise AttentionError(
                f"{type(module).__name__}: expected the keys that the cache gave back, got others with a mask of the cache; "
                "gradient checkpointing drops the cache in training mode, so call model.gradient_checkpointing_disable() or "
                "model.eval(); else use a DynamicCache for this model"
            )
        if is_causal is not None:
            kwargs["is_causal"] = is_causal
        return _dense_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    append = layer.take_pending()
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _check_arguments(attention_mask, query.shape[2], dropout, causal, kwargs)
    if append and not torch.compiler.is_compiling():
        layer.check_positions(kwargs.get("position_ids"), attention_mask)
    sinks = kwargs.get("s_aux") if kwargs.get("s_aux") is not None else kwargs.get("sinks")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = handed_states.fresh_output(query, value)
    softcap = kwargs.get("softcap")
    weights = None
    if returned_weights.are_wanted(kwargs):
        weights = layer.run_for_weights(query, key, value, attention_mask, sinks, out, append, scale, softcap)
    elif torch.compiler.is_compiling():
        torch.ops.spin_hf.attend(query, key, value, attention_mask, sinks, out, layer.handle, append, scale, softcap)
    else:
        _attend(layer, query, key, value, attention_mask, sinks, out, append, scale, softcap)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, sinks)):
        if torch.compiler.is_compiling():
            out = _InferenceOnly.apply(out, query)
        else:
            out = layer.with_gradients(out, query, key, value, attention_mask, sinks, append, scale, softcap)
    return out, weights


def _check_arguments(
    mask: Tensor | None, num_queries: int, dropout: float, causal: bool, kwargs: dict[str, Any]
) -> None:
    masks.check_kind(mask)
    for name, given in kwargs.items():
        if given is not None and name in _REFUSED:
            raise AttentionError(
                f"SpinCache cannot serve the attention argument {name!r}; use a DynamicCache for this model"
            )
    if dropout:
        raise AttentionError(
            f"SpinCache: expected dropout 0, got {dropout}; call model.eval(), or set the config's attention dropout to "
            "0 (training mode alone is served)"
        )
    if not causal and num_queries > 1 and (mask is None or masks.is_internal(mask)):
        raise AttentionError(
            "SpinCache: expected causal attention, got is_causal=False; use a DynamicCache for this model"
        )
    if not torch.compiler.is_compiling():
        unknown = [name for name, given in kwargs.items() if given is not None and name not in _KNOWN]
        if unknown and not _warned.issuperset(unknown):
            _warned.update(unknown)
            logger.warning("attention arguments %s are not known to SpinCache and are ignored", ", ".join(unknown))


_KNOWN = _HARMLESS | _REFUSED | {"softcap", "s_aux", "sinks"}
_warned: set[str] = set()


def _dense_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of states that no paged layer handed out, by the previous implementation of the module's config."""
    chosen = next((name for name in _CHOSEN if kwargs.get(name) is not None), None)
    if chosen is not None:
        raise AttentionError(
            f'{type(module).__name__} chooses tokens by itself and hands {chosen!r} to attention where that is "spin", '
            'expected an implementation that it knows; load the model with attn_implementation="sdpa" and give it any cache'
        )
    name = previous_implementation(module.config)
    num_queries, num_tokens = query.shape[2], key.shape[2]
    if name == "sdpa" and mask is None and 1 < num_queries < num_tokens:
        # transformers drops queries in layers that share keys, depending on the implementation's name. "sdpa" without a mask
        # would align the remaining queries with the first tokens.
        mask = torch.ones((1, 1, num_queries, num_tokens), dtype=torch.bool, device=query.device)
        mask = mask.tril(num_tokens - num_queries)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    if returned_weights.are_wanted(kwargs):
        attention = returned_weights.attention_of(name, attention)
    return attention(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return, unused-ignore]


def previous_implementation(config: Any) -> str:
    """The implementation that `config` named before "spin"; if it was loaded with "spin", sdpa or else eager."""
    remembered = implementation.previous(config)
    if remembered is not None:
        return remembered
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    supports_sdpa = known and getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_supports_sdpa", False)
    return "sdpa" if supports_sdpa else "eager"


# ----------------------------------------------------------------------------------------------------------------- mask


class MaskedLength(int):
    """The number of tokens that `get_mask_sizes` of a paged layer returns, with a reference to its cache.

    transformers passes it to the mask function unchanged. So the mask function knows the cache that the mask is for.
    """

    reconcile: Callable[[int, Tensor | None], None] | None
    window: bool

    @classmethod
    def of(
        cls, length: int, reconcile: Callable[[int, Tensor | None], None] | None, window: bool = False
    ) -> MaskedLength:
        """`length`, with the callback `reconcile(batch_size, padding_mask)`.

        `reconcile` is None during capture, because padding is passed to the cache before. `window` marks a sliding-window layer
        in which the single new token attends to all tokens held.
        """
        self = cls(length)
        self.reconcile, self.window = reconcile, window
        return self


class WindowWidth(int):
    """The width of the windows of several sequences with different lengths, aligned at their new tokens."""

    valid_tokens: Callable[[Callable[..., Tensor]], Tensor]
    """What the new tokens attend to, [B, width], bool, by a mask function over positions."""

    @classmethod
    def of(cls, width: int, valid_tokens: Callable[[Callable[..., Tensor]], Tensor]) -> WindowWidth:
        """`width`, with the callback."""
        self = cls(width)
        self.valid_tokens = valid_tokens
        return self


def _additive(mask: Tensor, dtype: torch.dtype | None) -> Tensor:
    dtype = dtype or torch.float32
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


_MASKS_OF_ROWS: dict[str, Callable[[Tensor, torch.dtype | None], Tensor]] = {
    "sdpa": lambda mask, dtype: mask,
    "eager": _additive,
}
"""Implementation -> its mask, from what the new tokens attend to: [B, 1, 1, width], bool. transformers' own functions read the
mask on the host, which a captured step cannot."""


def spin_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Tensor | None = None, *,
    config: Any = None, **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """The mask of a forward, one of those in the module's head. Registered as "spin".

    Args:
        kv_length, kv_offset: as the layer's `get_mask_sizes` returned them. A paged layer is marked by a `MaskedLength`, or by
            a tensor offset while Dynamo traces.
        attention_mask: [B, tokens], bool, the batch's padding mask; None for no padding.
    Returns:
        None for no padding, a marker or validity mask, or a dense mask if `mask_function` is not causal. Stores the padding
        of the new tokens in the cache, and updates that of earlier tokens if the mask changed it.
    Raises:
        AttentionError, BatchSizeError: the mask does not belong to this batch; nothing has changed.
    """
    traced = isinstance(kv_offset, Tensor) and torch.compiler.is_compiling()
    if not traced and not isinstance(kv_length, MaskedLength):
        if not torch.compiler.is_compiling():
            handed_states.forget()
        name = previous_implementation(config)
        if isinstance(kv_length, WindowWidth):
            attention_mask, mask_function = kv_length.valid_tokens(mask_function), causal_mask_function
            if name in _MASKS_OF_ROWS:
                return _MASKS_OF_ROWS[name](attention_mask[:, None, None, :], kwargs.get("dtype"))
            kv_length, q_offset = int(kv_length), int(kv_length) - q_length
        build = ALL_MASK_ATTENTION_FUNCTIONS[name]
        return build(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, config=config, **kwargs,
        )  # fmt: skip
    if traced:
        if mask_function is not causal_mask_function:
            raise AttentionError(
                "SpinCache: expected a causal mask under torch.compile; run this model without compiling"
            )
        if attention_mask is None:
            return None
        masks.check_padding(attention_mask)
        return masks.validity_mask(attention_mask[:, -q_length:])
    assert isinstance(kv_length, MaskedLength)
    length = int(kv_length)
    if kv_length.reconcile is None:
        if mask_function is not causal_mask_function and not kv_length.window:
            raise AttentionError("SpinCache: expected a causal mask in a captured step, got another one")
        return None
    attention_mask = masks.padding_mask_of(attention_mask, length, batch_size)
    kv_length.reconcile(batch_size, attention_mask)
    if mask_function is not causal_mask_function:
        kwargs.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=length, q_offset=length - q_length, kv_offset=0,
            mask_function=mask_function, attention_mask=attention_mask, **kwargs,
        )  # fmt: skip
    return None if attention_mask is None else masks.marker_mask(attention_mask, q_length)


AttentionInterface.register(implementation.NAME, spin_attention)
AttentionMaskInterface.register(implementation.NAME, spin_mask)
