"""Prompts in chunks: whatever their size, a SpinCache gives what a DynamicCache gives for the whole prompt.

Chunks of 1, 7 and 29 tokens, in every mode: with all pages resident, with the smallest `gpu_memory`, and with a budget that
selects. Where a family's prompts are not divided (`docs/families.md`), that is asserted too.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from spin_hf import CapacityError, SpinCache
from spin_hf.graph import prompt_reader
from spin_hf.graph.model_calls import ModelCalls
from tests.support import more_families
from tests.support.all_modes import MODES
from tests.support.compare import RELATIVE_TOLERANCE, Trace, assert_same, difference
from tests.support.families import FAMILIES
from tests.support.inspection import state_of
from tests.support.memory import SMALL_ZONES, with_tight_gpu_memory
from tests.support.subjects import SpinSubject, dense_subject
from tests.support.zoo import build_model, left_padded, random_tokens

RUNNABLE = [
    (family, mode)
    for family, entry in FAMILIES.items()
    for mode in MODES
    if mode not in entry.limits() and mode != "compiled" and entry.paged
]
PAGED_FAMILIES = ("gpt_oss", "gemma3n_text", "qwen3_next", "llama4_text", "mimo_v2_flash")
PAGED_MODES = ("left_padding", "holes", "multi_turn", "beam_search")
WHOLE = {"llama4_text"}
"""Families whose prompts are read whole."""
OTHERS_READ_WHOLE = {
    "inkling_text", "diffllama", "jetmoe", "dory", "hy_v4",  # no layer is paged
    "bamba",  # Mamba forgets its state where several tokens follow it
    "gemma3", "gemma4",  # the model that takes images builds the masks of the text model
}  # fmt: skip


@functools.cache
def expected(family: str, mode: str) -> Trace:
    """The results of DynamicCache."""
    return MODES[mode](dense_subject(family))


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Token counts of the prompts that are read in chunks."""
    found: list[int] = []
    original = prompt_reader.chunks

    def noting(num_tokens: int, size: int, lead: int) -> Any:
        found.append(num_tokens)
        return original(num_tokens, size, lead)

    monkeypatch.setattr(prompt_reader, "chunks", noting)
    return found


def cases(pairs: list[tuple[str, str]], families: Collection[str], quick_mode: str) -> Any:
    """Parameters: one family in all modes and `families` in one mode are quick."""

    def is_quick(family: str, mode: str) -> bool:
        return family == "llama" or (family in families and mode == quick_mode)

    return pytest.mark.parametrize(
        ("family", "mode"),
        [pytest.param(*pair, id="-".join(pair), marks=() if is_quick(*pair) else pytest.mark.slow) for pair in pairs],
    )


@cases(RUNNABLE, FAMILIES, "greedy")
def test_exact(family: str, mode: str, divided: list[int]) -> None:
    for size in (7, 29) if mode == "greedy" or family == "llama" else (7,):
        subject = SpinSubject(family, prefill_chunk_size=size)
        assert_same(MODES[mode](subject), expected(family, mode))
        for cache in subject.caches:
            cache.check_integrity()
    if mode == "greedy":
        assert bool(divided) == (family not in WHOLE)


def _paged(family: str, mode: str) -> None:
    def run(cap: int) -> SpinSubject:
        subject = SpinSubject(family, gpu_memory=cap, prefill_chunk_size=11, **SMALL_ZONES)
        assert_same(MODES[mode](subject), expected(family, mode))
        return subject

    subject = with_tight_gpu_memory(run)
    for cache in subject.caches:
        cache.check_integrity()
    assert sum(cache.stats().loads for cache in subject.caches) > 0


@cases([pair for pair in RUNNABLE if pair[1] in PAGED_MODES], PAGED_FAMILIES, "holes")
def test_tiered(family: str, mode: str, divided: list[int]) -> None:
    _paged(family, mode)
    assert bool(divided) == (family not in WHOLE)


