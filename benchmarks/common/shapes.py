"""The models that are measured, with random weights, and the tokens that their caches are given.

weights    bf16, normal; the token decides the query, and what attention and MLPs add to it is small, so that
           `overlap.py` can set how much of a step's selection the next one repeats; shapes, dtypes and launches are
           the real model's, and so is the speed
tokens     keys and values drawn from a normal distribution, up to 32,768 tokens of each sequence at a time, and 262,144 in all
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from transformers.cache_utils import Cache
from transformers.initialization import no_init_weights

from benchmarks.common.inspection import forward_of, state_of
from spin_hf import SpinCache

_COMMON: dict[str, Any] = {"max_position_embeddings": 1 << 20, "dtype": torch.bfloat16}
SHAPES: dict[str, Any] = {
    "llama-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, **_COMMON,
    ),
    "qwen3-0.6b": Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, **_COMMON,
    ),
}  # fmt: skip
CHUNK, CHUNK_IN_ALL = 32768, 262144
"""Tokens that a SpinCache is given at a time, of each sequence and of all of them: 1 GiB of an 8B model's layer."""
_STD, _FAINT_STD, _ROWS = 0.02, 4e-5, 8192
_LANDMARK = 8**-0.5
"""Length of the mean of eight random keys, where each has 1."""


def build(shape: str) -> Any:
    """The model with random weights on the GPU."""
    config = SHAPES[shape]
    config._attn_implementation = "sdpa"
    with torch.device("cuda"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return condition(model)


@torch.no_grad()
def condition(model: Any) -> Any:
    """Give a model its weights, in place; embeddings and query projections are `overlap.set_spread`'s.

    Half of a token's channels is common to all tokens and half its own. The last norm looks at the latter only, where row i
    of the head is what token i + 1 has; a head that shares the embedding's memory begins one row later for this.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = head.weight is embedding.weight
    if shared:
        table = torch.empty((len(head.weight) + 1, head.weight.shape[1]), dtype=head.weight.dtype, device=model.device)
        embedding.weight, head.weight = (nn.Parameter(rows, requires_grad=False) for rows in (table[:-1], table[1:]))
    generator = torch.Generator(model.device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1)
        else:
            faint = name.endswith(("o_proj.weight", "down_proj.weight"))
            parameter.normal_(0, _FAINT_STD if faint else _STD, generator=generator)
    for layer in model.model.layers:  # pages of generated tokens, whose keys are alike, are chosen no more than others
        norm = getattr(layer.self_attn, "k_norm", None)
        (layer.self_attn.k_proj if norm is None else norm).weight.mul_(_LANDMARK)
    half = head.weight.shape[1] // 2
    model.model.norm.weight[:half] = 0
    if not shared:
        for first, own in own_halves(head.weight):
            start = first - 1 if first else 0
            head.weight[start : first + len(own) - 1, half:] = _STD * (own if first else own[1:])
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def own_halves(table: Tensor) -> Iterator[tuple[int, Tensor]]:
    """What each token has for itself, [rows, channels / 2], float32, the same each time; a part of the rows at a time."""
    generator = torch.Generator(table.device)
    for first in range(0, len(table), _ROWS):
        shape = (min(_ROWS, len(table) - first), table.shape[1] - table.shape[1] // 2)
        yield first, torch.randn(shape, device=table.device, generator=generator.manual_seed(1 + first))


def head_dim(config: Any) -> int:
    """Length of a key."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def states(config: Any, count: int, device: str = "cuda", batch: int = 1) -> tuple[Tensor, Tensor]:
    """Keys and values of `count` tokens of each sequence, of one layer."""
    shape = (batch, config.num_key_value_heads, count, head_dim(config))
    key = torch.randn(shape, device=device, dtype=config.dtype)
    return key, torch.randn_like(key)


def fill_spin(
    cache: SpinCache, config: Any, num_tokens: int, device: str = "cuda", batch: int = 1, padding: Tensor | None = None
) -> None:  # fmt: skip
    """Give each sequence of a SpinCache `num_tokens` tokens.

    Args:
        padding: [batch], how many of them, in front, are padding; None for none.
    """
    chunk = chunk_tokens(batch)
    for start in range(0, num_tokens, chunk):
        count = min(chunk, num_tokens - start)
        valid = None
        if padding is not None:
            valid = torch.arange(start, start + count, device=device) >= padding.to(device).unsqueeze(1)
        for layer in cache.layers:
            layer.append(*states(config, count, device, batch), valid)
        forward_of(cache).commit()
    state_of(cache).visible_length.fill_(num_tokens)


def chunk_tokens(batch: int) -> int:
    """Tokens of each sequence that a SpinCache is given at a time: whole segments."""
    return max(256, min(CHUNK, CHUNK_IN_ALL // batch) // 256 * 256)


def reserve_spin(cache: SpinCache, config: Any, num_tokens: int, device: str = "cuda", batch: int = 1) -> None:
    """Have an empty SpinCache get the memory for `num_tokens` tokens of each sequence, all at once, before it is filled.

    Page-locked memory comes faster in few large slabs, and pages go to the tier where they will stay.
    """
    state = state_of(cache)
    state.sequences.begin(batch, num_tokens, None)
    key, value = states(config, 1, device, batch)
    for layer in cache.paged_layers:
        layer.lazy_initialization(key, value)
    state.sequences.truncate(0)
    state.sequences.free.sort(reverse=True)  # taken from the end: sequences lie one after the other, as without this


def fill(cache: Cache, config: Any, num_tokens: int, batch: int = 1) -> Cache:
    """Give each sequence of one of transformers' caches `num_tokens` tokens."""
    for index in range(config.num_hidden_layers):
        cache.update(*states(config, num_tokens, batch=batch), index)
    return cache
