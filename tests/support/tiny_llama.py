"""A random model of two layers whose vocabulary has 64 tokens, for tests of scripts that load or run a model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(**options: Any) -> LlamaForCausalLM:
    """The model, the same at every call. `options` are fields of its config."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
