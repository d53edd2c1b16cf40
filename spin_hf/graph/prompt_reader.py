"""Reads long prompts in chunks: one call of the model becomes several of its forward, with the same result.

    tokens        [ chunk 0 ][ chunk 1 ][ chunk 2 ][ rest ]     each attends to all earlier tokens (`backends/dense.py`)
    memory        activations of one chunk, instead of all tokens
    logits        those that the caller wants (`logits_to_keep`), concatenated

A call is read whole if its result would differ or is unknown: gradients, hidden states or attention weights as outputs,
embeddings of images, rotary positions that depend on the length of the prompt, layers that do not take several tokens behind
earlier ones. Where the outermost model is such a case, the text model inside it may be read in chunks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.utils import ModelOutput

from ..backends.sparse_prompt import DENSE_TOKENS
from ..forward_pass import ForwardPass
from ..integration.forward_hook import is_compiled, new_inputs
from ..integration.layer_types import decoder_config, rope_depends_on_length
from ..integration.prompt_bar import PromptBar
from ..integration.rank_agreement import meeting
from ..kernels import BLOCK_TOKENS
from ..memory.admission import check_first_batch
from ..memory.layer_budget import layer_shapes
from ..memory.layer_places import places
from ..memory.prefill_peak import chunk_tokens, key_means_bytes

_LEAST_CHUNK = 256
"""Tokens per sequence that a chunk has at least. Sparse prompts need chunks of whole blocks (`backends/sparse_prompt.py`)."""

_BY_TOKEN = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1, "cache_position": -1}
"""Arguments with an entry per new token, and the dimension of the tokens."""
_OUTPUT_FLAGS = ("output_hidden_states", "output_attentions", "output_router_logits")
_CONTINUES_STATES = {"lfm2", "lfm2_moe", "lfm3", "qwen3_next"}
"""Model types whose linear attention or convolutions take several tokens behind a state. Others (Mamba) forget the state."""


class PromptReader:
    """Reads the prompts of one cache.

    Args:
        layers, passes: of the cache.
        config: of the decoder.
    """

    def __init__(self, layers: list[Any], passes: ForwardPass, config: Any) -> None:
        self.layers, self.passes, self.state, self.config = layers, passes, passes.state, config
        self.size = self.state.options.prefill_chunk_size
        self.may_split = _may_split(config, layers)

    def of(
        self, module: nn.Module, forward: Callable[..., Any], kwargs: dict[str, Any], name: str
    ) -> Callable[..., Any]:
        """`forward` of `module`, or a function of the same arguments that reads the prompt in chunks.

        Args:
            kwargs: arguments of the call, with the cache under `name`.
        """
        new = new_inputs(kwargs)
        if new is None or self.state.reads_prompt:
            return forward
        size, lead = self.chunk_size(module, new), self.lead(new.shape[1])
        is_short = new.shape[1] <= size and not lead
        if is_short or not self.may_read(module, forward, kwargs, name):
            return forward
        return lambda **given: self._read(forward, given, new.shape[0], new.shape[1], size, lead)

    def lead(self, num_tokens: int) -> int:
        """Tokens in front of a sparse prompt's first whole block, which are read as a chunk of their own."""
        lead = -self.state.committed % BLOCK_TOKENS
        return lead if self.state.options.prefill == "sparse" and num_tokens > lead + DENSE_TOKENS else 0

    def chunk_size(self, module: nn.Module, new: Tensor) -> int:
        """Tokens of each sequence in a chunk."""
        if self.size is not None:
            whole = self.size // BLOCK_TOKENS * BLOCK_TOKENS if self.state.options.prefill == "sparse" else 0
            return whole or self.size
        batch_size, num_tokens = new.shape[:2]
        if num_tokens <= _LEAST_CHUNK:
            return num_tokens
        devices = {new.device, *(places(self.state) or ())}  # accelerate moves inputs to the GPUs
        if all(device.type == "cpu" for device in devices):
            return num_tokens
        item_bytes = (getattr(module, "dtype", None) or torch.get_default_dtype()).itemsize
        means = self._key_means_bytes(item_bytes, batch_size, self.state.committed + num_tokens)
        fitting = chunk_tokens(self.config, item_bytes, self.passes.gpu, devices, means)
        if self.state.ranks is not None:
            (fitting,) = self.state.ranks.smallest("size chunks of a prompt", fitting)
        return max(_LEAST_CHUNK, fitting // batch_size // BLOCK_TOKENS * BLOCK_TOKENS)

    def _key_means_bytes(self, item_bytes: int, batch_size: int, num_tokens: int) -> int:
        """Bytes of the mean keys of a sparse prompt; 0 for dense ones, and where the config does not tell."""
        if self.state.options.prefill != "sparse":
            return 0
        shapes = layer_shapes(self.config, [layer.layer_idx for layer in self.state.layers])
        return key_means_bytes(shapes or (), item_bytes, batch_size, num_tokens)

    def may_read(self, module: nn.Module, forward: Callable[..., Any], kwargs: dict[str, Any], name: str) -> bool:
        """Whether a call with new tokens has the same result in chunks."""
        config, new = getattr(module, "config", None), new_inputs(kwargs)
        if new is None:
            return False
        if not (self.may_split and self.state.layers and _is_text_model(module)) or is_compiled(forward):
            return False
        if module.training or (torch.is_grad_enabled() and any(each.requires_grad for each in module.parameters())):
            return False
        if any(getattr(layer, "record_past", False) for layer in self.layers):
            return False
        if any(_setting(kwargs, config, flag) for flag in _OUTPUT_FLAGS):
            return False
        if _setting(kwargs, config, "return_dict") is False or kwargs.get("use_cache") is False:
            return False
        for key, given in kwargs.items():
            if key == name or given is None or isinstance(given, (bool, str, int, float)):
                continue
            if key == "attention_mask" and isinstance(given, Tensor) and given.dim() == 2:
                continue
            if not (key in _BY_TOKEN and isinstance(given, Tensor) and given.shape[_BY_TOKEN[key]] == new.shape[1]):
                return False
        return True

    def _read(
        self, forward: Callable[..., Any], kwargs: dict[str, Any], batch_size: int, stop: int, size: int, lead: int
    ) -> Any:  # fmt: skip
        """Call `forward` chunk by chunk. Raises before the first one if the tokens of all do not fit."""
        state, held = self.state, self.state.committed
        with meeting(state.ranks, "read a prompt in chunks", batch_size, held, stop, size, lead):
            if held:
                state.sequences.check_room(held, stop)
            else:
                check_first_batch(state, self.passes.gpu, stop, batch_size)
        if has_no_padding(kwargs.get("attention_mask"), state.sequences.mask.valid, batch_size, held + stop):
            kwargs = {**kwargs, "attention_mask": None}  # else every chunk would look, and wait for the one before
        keep = kwargs.get("logits_to_keep") or stop
        outputs: list[Any] = []
        with self.passes.reading(held + stop), PromptBar(stop) as bar:
            for first, last in chunks(stop, size, lead):
                given = {key: _part(key, value, first, last, held) for key, value in kwargs.items()}
                wanted = last - max(first, stop - keep)
                if "logits_to_keep" in kwargs and keep < stop:
                    given["logits_to_keep"] = max(1, wanted)
                output = forward(**given)
                outputs = [*outputs, output] if wanted > 0 else []
                bar.update(last)
        return _joined(outputs)


def has_no_padding(mask: Any, held: Tensor | None, batch_size: int, num_tokens: int) -> bool:
    """Whether a padding mask is [batch_size, num_tokens] and all true, and no token held is padding. Reads the device."""
    if not isinstance(mask, Tensor) or held is not None or mask.shape != (batch_size, num_tokens):
        return False
    return bool(mask.all())


def chunks(num_tokens: int, size: int, lead: int = 0) -> Iterator[tuple[int, int]]:
    """Ranges of tokens. Behind the first `lead` tokens all have `size` tokens but the last, which takes a short rest along."""
    if lead:
        yield 0, lead
    first = lead
    while first < num_tokens:
        last = first + size
        if num_tokens - last < size // 8:
            last = num_tokens
        yield first, min(last, num_tokens)
        first = last


def _part(name: str, value: Any, first: int, last: int, held: int) -> Any:
    """The argument `name` for tokens [first, last) of the prompt, behind `held` tokens."""
    if not isinstance(value, Tensor):
        return value
    if name == "attention_mask":
        return value[:, : held + last]
    return value.narrow(_BY_TOKEN[name], first, last - first)


def _joined(outputs: list[Any]) -> Any:
    """The output of all chunks: that of the last one, with logits or hidden states of all."""
    output = outputs[-1]
    for name in ("logits", "last_hidden_state"):
        if len(outputs) > 1 and isinstance(output, ModelOutput) and output.get(name) is not None:
            output[name] = torch.cat([each[name] for each in outputs], 1)
    return output


def _setting(kwargs: dict[str, Any], config: Any, name: str) -> Any:
    """A setting of a forward: the argument, or the config's where that is None."""
    given = kwargs.get(name)
    return getattr(config, name, None) if given is None else given


def _is_text_model(module: nn.Module) -> bool:
    """Whether `module` is one of transformers' decoders, with or without a head of logits for each token."""
    if not isinstance(module, PreTrainedModel) or not type(module).__module__.startswith("transformers."):
        return False
    if decoder_config(module)[0] is not module.config:
        return False
    return module.base_model is module or "logits_to_keep" in inspect.signature(type(module).forward).parameters


def _may_split(config: Any, layers: list[Any]) -> bool:
    """Whether a model computes the same for a prompt in chunks."""
    linear = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
    if linear and config.model_type not in _CONTINUES_STATES:
        return False
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        return False
    return not rope_depends_on_length(config)
