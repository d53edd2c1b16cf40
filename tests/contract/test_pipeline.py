"""`pipeline("text-generation")` with an enabled model: a fresh cache per call, single prompts, batches and chats."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, pipeline

from spin_hf import SpinCache, enable
from tests.support.families import VOCAB_SIZE
from tests.support.zoo import build_model, oracle_model

WORDS = [f"w{index}" for index in range(VOCAB_SIZE - 3)]


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} w1 {% endfor %}w2"
    return fast


def _pipe(model: PreTrainedModel) -> Any:
    return pipeline("text-generation", model=model, tokenizer=_tokenizer(), device=-1)


def _prompt(length: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + 7 * index) % len(WORDS)] for index in range(length))


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[SpinCache]:
    """Every cache that `enable` makes."""
    made: list[SpinCache] = []

    class Spied(SpinCache):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(importlib.import_module("spin_hf.enable"), "SpinCache", Spied)
    return made


PROMPTS: dict[str, Any] = {
    "one": _prompt(50),
    "list": [_prompt(50), _prompt(33, 5), _prompt(61, 9)],
    "chat": [{"role": "user", "content": _prompt(40)}],
    "chats": [[{"role": "user", "content": _prompt(40)}], [{"role": "user", "content": _prompt(55, 3)}]],
}


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("kind", PROMPTS)
def test_same_text_as_without(kind: str, batch_size: int, caches: list[SpinCache]) -> None:
    arguments = dict(max_new_tokens=8, do_sample=False, batch_size=batch_size)
    expected = _pipe(oracle_model("llama"))(PROMPTS[kind], **arguments)
    model = build_model("llama")
    with enable(model, budget=1 << 20):
        pipe = _pipe(model)
        caches.clear()
        assert pipe(PROMPTS[kind], **arguments) == expected
        calls = len(caches)
        assert calls == (-(-len(PROMPTS[kind]) // batch_size) if kind in ("list", "chats") else 1)
        assert pipe(PROMPTS[kind], **arguments) == expected  # a shared cache would still hold the first call
        assert len(caches) == 2 * calls
    assert len({id(cache) for cache in caches}) == len(caches)
    for cache in caches:
        assert cache.get_seq_length() > 0
        cache.check_integrity()


def test_several_answers(caches: list[SpinCache]) -> None:
    arguments = dict(max_new_tokens=8, num_beams=3, num_return_sequences=3, do_sample=False)
    model = build_model("llama")
    with enable(model, budget=1 << 20):
        assert _pipe(model)(_prompt(50), **arguments) == _pipe(oracle_model("llama"))(_prompt(50), **arguments)


def test_a_cache_given_to_the_pipeline_is_used() -> None:
    model = build_model("llama")
    cache = SpinCache(model, budget=1 << 20)
    text = _pipe(model)(_prompt(50), max_new_tokens=8, do_sample=False, past_key_values=cache)
    assert text == _pipe(oracle_model("llama"))(_prompt(50), max_new_tokens=8, do_sample=False)
    assert cache.get_seq_length() == 57
