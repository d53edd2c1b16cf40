"""Models that transformers has distributed over several processes: which are served, and what a rank holds of them.

    tp_plan="auto"      colwise key projections: each rank computes H_kv / ranks heads, and its cache holds these
                        gathered outputs (Olmo2, Phi3): each rank computes all heads, and its cache holds all
                        o_proj is rowwise: an all-reduce ends each layer
    fsdp_size           ranks have batches of their own; nothing is shared between their caches
    pp_size, sequence and context parallel    refused: a rank sees only some layers, or only some tokens

transformers replaces the `forward` of each parallel module, and keeps weights as DTensors whose local part the forward uses.
Keys and values that reach a cache are plain tensors.
"""

from __future__ import annotations

import logging
import os
import weakref
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..attention.methods.layer_shapes import LayerShape, layer_shapes
from ..config import SpinOptions
from ..errors import OptionError, UnsupportedModelError
from .rank_agreement import Ranks

logger = logging.getLogger("spin_hf")

_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")
_SPLITS_TOKENS = ("cp", "sp", "ulysses", "ring")
"""Dimensions of a mesh along which sequences are split."""
_REMEDY = 'load it with tp_plan="auto", or on one process with device_map="auto"'

_ranks: weakref.WeakKeyDictionary[nn.Module, Ranks] = weakref.WeakKeyDictionary()
"""Model -> its ranks. They have one process group for all caches of the model."""


def tp_size(model: Any) -> int:
    """Ranks that share the heads of a model; 1 if it is not tensor-parallel."""
    return (getattr(model, "_tp_size", None) or 1) if isinstance(model, nn.Module) else 1


def ranks_of(model: Any) -> Ranks | None:
    """The ranks of a model; None if it is not tensor-parallel. All ranks call this together.

    Args:
        model: the model; or its config.
    Raises:
        UnsupportedModelError: it is distributed in a way that no cache can serve.
        OptionError: `model` is the config of a tensor-parallel model.
    """
    if not isinstance(model, nn.Module):
        _check_config(model)
        return None
    check_distribution(model)
    size = tp_size(model)
    if size == 1:
        return None
    found = _ranks.get(model)
    if found is None:
        mesh = _tp_mesh(model)
        found = _ranks[model] = Ranks(mesh.mesh.flatten().tolist())
        _check_environment(mesh)
    return found


def check_distribution(model: nn.Module) -> None:
    """Raise UnsupportedModelError if ranks see only some layers, only some tokens, or parts of heads."""
    name, config = type(model).__name__, getattr(model, "config", None)
    settings = getattr(config, "distributed_config", None)
    sizes = _mesh_sizes(model)
    stages = max(_setting(settings, "pp_size"), sizes.get("pp", 1))
    if stages > 1 or hasattr(model, "_pp_stage"):
        raise UnsupportedModelError(
            f"{name} runs in {stages} pipeline stages (pp_size), expected all layers on each rank, as other stages' layers are "
            f"identities that never call the cache; {_REMEDY}"
        )
    plan = getattr(model, "tp_plan", None) or {}
    splits = [f"{key}={sizes[key]}" for key in _SPLITS_TOKENS if sizes.get(key, 1) > 1]
    splits += [f"{key}: {style}" for key, style in plan.items() if style == "sequence_parallel" and tp_size(model) > 1]
    if splits or _setting(settings, "enable_sequence_parallel", 0):
        what = splits[0] if splits else "enable_sequence_parallel"
        raise UnsupportedModelError(
            f"{name} splits sequences over ranks ({what}), expected all tokens on each rank, as pages and a step of one token "
            f"cannot be split; {_REMEDY}"
        )
    size, heads = tp_size(model), _kv_heads(config) if splits_heads(model) else []
    uneven = [number for number in heads if number % size]
    if uneven:
        raise UnsupportedModelError(
            f"{name}: expected KV heads that {size} ranks divide, got {uneven[0]}, and transformers cuts heads in parts; use "
            "fewer ranks, or gather the heads on each rank by a plan: q_proj, k_proj and v_proj as colwise_gather_output, "
            "o_proj as rowwise_split_input"
        )


def splits_heads(model: Any) -> bool:
    """Whether each rank of a tensor-parallel model computes only some KV heads."""
    plan = (getattr(model, "tp_plan", None) or {}) if tp_size(model) > 1 else {}
    return any(key.rsplit(".", 1)[-1] in _KEY_PROJECTIONS and style == "colwise" for key, style in plan.items())


