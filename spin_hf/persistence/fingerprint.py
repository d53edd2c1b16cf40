"""Fingerprint of a cache: what decides its keys, values and summaries. A cache loads saved caches of the same fingerprint only.

    config    fields of the decoder's config that decide keys and values
    dtype     of the model; None if not known
    weights   SHA-256 of some rows of the embedding and of every projection to keys and values; None without a model
    method    class, page size, parameters, and SHA-256 of its tensors (gates)
    storage   how summaries are stored; for methods that cluster also sinks and recent window, which are never clustered

Not compared: a dtype or weights that one side does not know, and fields of the config that one side does not have. Versions of
transformers add fields.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..attention.methods.base import Method
from ..attention.methods.clustering import ClusteringMethod
from ..config import SpinOptions, shown
from ..integration.tensor_parallel import ranks_of
from .shards import DTYPES, bytes_of
from .strict_json import RefusedError

_CONFIG_FIELDS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "v_head_dim", "hidden_act", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
    "norm_eps", "rope_parameters", "partial_rotary_factor", "layer_types", "no_rope_layers", "sliding_window",
    "attention_chunk_size", "attention_bias", "attention_multiplier", "residual_multiplier", "embedding_multiplier",
    "query_pre_attn_scalar", "attn_logit_softcapping", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim",
    "num_kv_shared_layers", "attention_k_eq_v", "global_head_dim", "num_global_key_value_heads", "n_embd", "n_layer", "n_head",
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim",
    "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "mlp_layer_types",
    "per_layer_config",
)  # fmt: skip
_PROJECTIONS = re.compile(
    r"(?:^|[._])(?:[kv]_proj|qkv_proj|qkv|c_attn|query_key_value|kv_a_proj\w*|kv_b_proj|in_proj\w*|Wqkv|W_pack|[kv]_norm)\."
)
_SAMPLED_ROWS = 2
"""First and last rows of each tensor that are hashed."""
_SAMPLED_ELEMENTS = 1 << 16


class ModelFacts(NamedTuple):
    """What a fingerprint says about a model. It can be taken when a cache is filled, and used when the model is gone.

    Attributes:
        dtype: of the model; None if it has none.
        weights: their hash; None if some are not loaded.
    """

    dtype: torch.dtype | None
    weights: str | None

    @classmethod
    def of(cls, model: Any) -> ModelFacts | None:
        """The facts of a model, as it is now; None for None."""
        return None if model is None else cls(getattr(model, "dtype", None), _weights_hash(model))


def fingerprint(
    config: Any,
    model: ModelFacts | None,
    method: Method,
    num_layers: int,
    options: SpinOptions,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """The fingerprint of a cache, as JSON reads it back.

    Args:
        config: the decoder's config.
        model: facts of the model; None if only the config is known.
        method: bound to the model.
        num_layers: paged layers.
        dtype: of their keys and values; None without paged layers.
    """
    storage: dict[str, Any] = {}
    if dtype is not None:
        storage["summaries"] = "int8" if options.quantizes(dtype.itemsize) else "model"
    if isinstance(method, ClusteringMethod):
        storage |= {"num_sink_tokens": options.num_sink_tokens, "recent_window": options.recent_window}
    found = {
        "config": {name: value for name, value in config.to_dict().items() if name in _CONFIG_FIELDS},
        "dtype": _name(getattr(config, "dtype", None) if model is None else model.dtype),
        "weights": None if model is None else model.weights,
        "method": _of_method(method, num_layers),
        "storage": storage,
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, sort_keys=True, default=repr))
    return plain


def check_same(saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse a saved cache whose fingerprint differs.

    Raises:
        RefusedError: with the first difference.
    """
    remedies = {
        "config": "use the model that the cache was saved with",
        "dtype": "use a model in the dtype that the cache was saved with",
        "weights": "use the weights that the cache was saved with, or save the cache again with these",
        "method": "pass the method that the cache was saved with",
        "storage": "pass the options that the cache was saved with",
    }
    if saved.keys() != ours.keys():
        raise RefusedError(f"a fingerprint of {', '.join(ours)}", shown(sorted(saved), 120))
    for name, remedy in remedies.items():
        theirs, own = saved[name], ours[name]
        if isinstance(own, dict) and isinstance(theirs, dict):
            shared = [key for key in own if key in theirs] if name == "config" else [*dict.fromkeys([*own, *theirs])]
            for key in shared:
                if not _equal(theirs.get(key), own.get(key)):
                    raise RefusedError(
                        f"{name}: {shown(key, 80)} {shown(theirs.get(key), 120)} as in the saved cache",
                        shown(own.get(key), 120), remedy,
                    )  # fmt: skip
            if name == "config" and "model_type" not in theirs:
                raise RefusedError("a config with its model_type", shown(theirs, 80))
        elif theirs is not None and own is not None and not _equal(theirs, own):
            raise RefusedError(f"{name} {shown(theirs, 120)} as in the saved cache", shown(own, 120), remedy)


