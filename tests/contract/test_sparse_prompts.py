"""`prefill="sparse"`: equal to dense where it reads everything, near it where it does not, and never wrong tokens behind it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from spin_hf import OptionError, SpinCache
from spin_hf.backends import sparse_prompt
from spin_hf.graph.prompt_reader import PromptReader
from tests.support.inspection import forward_of, state_of
from tests.support.memory import SMALL_ZONES
from tests.support.zoo import build_model, left_padded, random_tokens

LENGTH = 1500


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """First positions of the forwards that were read sparsely, one for each layer."""
    found: list[int] = []
    original = sparse_prompt.attend

    def noting(state: Any, *rest: Any) -> None:
        found.append(state.sequences.start)
        original(state, *rest)

    monkeypatch.setattr(sparse_prompt, "attend", noting)
    return found


def logits(model: Any, cache: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids, past_key_values=cache, **options).logits
    return found


@pytest.mark.sweep(2)
@pytest.mark.parametrize("gpu_memory", ["auto", "600kB"])
@pytest.mark.parametrize("size", [None, 384, 512])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_next"])
def test_everything_read_is_dense(family: str, size: int | None, gpu_memory: str, served: list[int]) -> None:
    """With a share of 1 nothing that weighs is left out."""
    model, ids = build_model(family), random_tokens(2, LENGTH)
    options: dict[str, Any] = {"gpu_memory": gpu_memory, "prefill_chunk_size": size, **SMALL_ZONES}
    found = []
    for prefill in ("sparse", "dense"):
        cache = SpinCache(model, "shadowkv", prefill=prefill, prefill_top_p=1.0, **options)
        found.append(torch.cat([logits(model, cache, ids), logits(model, cache, random_tokens(2, 1, seed=1))], 1))
        cache.check_integrity()
        assert all(layer.key_means is None for layer in state_of(cache).layers)
    assert served
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [None, 384])
def test_less_is_read_by_early_queries_only(size: int | None, served: list[int]) -> None:
    """The last 512 tokens of the prompt read everything, whatever the chunks."""
    model, ids = build_model("llama"), random_tokens(1, LENGTH)
    cache = SpinCache(model, prefill="sparse", prefill_top_p=0.05, prefill_chunk_size=size)
    sparse, dense = logits(model, cache, ids), logits(model, DynamicCache(config=model.config), ids)
    assert served
    apart = (sparse - dense).abs().amax(-1)[0]
    assert float(apart[:256].max()) <= 1e-4  # their own block and the first one are all there is
    assert float(apart[256:900].max()) > 1e-3
    assert cache.get_seq_length() == LENGTH


def test_only_the_first_layer_reads_less() -> None:
    """With one layer, the last tokens are exact: they read everything, and the first layer's keys are."""
    model = copy.deepcopy(build_model("llama"))
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    ids = random_tokens(1, LENGTH)
    sparse = logits(model, SpinCache(model, prefill="sparse", prefill_top_p=0.05, prefill_chunk_size=256), ids)
    dense = logits(model, DynamicCache(config=model.config), ids)
    torch.testing.assert_close(sparse[:, -512:], dense[:, -512:], rtol=1e-3, atol=1e-4)
    assert float((sparse - dense).abs().max()) > 1e-3


def test_what_is_read_densely(served: list[int]) -> None:
    """Padding, softcaps, and a later turn that is little longer than what is read densely anyway."""
    for family, (ids, mask) in (
        ("llama", left_padded([LENGTH, LENGTH - 90])),
        ("gemma2", (random_tokens(2, LENGTH), None)),
    ):
        model = build_model(family)
        options = {} if mask is None else {"attention_mask": mask}
        ours, theirs = (
            logits(model, cache, ids, **options)
            for cache in (SpinCache(model, prefill="sparse", prefill_top_p=0.05), DynamicCache(config=model.config))
        )
        real = slice(-100, None)
        torch.testing.assert_close(ours[:, real], theirs[:, real], rtol=1e-3, atol=1e-3)
    model = build_model("llama")
    cache = SpinCache(model, prefill="sparse", prefill_top_p=0.05)
    logits(model, cache, random_tokens(1, 100))
    logits(model, cache, random_tokens(1, 530))
    assert not served


@pytest.mark.parametrize("held", [640, 649, 511])
def test_a_second_turn_is_sparse(held: int, served: list[int]) -> None:
    """From its first whole block on. Earlier mean keys are computed from the pages, clustered ones too."""
    model = build_model("llama")
    found = []
    for prefill in ("sparse", "dense"):
        cache = SpinCache(model, budget=1 << 20, prefill=prefill, prefill_top_p=1.0)
        logits(model, cache, random_tokens(1, held - 1))
        logits(model, cache, random_tokens(1, 1, seed=1))
        found.append(logits(model, cache, random_tokens(1, 1100, seed=2)))
    assert -(-held // 128) * 128 in served
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [200, 383])
def test_chunks_of_a_given_size_are_whole_blocks(size: int, served: list[int]) -> None:
    model = build_model("llama")
    logits(model, SpinCache(model, prefill="sparse", prefill_chunk_size=size), random_tokens(1, LENGTH))
    each = size // 128 * 128
    assert sorted(set(served)) == list(range(0, (LENGTH - 512) // 128 * 128, each))


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_chunks_of_auto_size_are_whole_blocks(batch_size: int) -> None:
    """Else later chunks would be read densely."""
    model = build_model("llama")
    cache = SpinCache(model, prefill="sparse")
    reader = PromptReader(cache.layers, forward_of(cache), model.config)
    size = reader.chunk_size(model, torch.empty((batch_size, 1 << 20), dtype=torch.int64, device="meta"))
    assert size % 128 == 0
    assert max(256, 8192 // batch_size - 128) <= size <= max(256, 8192 // batch_size)


def test_an_interrupted_prompt(served: list[int]) -> None:
    model = copy.deepcopy(build_model("llama"))
    cache = SpinCache(model, prefill="sparse", prefill_chunk_size=256)
    calls = iter(range(99))

    def interrupt(*_: Any) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model, cache, random_tokens(1, LENGTH))
    hook.remove()
    assert cache.get_seq_length() == 0
    assert all(layer.key_means is None for layer in state_of(cache).layers)
    again = logits(model, cache, random_tokens(1, LENGTH))
    fresh = logits(model, SpinCache(model, prefill="sparse", prefill_chunk_size=256), random_tokens(1, LENGTH))
    torch.testing.assert_close(again, fresh)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill": "sprase"}, "prefill: expected one of 'dense', 'sparse'"),
        ({"prefill_top_p": 0.0}, "prefill_top_p: expected a share"),
        ({"prefill_top_p": 1.5}, "prefill_top_p: expected a share"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SpinCache(build_model("llama"), **options)
