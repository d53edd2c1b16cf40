"""The cache interface that transformers uses at every step, against DynamicCache; and SpinCache's own additions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from spin_hf import SpinCache
from tests.support.compare import Trace, assert_same
from tests.support.families import FAMILIES, WINDOW
from tests.support.memory import SMALL_ZONES
from tests.support.runs import generate
from tests.support.subjects import DenseSubject, SpinSubject, Subject, dense_subject
from tests.support.zoo import build_model, left_padded, oracle_model, random_tokens, subject_model

each_family = pytest.mark.parametrize("family", FAMILIES)


def answers(cache: Any, steps: tuple[int, ...] = (1, 5, 40)) -> dict[str, Any]:
    """What `generate` and the mask functions read off a cache."""
    attention = [index for index, layer in enumerate(cache.layers) if hasattr(layer, "get_mask_sizes")]
    return {
        "length": int(cache.get_seq_length()),
        "lengths": [int(cache.get_seq_length(index)) for index in attention],
        "offset": int(cache.get_query_offset()),
        "maximum": cache.get_max_length(),
        "maxima": [cache.get_max_length(index) for index in range(len(cache.layers))],
        "masks": [[tuple(map(int, cache.get_mask_sizes(n, index))) for n in steps] for index in attention],
        "croppable": cache.is_croppable,
        "sliding": cache.is_sliding,
        "linear": cache.is_linear,
        "layers": len(cache),
        "previous": any(cache.is_linear) and cache.has_previous_state(),
    }


@each_family
def test_answers_like_a_dynamic_cache(family: str) -> None:
    """Empty, after a prompt, after some steps, after a reset."""
    said = []
    for subject in (SpinSubject(family), DenseSubject(family)):
        cache = subject.new()
        seen = [answers(cache)]
        for rows, tokens in ((2, 19), (2, 30), (2, 1), (2, 1)):
            with torch.no_grad():
                subject.model(random_tokens(rows, tokens), past_key_values=cache)
            seen.append(answers(cache))
        cache = subject.restart(cache)
        said.append([*seen, answers(cache)])
    assert said[0] == said[1]


@each_family
def test_layers_that_keep_a_window_keep_no_more(family: str) -> None:
    subject = SpinSubject(family)
    cache = subject.new()
    with torch.no_grad():
        for tokens in (60, 1, 1):
            subject.model(random_tokens(1, tokens), past_key_values=cache)
    for index, sliding in enumerate(cache.is_sliding):
        keys = getattr(cache.layers[index], "keys", None)
        if sliding and keys is not None:
            assert keys.shape[-2] < max(WINDOW, 32)


@each_family
def test_pages_hold_what_a_dynamic_cache_holds(family: str) -> None:
    """Keys and values, read back from the pages, bit for bit: nothing is converted on the way."""
    held = []
    for subject in (SpinSubject(family), DenseSubject(family)):
        cache = subject.new()
        generate(subject, random_tokens(2, 45), cache, new_tokens=4)
        held.append([(layer.keys, layer.values) for layer in cache.layers if getattr(layer, "keys", None) is not None])
    assert len(held[0]) == len(held[1]) or family.startswith("gemma")  # placeholders of layers that share keys
    for ours, theirs in zip(*held, strict=False):
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.shape == other.shape
            assert (mine - other).abs().max() <= 1e-4 * other.abs().max()


def test_batch_size() -> None:
    model = subject_model("llama")
    cache = SpinCache(model)
    assert cache.batch_size == -1
    with torch.no_grad():
        model(random_tokens(3, 20), past_key_values=cache)
    assert cache.batch_size == 3
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    cache.batch_select_indices(torch.tensor([5, 0]))
    assert cache.batch_size == 2
    cache.reset()
    assert cache.batch_size == -1
    with pytest.raises(AttributeError):
        cache.batch_size = 4  # type: ignore[misc]


def test_is_initialized() -> None:
    model = subject_model("llama")
    cache = SpinCache(model)
    assert not cache.is_initialized
    with torch.no_grad():
        model(random_tokens(1, 3), past_key_values=cache)
    assert cache.is_initialized


def test_select_by_a_bool_mask() -> None:
    traces = []
    for subject in (SpinSubject("llama"), DenseSubject("llama")):
        trace, cache = Trace(), subject.new()
        ids = random_tokens(3, 45)
        with torch.no_grad():
            subject.model(ids, past_key_values=cache)
        keep = torch.tensor([True, False, True])
        cache.batch_select_indices(keep)
        ids = torch.cat([ids[keep], random_tokens(2, 3, seed=1)], dim=1)
        trace.add_generated("2 of 3", generate(subject, ids, cache, new_tokens=4))
        traces.append(trace)
    assert_same(*traces)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next", "deepseek_v3"])
def test_the_text_config_is_enough(family: str) -> None:
    subject, oracle = SpinSubject(family, from_config=True), dense_subject(family)
    trace, expected = Trace(), Trace()
    trace.add_generated("config", generate(subject, random_tokens(1, 50), subject.new(), new_tokens=5))
    expected.add_generated("config", generate(oracle, random_tokens(1, 50), oracle.new(), new_tokens=5))
    assert_same(trace, expected)


def test_bfloat16_pages_and_summaries() -> None:
    """Half precision works, pages have its dtype, and results are near those of DynamicCache."""
    ours, theirs = build_model("llama").bfloat16(), build_model("llama").bfloat16()
    cache, dynamic = SpinCache(ours, budget=1 << 20), DynamicCache(config=theirs.config)
    with torch.no_grad():
        for tokens in (50, 1, 1):
            logits = ours(random_tokens(2, tokens), past_key_values=cache).logits
            expected = theirs(random_tokens(2, tokens), past_key_values=dynamic).logits
    assert logits.dtype == torch.bfloat16
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
    cache.check_integrity()


@pytest.mark.parametrize("family", [name for name, entry in FAMILIES.items() if entry.paged])
def test_a_dynamic_cache_with_padding_is_taken_over(family: str) -> None:
    """`from_cache(attention_mask=...)`: padding counts for nothing in summaries and zones."""
    oracle, subject = dense_subject(family), SpinSubject(family)
    ids, mask = left_padded([53, 40])
    dynamic = DynamicCache(config=oracle.model.config)
    with torch.no_grad():
        oracle.model(ids, attention_mask=mask, past_key_values=dynamic)
    cache = SpinCache.from_cache(dynamic, subject.model, attention_mask=mask, budget=1 << 20)
    cache.check_integrity()
    assert cache.stats().tokens == dynamic.get_seq_length() == 53
    traces = []
    for side, held in ((subject, cache), (oracle, copy.deepcopy(dynamic))):
        trace = Trace()
        later = torch.cat([ids, random_tokens(2, 5, seed=1)], dim=1)
        later_mask = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], dim=1)
        trace.add_generated("after", generate(side, later, held, attention_mask=later_mask, new_tokens=6))
        traces.append(trace)
    assert_same(*traces)
    assert dynamic.get_seq_length() == 53  # the source is left alone


def test_a_cache_of_plain_layers_is_taken_over() -> None:
    """`DynamicCache()` without a config, as older code makes it."""
    oracle, subject = dense_subject("llama"), SpinSubject("llama")
    dynamic = DynamicCache()
    with torch.no_grad():
        oracle.model(random_tokens(2, 53), past_key_values=dynamic)
        cache = subject.adopt(dynamic)
        ours = subject.model(random_tokens(2, 2), past_key_values=cache).logits
        theirs = oracle.model(random_tokens(2, 2), past_key_values=dynamic).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_from_cache_equals_a_prefill(family: str) -> None:
    """Indexed and placed as a prefill would have: the same pages are selected afterwards, under a tight cap too."""
    sparse = dict(budget=16, **SMALL_ZONES)
    prefilled, adopted = SpinSubject(family, **sparse), SpinSubject(family, **sparse)
    ids = random_tokens(2, 70)
    dynamic = DynamicCache(config=oracle_model(family).config)
    with torch.no_grad():
        oracle_model(family)(ids, past_key_values=dynamic)
        cache = prefilled.new()
        prefilled.model(ids, past_key_values=cache)
    traces = []
    for subject, held in ((adopted, adopted.adopt(dynamic)), (prefilled, cache)):
        trace = Trace()
        later = torch.cat([ids, random_tokens(2, 1, seed=1)], dim=1)
        trace.add_generated("sparse", generate(subject, later, held, new_tokens=8))
        traces.append(trace)
        assert held.stats().attended_tokens < 60
    assert_same(*traces)


@pytest.mark.parametrize("mask", ["bool", "one for all rows", "one per head"])
def test_other_4d_masks(mask: str) -> None:
    """4-D masks as transformers' sdpa takes them: bool, broadcast over rows, or with a plane for each head."""
    traces = []
    for subject in (SpinSubject("llama"), DenseSubject("llama")):
        trace, cache = Trace(), subject.new()
        for queries, keys, seed in ((45, 45, 0), (1, 46, 1), (4, 50, 2)):
            shape = {"bool": (2, 1), "one for all rows": (1, 1), "one per head": (2, 4)}[mask]
            hidden = torch.rand((*shape, queries, keys), generator=torch.Generator().manual_seed(seed)) < 0.3
            seen = torch.ones(queries, keys).tril(keys - queries).bool() & ~hidden
            seen |= torch.eye(keys, dtype=torch.bool)[keys - queries :]
            given = seen if mask == "bool" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)
            with torch.no_grad():
                ids = random_tokens(2, queries, seed=seed)
                logits = subject.model(ids, attention_mask=given, past_key_values=cache).logits
            trace.add_logits(f"{queries} queries", logits)
        traces.append(trace)
    assert_same(*traces)


def subject_pair(family: str) -> tuple[Subject, Subject]:
    return SpinSubject(family), DenseSubject(family)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "deepseek_v3"])
def test_inputs_embeds(family: str) -> None:
    """`generate` from embeddings: the ids of the prompt are never seen."""
    traces = []
    for subject in subject_pair(family):
        trace = Trace()
        with torch.no_grad():
            embeds = subject.model.get_input_embeddings()(random_tokens(1, 50))
        output = subject.model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(1, 50, dtype=torch.long), past_key_values=subject.new(),
            max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        trace.add_generated("embeds", output)
        traces.append(trace)
    assert_same(*traces)