def local_shapes(shapes: list[LayerShape] | None, model: Any) -> list[LayerShape] | None:
    """Shapes of layers as one rank of `model` has them, from those of the whole model."""
    size = tp_size(model)
    if shapes is None or not splits_heads(model):
        return shapes
    return [replace(shape, num_heads=max(1, shape.num_heads // size)) for shape in shapes]


def is_distributed_otherwise(model: nn.Module) -> bool:
    """Whether a model has parameters that are distributed, and not by tensor parallelism."""
    sharded = (getattr(model, "_fsdp_size", None) or 1) > 1
    return (sharded or tp_size(model) == 1) and any(isinstance(parameter, DTensor) for parameter in model.parameters())


def shared_options(ranks: Ranks | None, options: SpinOptions, method: Any, store: Any, model: Any) -> SpinOptions:
    """The options of a cache, the same on all ranks. Caps are the smallest; host memory is divided by the ranks of a machine.

    Args:
        ranks: None for a model on one rank, whose options stay as they are.
        method, store: the cache's method, and its `PromptStore` or None.
        model: the tensor-parallel model.
    Raises:
        OptionError: ranks were given different options, or one that they cannot share.
    """
    if ranks is None:
        return options
    if store is not None:
        raise OptionError(
            "store: expected None for a tensor-parallel model, got a PromptStore, which each rank would fill and empty by "
            "itself; use save_pretrained and from_pretrained"
        )
    if method.has_tensors_by_head and splits_heads(model):
        raise OptionError(
            f"{method.name}: expected a model with all KV heads on each rank, got one of {ranks.size} ranks, and the gates are "
            "those of all heads; take another method"
        )
    caps = options.gpu_memory, options.cpu_memory
    same = repr(replace(options, gpu_memory=None, cpu_memory=None)), repr(method), [cap is None for cap in caps]
    given = ranks.gathered("make a SpinCache", (same, caps))
    if any(other != same for other, _ in given):
        raise OptionError(
            f"options: expected the same on all ranks, got {' and '.join(dict.fromkeys(str(other) for other, _ in given))}; "
            "let all ranks make the same SpinCache"
        )
    gpu, cpu = (None if cap is None else min(each[number] for _, each in given) for number, cap in enumerate(caps))
    return replace(options, gpu_memory=gpu, cpu_memory=None if cpu is None else max(1, cpu // ranks.on_host))


def check_states(states: Tensor, name: str) -> None:
    """Raise UnsupportedModelError if keys of a layer are distributed."""
    if isinstance(states, DTensor):
        raise UnsupportedModelError(
            f"{name} gives keys to the cache that are distributed (DTensor), expected plain tensors of this rank's heads; "
            f"{_REMEDY}"
        )


def captures_collectives(model: nn.Module) -> bool:
    """Whether the all-reduces of a tensor-parallel model can be part of a CUDA graph: NCCL's can."""
    return tp_size(model) == 1 or str(dist.get_backend(_tp_mesh(model).get_group())) == "nccl"


def _check_config(config: Any) -> None:
    settings = getattr(config, "distributed_config", None)
    if settings is None or not (dist.is_available() and dist.is_initialized()):
        return
    if max(_setting(settings, key) for key in ("tp_size", "pp_size")) > 1:
        raise OptionError(
            f"model: expected the model, got a {type(config).__name__} of a model that is distributed over processes, whose "
            "caches must agree; pass the model: SpinCache(model)"
        )


def _check_environment(mesh: Any) -> None:
    """Warn if NCCL was not told that graphs and other launches never overlap."""
    if mesh.device_type == "cuda" and os.environ.get("NCCL_GRAPH_MIXING_SUPPORT") != "0":
        logger.warning(
            "NCCL_GRAPH_MIXING_SUPPORT is not 0, so captured all-reduces wait for each other on the host side; set it to 0 "
            "before the process group is made"
        )


def _tp_mesh(model: nn.Module) -> Any:
    mesh: Any = model._device_mesh
    names = mesh.mesh_dim_names or ()
    return mesh["tp"] if mesh.ndim > 1 and "tp" in names else mesh


def _mesh_sizes(model: nn.Module) -> dict[str, int]:
    """Dimension of the model's mesh -> ranks along it."""
    mesh: Any = getattr(model, "_device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    return {name: mesh.size(index) for index, name in enumerate(names)}


def _setting(settings: Any, name: str, default: int = 1) -> int:
    """A number of a `DistributedConfig`, or of the dict that it was saved as."""
    found = settings.get(name) if isinstance(settings, dict) else getattr(settings, name, None)
    return int(found or default)


def _kv_heads(config: Any) -> list[int]:
    """KV heads of each layer of a model; empty if the config does not tell them."""
    decoder = config.get_text_config(decoder=True)
    shapes = layer_shapes(decoder, list(range(decoder.num_hidden_layers)))
    return [shape.num_heads for shape in shapes or ()]