@pytest.mark.parametrize("family", more_families.UNUSUAL | more_families.GENERATING)
def test_other_families(family: str, divided: list[int]) -> None:
    """A prompt of 61 tokens in chunks of 7, and the next token."""
    model = build_model(family)
    cache = SpinCache(model, budget=1 << 20, prefill_chunk_size=7)
    dense = DynamicCache(config=model.config.get_text_config(decoder=True))
    for number, ids in enumerate((random_tokens(2, 61), random_tokens(2, 1, seed=3))):
        with torch.no_grad():
            ours, theirs = (model(ids, past_key_values=each).logits for each in (cache, dense))
        assert difference(ours, theirs) <= RELATIVE_TOLERANCE, f"call {number}"
    assert bool(divided) == (family not in OTHERS_READ_WHOLE)


@pytest.mark.parametrize("method", ["bisection", "shadowkv", "retroinfer", "quest", "fitted"])
@pytest.mark.parametrize("size", [1, 5, 64, 100])
def test_the_same_selections(method: str, size: int, divided: list[int]) -> None:
    """Behind a prompt in chunks, sparse steps select what they select behind a whole one."""
    model, traces = build_model("llama"), []
    ids, mask = left_padded([190, 161])
    for chunk in (None, size):
        cache = SpinCache(model, method, budget=24, **SMALL_ZONES, prefill_chunk_size=chunk)
        with torch.no_grad():
            given: dict[str, Tensor] = dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
            steps = [model(ids, past_key_values=cache, **given).logits[:, -1:]]
            for step in range(4):
                mask_now = torch.cat([mask, mask.new_ones((2, step + 1))], 1)
                place = mask_now.sum(1, keepdim=True) - 1
                tokens = random_tokens(2, 1, seed=step)
                output = model(tokens, past_key_values=cache, attention_mask=mask_now, position_ids=place)
                steps.append(output.logits)
        assert cache.stats().sparse_queries
        cache.check_integrity()
        traces.append(torch.cat(steps, 1))
    assert divided == [190]
    torch.testing.assert_close(*traces)


@pytest.mark.parametrize("keep", [None, 0, 1, 3, 12, 40])
def test_the_logits_that_the_caller_wants(keep: int | None, divided: list[int]) -> None:
    model = build_model("llama")
    ids, cache = random_tokens(2, 40), SpinCache(model, prefill_chunk_size=9)
    given = {} if keep is None else {"logits_to_keep": keep}
    with torch.no_grad():
        ours, theirs = model(ids, past_key_values=cache, **given), model(ids, **given)
    assert ours.past_key_values is cache
    torch.testing.assert_close(ours.logits, theirs.logits)
    assert divided == [40]


def test_the_model_below_the_head(divided: list[int]) -> None:
    model = build_model("llama").model
    ids = random_tokens(2, 40)
    with torch.no_grad():
        ours = model(inputs_embeds=model.embed_tokens(ids), past_key_values=SpinCache(model, prefill_chunk_size=9))
        theirs = model(ids)
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state)
    assert divided == [40]


@pytest.mark.parametrize(
    ("options", "times"),
    [(dict(output_hidden_states=True), 0), (dict(output_attentions=True), 0), (dict(return_dict=False), 1)],  # inside
    ids=str,
)
def test_outputs_that_chunks_do_not_have(options: dict[str, Any], times: int, divided: list[int]) -> None:
    model = build_model("llama")
    ids, cache = random_tokens(2, 40), SpinCache(model, budget=1 << 20, prefill_chunk_size=9)
    with torch.no_grad():
        ours, theirs = model(ids, past_key_values=cache, **options), model(ids, use_cache=True, **options)
    torch.testing.assert_close(ours[0], theirs[0])
    assert len(divided) == times


