"""Tiny random models, built once per process and conditioned so that a mistake in the cache shows in the logits.

With the default initialisation (std 0.02) a model of this size attends almost uniformly and ties its greedy choices;
dropping a page would then go unnoticed. So weights are drawn anew at 1/sqrt(fan-in), and queries and keys scaled up
until attention is peaked. `test_zoo.py` checks the result: a lost page moves the logits by far more than the tolerance.
"""

from __future__ import annotations

import copy
import functools
import math
import zlib

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from tests.support.families import FAMILIES, VOCAB_SIZE
from tests.support.more_families import GENERATING, UNUSUAL

PAD_TOKEN_ID = 0
_ALL = FAMILIES | UNUSUAL | GENERATING
FIRST_TOKEN_ID = 3  # below are padding and what configs use as begin and end

_QUERY_KEY_PROJECTIONS = (
    "q_proj",
    "k_proj",
    "q_b_proj",
    "kv_b_proj",
    "c_attn",
    "qkv_proj",
    "query_key_value",
    "in_proj_qkvz",
)
_QUERY_KEY_GAIN = 1.6
_NORM_GAIN = 1.2  # added to the weight of query norms: those models are insensitive to the projection's scale
_OUTPUT_GAIN = 2.0


def _draw_weight(name: str, parameter: torch.Tensor, owner: nn.Module, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    if isinstance(owner, nn.Embedding):
        scale = getattr(owner, "scalar_embed_scale", getattr(owner, "embed_scale", 1.0))
        return noise * (0.3 if ".wpe." in name else 1.0) / float(scale)
    parts = name.split(".")
    if parameter.dim() == 3 and "experts" in parts:  # stacked [experts, in, out], or [experts, out, in]
        fan_in = max(parameter.shape[1:])
    elif isinstance(owner, transformers.pytorch_utils.Conv1D):  # [in, out]
        fan_in = parameter.shape[0]
    else:
        fan_in = parameter[0].numel()
    gain = _QUERY_KEY_GAIN if parts[-2] in _QUERY_KEY_PROJECTIONS else 1.0
    gain = _OUTPUT_GAIN if parts[0] in ("lm_head", "embed_out") else gain
    return noise * gain / math.sqrt(fan_in)


def _condition(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                owner = model.get_submodule(name.rpartition(".")[0])
                parameter.copy_(_draw_weight(name, parameter, owner, generator))
            elif name.endswith("sinks"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif name.endswith("q_norm.weight"):
                parameter.add_(_NORM_GAIN)
                attention = model.get_submodule(name.removesuffix(".q_norm.weight"))
                if attention.scaling == 1.0:  # no 1/sqrt(head size): the norm's weight has to bring it
                    parameter.mul_(attention.head_dim**-0.5)
            elif name.endswith("bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def _amplify(model: PreTrainedModel, gain: float) -> None:
    """Multiply all weights of more than one dimension but embeddings, so that attention is far from uniform."""
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.dim() > 1 and not isinstance(module, nn.Embedding):
                    parameter.mul_(gain)


def build_config(family: str) -> transformers.PreTrainedConfig:
    """A fresh config of `family`."""
    entry = _ALL[family]
    config = getattr(transformers, entry.config)(**entry.config_fields())
    if entry.gain is None:  # else it has the ids that its class demands
        config.bos_token_id, config.eos_token_id, config.pad_token_id = None, None, PAD_TOKEN_ID
    return config


def build_model(family: str, attention: str | None = None) -> PreTrainedModel:
    """A fresh float32 model of `family`, with the same weights every time, and no end-of-sequence token.

    Args:
        attention: overrides the family's own implementation.
    """
    entry, config = _ALL[family], build_config(family)
    seed = zlib.crc32(family.encode()) + entry.seed
    torch.manual_seed(seed)
    kind = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32, attn_implementation=attention or entry.attention)
    if entry.gain is None:
        _condition(model, seed)
    else:
        _amplify(model, entry.gain)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD_TOKEN_ID
    return model.eval()


@functools.cache
def oracle_model(family: str) -> PreTrainedModel:
    """The model that runs with transformers' own caches; no SpinCache ever touches it or its config."""
    return build_model(family)


@functools.cache
def subject_model(family: str) -> PreTrainedModel:
    """The model that runs with the cache under test: another object, with the same weights."""
    return build_model(family)


@functools.cache
def assistant_model(family: str) -> PreTrainedModel:
    """A drafting model: the oracle with noise on its weights, so that some of its tokens are accepted and some not."""
    model = copy.deepcopy(oracle_model(family))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.add_(0.06 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    model.generation_config.num_assistant_tokens = 4
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, length], int64, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TOKEN_ID, VOCAB_SIZE, (rows, length), generator=generator)


def left_padded(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [len(lengths), max(lengths)] of prompts with these lengths, padded on the left."""
    width = max(lengths)
    tokens = random_tokens(len(lengths), width, seed)
    mask = torch.ones_like(tokens)
    for row, length in enumerate(lengths):
        tokens[row, : width - length] = PAD_TOKEN_ID
        mask[row, : width - length] = 0
    return tokens, mask