def _equal(one: Any, other: Any) -> bool:
    """Equality of JSON values, which tells true from 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _name(dtype: Any) -> str | None:
    return DTYPES.get(dtype) if isinstance(dtype, torch.dtype) else None


def _of_method(method: Method, num_layers: int) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _hash([value])
        return value if value is None or type(value) in (bool, int, float, str) else repr(value)

    cpu = torch.device("cpu")
    tensors = [tensor for number in range(num_layers) for tensor in method.projection_tensors(number, cpu)]
    return {
        "name": method.name, "class": type(method).__qualname__, "page_size": method.page_size,
        "parameters": {name: plain(value) for name, value in method.saved_parameters().items()},
        "tensors": _hash(tensors) if tensors else None,
    }  # fmt: skip


def _weights_hash(model: nn.Module) -> str | None:
    """SHA-256 of sampled rows of the model's embedding and key and value projections; None if some are not loaded.

    Adapters of these projections are included. The device and the names that wrappers give to modules do not matter.
    """
    sampled: list[Tensor] = [tensor for name, tensor in model.named_parameters() if _PROJECTIONS.search(name)]
    find: Any = getattr(model, "get_input_embeddings", None)
    embeddings = None if find is None else find()
    weight = getattr(embeddings, "weight", None)
    if isinstance(weight, Tensor):
        sampled.append(weight)
    if not sampled or any(tensor.is_meta for tensor in sampled):
        return None
    ranks = ranks_of(model) if any(isinstance(tensor, DTensor) for tensor in sampled) else None
    if ranks is not None:
        parts = ranks.gathered("sample weights", [_part_samples(tensor) for tensor in sampled])
        return _hash([_joined_sample(samples) for samples in zip(*parts, strict=True)])
    if any(isinstance(tensor, DTensor) for tensor in sampled):
        return None
    return _hash([_sample(tensor.detach()) for tensor in sampled])


def _sample(tensor: Tensor) -> Tensor:
    """First and last rows of a tensor [rows, ...], each cut to `_SAMPLED_ELEMENTS`."""
    rows = tensor.reshape(tensor.shape[0], -1) if tensor.dim() else tensor.reshape(1, 1)
    return torch.cat([rows[:_SAMPLED_ROWS], rows[-_SAMPLED_ROWS:]])[:, :_SAMPLED_ELEMENTS]


def _part_samples(tensor: Tensor) -> tuple[int | None, Tensor, Tensor]:
    """Dimension along which ranks have parts of a tensor, None for none; first and last rows of this rank's part."""
    dim = None
    if isinstance(tensor, DTensor):
        (placement,) = tensor.placements
        dim = placement.dim % tensor.ndim if isinstance(placement, Shard) else None
        tensor = tensor.to_local()
    local = tensor.detach()
    rows = local.reshape(local.shape[0], -1) if local.dim() else local.reshape(1, 1)
    first, last = (part[:, :_SAMPLED_ELEMENTS].cpu() for part in (rows[:_SAMPLED_ROWS], rows[-_SAMPLED_ROWS:]))
    return dim, first, last


def _joined_sample(parts: Sequence[tuple[int | None, Tensor, Tensor]]) -> Tensor:
    """`_sample` of a tensor whose parts ranks have."""
    dim = parts[0][0]
    if dim is None:
        return torch.cat(parts[0][1:])
    firsts, lasts = torch.cat([part[1] for part in parts], dim), torch.cat([part[2] for part in parts], dim)
    return torch.cat([firsts[:_SAMPLED_ROWS], lasts[-_SAMPLED_ROWS:]])[:, :_SAMPLED_ELEMENTS]


def _hash(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor, content in zip(tensors, _contents(tensors), strict=True):
        digest.update(f"{DTYPES.get(tensor.dtype, tensor.dtype)} {list(tensor.shape)}".encode())
        digest.update(content)
    return digest.hexdigest()


def _contents(tensors: list[Tensor]) -> list[memoryview]:
    """The bytes of each tensor. All tensors of a device are copied from it at once."""
    flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    for device in {each.device for each in flat if each.device.type != "cpu"}:
        places = [place for place, each in enumerate(flat) if each.device == device]
        copied = torch.cat([flat[place] for place in places]).cpu()
        parts = copied.split([len(flat[place]) for place in places])
        for place, part in zip(places, parts, strict=True):
            flat[place] = part
    return [bytes_of(each) for each in flat]


def tokens_hash(tokens: Tensor) -> str:
    """SHA-256 of token ids [B, tokens]."""
    return _hash([tokens.long()])