@pytest.mark.parametrize("given", [{}, {"output_hidden_states": None}], ids=str)
def test_outputs_that_the_config_sets(given: dict[str, Any], divided: list[int]) -> None:
    """What transformers makes of the setting, also where the argument is None, is what a cache gives."""
    model = copy.deepcopy(build_model("llama"))
    model.config.output_hidden_states = True
    ids, cache = random_tokens(2, 40), SpinCache(model, prefill_chunk_size=9)
    with torch.no_grad():
        ours, theirs = model(ids, past_key_values=cache, **given).hidden_states, model(ids, **given).hidden_states
    assert (ours is None) == (theirs is None)
    if theirs is not None:
        torch.testing.assert_close(ours, theirs)
    assert not divided


def test_gradients_are_those_of_the_whole_prompt(divided: list[int]) -> None:
    model = copy.deepcopy(build_model("llama"))
    ids = random_tokens(1, 40)
    found = []
    for cache in (SpinCache(model, prefill_chunk_size=9), None):
        model.zero_grad()
        model(ids, past_key_values=cache).logits.sum().backward()
        found.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(*found)
    assert not divided


def allocated(cache: SpinCache) -> int:
    """Bytes of pages and summaries, with room that no token uses."""
    return sum(layer.store.held_bytes for layer in cache.paged_layers if layer.store is not None)


@pytest.mark.parametrize("held", [0, 12])
@pytest.mark.parametrize("chunk", [0, 1, 3])
def test_an_interrupted_prompt_is_forgotten_whole(chunk: int, held: int) -> None:
    """Also the chunks before the interruption; tokens held before the call stay."""
    model = copy.deepcopy(build_model("gemma3_text"))
    cache, dense = SpinCache(model, budget=1 << 20, prefill_chunk_size=9), DynamicCache(config=model.config)
    with torch.no_grad():
        if held:
            for each in (cache, dense):
                model(random_tokens(2, held, seed=1), past_key_values=each)
        before, calls = allocated(cache), iter(range(99))

        def interrupt(*_: Any) -> None:
            if next(calls) == chunk:
                raise KeyboardInterrupt

        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(random_tokens(2, 40), past_key_values=cache)
        hook.remove()
        assert cache.get_seq_length() == held
        assert cache.stats().sequences == (2 if held else 0)
        assert allocated(cache) == before
        cache.check_integrity()
        for ids in (random_tokens(2, 33, seed=2), random_tokens(2, 1, seed=3)):
            ours, theirs = (model(ids, past_key_values=each).logits for each in (cache, dense))
            assert difference(ours, theirs) <= RELATIVE_TOLERANCE


