"""On a real model's activations the estimate brings RetroInfer's attention nearer to dense attention, at the same budget.

SmolLM2-135M-Instruct, bfloat16, 2,048 tokens of Macbeth. Every layer's sparse output is compared with the dense one of the same
query over the same tokens. The model continues with the dense one, so all queries are those of dense attention.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from spin_hf import RetroInfer, SpinCache
from spin_hf.backends.dense import attend_held
from spin_hf.backends.reference import ReferenceBackend
from tests.support.examples import example_module
from tests.support.inspection import state_of

pytestmark = [pytest.mark.model, pytest.mark.slow]  # quick: tests/attention, on topics instead of a model

NUM_TOKENS, STEPS = 2048, 4


def errors(model: Any, prefilled: DynamicCache, tokens: list[int], budget: int, fraction: float) -> list[float]:
    """Relative error of the attention output of every layer and step."""
    cache = SpinCache.from_cache(prefilled, model, RetroInfer(estimated_fraction=fraction), budget=budget)
    found: list[float] = []
    sparse_attention = ReferenceBackend.attend_selected

    def both(self: ReferenceBackend, layer: Any, call: Any, position: int) -> Any:
        sparse = sparse_attention(self, layer, call, position)
        dense = attend_held(call, self.zones.allowed_all(1, call.query.device), layer.store).float()
        found.append(float((sparse - dense).norm() / dense.norm()))
        return dense

    with patch.object(ReferenceBackend, "attend_selected", both), torch.no_grad():
        for token in tokens:
            model(torch.tensor([[token]]), past_key_values=cache)
    assert state_of(cache).sequences.spans.stops == [(NUM_TOKENS - 128) // 8]
    return found


def test_the_estimate_lowers_the_error() -> None:
    folder = example_module("models").default_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = example_module("texts").play("macbeth")[: 8 * NUM_TOKENS]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: NUM_TOKENS + STEPS]
    prefilled = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([ids[:NUM_TOKENS]]), past_key_values=prefilled, logits_to_keep=1)
    for budget in (32, 128):
        without, estimated = (
            torch.tensor(errors(model, prefilled, ids[NUM_TOKENS:], budget, fraction)) for fraction in (0.0, 0.232)
        )
        assert len(without) == STEPS * model.config.num_hidden_layers
        assert estimated.mean() < 0.9 * without.mean()
        assert (estimated < without).float().mean() > 0.8
