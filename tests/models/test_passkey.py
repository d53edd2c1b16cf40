"""A real model finds a passkey in 1,000 and 2,000 tokens of real text, though it attends to 256 tokens a step.

SmolLM2-135M-Instruct, bfloat16, chat prompt, the opening of Macbeth. One prefill per depth, through the SpinCache. From the
question's last token on all steps are sparse. The dense answer continues from the very same keys and values, so a miss is the
cache's fault.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedModel

from spin_hf import SpinCache
from tests.support.examples import example_module

pytestmark = pytest.mark.model

MOST_TOKENS, BUDGET = 2048, 256
DEPTHS = [0.02, 0.2, 0.4, 0.6, 0.8, 0.97]
LONG = [*(("shadowkv", depth) for depth in DEPTHS), ("fitted", 0.4), ("bisection", 0.4)]
CASES = [
    (1024, "fitted", 0.4),
    pytest.param(1024, "shadowkv", 0.4, marks=pytest.mark.slow),
    *(pytest.param(MOST_TOKENS, *case, marks=pytest.mark.slow) for case in LONG),
]
ANSWER_TOKENS = 8

HEAD = "<|im_start|>user\nHere is a text.\n\n"
NEEDLE = "\n\nThe secret passkey of the theatre's back door is {}.\n\n"
QUESTION = (
    "\n\nAnswer in one short sentence, from the text: What is the secret passkey of the theatre's back door?<|im_end|>\n"
    "<|im_start|>assistant\nThe secret passkey of the theatre's back door is"
)


@pytest.fixture(scope="module")
def folder() -> str:
    return str(example_module("models").default_model())


@pytest.fixture(scope="module")
def model(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def text(tokenizer: Any) -> list[int]:
    """Tokens of the text that the passkey is hidden in."""
    return list(
        tokenizer(example_module("texts").play("macbeth")[: 8 * MOST_TOKENS], add_special_tokens=False)["input_ids"]
    )


@torch.no_grad()
def answer(model: PreTrainedModel, cache: Cache, last: int) -> list[int]:
    """Greedy tokens after the prompt, whose last token is fed here."""
    tokens = [last]
    for _ in range(ANSWER_TOKENS):
        logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[1:]


def dense_copy(cache: SpinCache, model: PreTrainedModel) -> DynamicCache:
    """The contents of `cache`, as transformers' own cache."""
    dense = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        dense.update(layer.keys, layer.values, index)
    return dense


@pytest.mark.parametrize(("num_tokens", "method", "depth"), CASES)
def test_found_at_every_depth(
    model: PreTrainedModel, tokenizer: Any, text: list[int], num_tokens: int, method: str, depth: float
) -> None:
    def tokens(string: str) -> list[int]:
        return list(tokenizer(string, add_special_tokens=False)["input_ids"])

    passkey = str(random.Random(round(1000 * depth)).randint(10000, 99999))
    head, needle, question = tokens(HEAD), tokens(NEEDLE.format(passkey)), tokens(QUESTION)
    room = num_tokens - len(head) - len(needle) - len(question)
    assert len(text) >= room
    cut = int(depth * room)
    prompt = [*head, *text[:cut], *needle, *text[cut:room], *question]

    sparse = SpinCache(model, method, budget=BUDGET)
    with torch.no_grad():
        model(torch.tensor([prompt[:-1]]), past_key_values=sparse, use_cache=True, logits_to_keep=1)
    dense = dense_copy(sparse, model)
    found = tokenizer.decode(answer(model, sparse, prompt[-1]))

    stats = sparse.stats()
    assert stats.paged_layers == model.config.num_hidden_layers
    assert stats.sparse_queries == stats.paged_layers * model.config.num_key_value_heads * ANSWER_TOKENS
    assert BUDGET < stats.attended_tokens <= BUDGET + 8 + 64 + 8  # sinks and recent window, by whole pages
    expected = tokenizer.decode(answer(model, dense, prompt[-1]))
    assert passkey in expected, f"dense attention answers {expected!r}: the prompt is at fault"
    assert passkey in found, f"expected {passkey}, got {found!r}; dense attention answers {expected!r}"