def test_a_prompt_that_does_not_fit_is_refused_before_its_first_chunk() -> None:
    model = copy.deepcopy(build_model("llama"))
    cache = SpinCache(model, gpu_memory="100kB", cpu_memory="100kB", prefill_chunk_size=64)
    model.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("a layer was called"))
    with torch.no_grad(), pytest.raises(CapacityError, match="cpu_memory"):
        model(random_tokens(1, 4000), past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("held", [0, 70])
@pytest.mark.parametrize("gpu_memory", ["auto", "600kB"])
def test_memory_is_reserved_with_the_first_chunk(gpu_memory: str, held: int) -> None:
    """Later chunks neither resize page frames nor move pages, and the sizes at the end are those of a prompt read whole."""
    model, ids = build_model("llama"), random_tokens(2, 1300, seed=2)
    found = []
    for size in (None, 100):
        cache = SpinCache(model, "shadowkv", gpu_memory=gpu_memory, prefill_chunk_size=size, **SMALL_ZONES)
        sizes = []

        def note(*_: Any, cache: SpinCache = cache, sizes: list[Any] = sizes) -> None:
            store = cache.paged_layers[0].store
            sizes.append(None if store is None or store.frames is None else store.frames.slots)

        with torch.no_grad():
            if held:
                model(random_tokens(2, held), past_key_values=cache)
            hook = model.model.layers[1].register_forward_pre_hook(note)
            model(ids, past_key_values=cache)
            hook.remove()
        assert len(set(sizes)) == 1
        assert (sizes[0] is None) == (gpu_memory == "auto")
        stats = cache.stats()
        found.append((sizes[0], stats.gpu_bytes, stats.cpu_bytes, stats.metadata_bytes))
        cache.check_integrity()
    assert found[0] == found[1]


def test_prefill_chunk_size_of_generate_takes_the_same_path(divided: list[int]) -> None:
    """transformers divides the prompt itself then, also for a cache made from a config."""
    model, ids = build_model("llama"), random_tokens(2, 90)
    for source in (model, model.config):
        cache = SpinCache(source, budget=1 << 20)
        ours = model.generate(ids, past_key_values=cache, max_new_tokens=5, prefill_chunk_size=20)
        assert torch.equal(ours, model.generate(ids, max_new_tokens=5))
    assert not divided


@pytest.mark.parametrize("gpu_memory", ["auto", "600kB"])
def test_memory_for_chunks_of_generate_is_reserved_with_the_first(gpu_memory: str) -> None:
    """`generate` is given the whole prompt, so its chunks are expected. An interrupted prompt gives back what did not come."""
    model, ids = copy.deepcopy(build_model("llama")), random_tokens(2, 1300, seed=2)
    cache = SpinCache(model, "shadowkv", gpu_memory=gpu_memory, **SMALL_ZONES)
    sizes: list[Any] = []

    def note(*_: Any) -> None:
        store = cache.paged_layers[0].store
        assert store is not None
        sizes.append((store.num_segments, None if store.frames is None else store.frames.slots))
        if len(sizes) == 3 and interrupted:
            raise KeyboardInterrupt

    interrupted, given = False, dict(past_key_values=cache, max_new_tokens=1, prefill_chunk_size=100)
    hook = model.model.layers[1].register_forward_pre_hook(note)
    model.generate(ids, **given)
    assert len(sizes) == 13
    assert len(set(sizes)) == 1
    assert (sizes[0][1] is None) == (gpu_memory == "auto")
    cache.check_integrity()
    cache.reset()
    sizes.clear()
    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, **given)
    hook.remove()
    assert cache.get_seq_length() == 200
    store = cache.paged_layers[0].store
    assert store is not None
    assert store.num_segments == len(state_of(cache).sequences.refcounts)
    assert state_of(cache).sequences.expected_tokens == 0
    cache.check_integrity()


@pytest.mark.parametrize("padded", [False, True])
def test_padding_of_a_prompt_that_generate_divides_is_read_once(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without padding no chunk gets a mask, so none waits for the one before. With it all do."""
    model = copy.deepcopy(build_model("llama"))
    ids, mask = left_padded([61, 50 if padded else 61])
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=6)
    cache = SpinCache(model, budget=1 << 20)
    seen: list[Any] = []
    original = ModelCalls.run

    def noted(forward: Any) -> Any:
        def noting(**given: Any) -> Any:
            seen.append(given.get("attention_mask"))
            return forward(**given)

        return noting

    monkeypatch.setattr(
        ModelCalls, "run", lambda self, module, forward, *rest: original(self, module, noted(forward), *rest)
    )
    found = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, prefill_chunk_size=20)
    assert torch.equal(found, expected)
    chunks = seen[:4]
    assert [each is None for each in chunks] == [not padded] * 4
    cache.check_integrity()


@pytest.mark.parametrize(("tokens", "size", "wanted"), [
    (9, 4, [(0, 4), (4, 8), (8, 9)]), (8, 4, [(0, 4), (4, 8)]), (3, 4, [(0, 3)]), (3, 1, [(0, 1), (1, 2), (2, 3)]),
    (130, 64, [(0, 64), (64, 130)]), (140, 64, [(0, 64), (64, 128), (128, 140)]),
])  # fmt: skip
def test_chunks(tokens: int, size: int, wanted: list[tuple[int, int]]) -> None:
    assert list(prompt_reader.chunks(tokens, size)) == wanted
