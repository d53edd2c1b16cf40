"""PromptStore: prompts that begin like stored ones are restored as far as that goes, in memory and from disk."""

from __future__ import annotations

import logging
import os
import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spin_hf import BudgetError, CapacityError, OptionError, OptionTypeError, PromptStore, SpinCache, enable
from spin_hf.persistence import prompt_store
from spin_hf.persistence.prefix_index import PrefixIndex
from tests.support.answers import answer, assert_fresh
from tests.support.fork_server import finished
from tests.support.memory import SMALL_ZONES
from tests.support.stores import BLOCK, Maker, StoredAtOnce, store_maker
from tests.support.zoo import build_model, left_padded, random_tokens


@pytest.fixture(params=["memory", "disk"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Maker:
    return store_maker(request.param, tmp_path)


@contextmanager
def tokens_read(model: PreTrainedModel) -> Iterator[list[int]]:
    """Token counts of the forwards with more than one token in this block."""
    read: list[int] = []

    def note(_: Any, args: Any) -> None:
        if args[0].shape[1] > 1:
            read.append(args[0].shape[1])

    hook = model.get_input_embeddings().register_forward_pre_hook(note)
    try:
        yield read
    finally:
        hook.remove()


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek_v3"])
def test_questions_about_a_document(family: str, make: Maker, caplog: pytest.LogCaptureFixture) -> None:
    model, document, store = build_model(family), random_tokens(1, 60), make()
    with tokens_read(model) as read:
        for question in range(3):
            ids = torch.cat([document, random_tokens(1, 7, seed=question + 1)], 1)
            cache = SpinCache(model, budget=1 << 20, store=store)
            with caplog.at_level(logging.INFO, "spin_hf"):
                ours = answer(model, ids, cache)
            assert cache.stats().reused_tokens == (60 if question else 0)
            theirs = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
            assert torch.equal(ours.sequences, theirs)
            cache.check_integrity()
    assert [number for number in read if number < 60] == [7, 7]
    assert "60 of 67 tokens of the prompt restored" in caplog.text
    stats = store.stats()
    assert (stats.lookups, stats.hits, stats.reused_tokens) == (3, 2, 120)
    assert stats.stored_bytes > 0


def test_a_prompt_restored_whole_leaves_a_token_to_read(make: Maker) -> None:
    model, ids, store = build_model("llama"), random_tokens(1, 40), make()
    for _ in range(2):
        assert_fresh(model, ids, SpinCache(model, budget=1 << 20, store=store))
    assert store.stats().reused_tokens == 39
    assert_fresh(model, ids[:, :23], SpinCache(model, budget=1 << 20, store=store))
    assert store.stats().reused_tokens == 39 + 22


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "qwen3_next", "gemma3n_text"])
def test_states_that_cannot_be_cropped_are_restored_whole(family: str, make: Maker) -> None:
    """Windows and linear attention: an entry serves prompts that begin with all of it."""
    model, ids, store = build_model(family), random_tokens(1, 60), make()
    assert_fresh(model, ids, SpinCache(model, budget=1 << 20, store=store))
    longer = torch.cat([ids, random_tokens(1, 9, seed=1)], 1)
    assert_fresh(model, longer, SpinCache(model, budget=1 << 20, store=store))
    assert store.stats().reused_tokens == 60
    assert_fresh(model, ids[:, :50], SpinCache(model, budget=1 << 20, store=store))
    assert store.stats().reused_tokens == 60


@pytest.mark.parametrize("method", ["bisection", "shadowkv", "retroinfer", "quest", "fitted"])
def test_sparse_and_tiered(method: str, make: Maker) -> None:
    """What is restored is what is stored, pages in either tier: answers do not change from the second call on."""
    model, ids, store = build_model("llama"), random_tokens(1, 200), make()
    options: dict[str, Any] = dict(budget=24, gpu_memory=200_000, store=store, **SMALL_ZONES)
    found = []
    for _ in range(3):
        cache = SpinCache(model, method, **options)
        found.append(answer(model, ids, cache).sequences)
        cache.check_integrity()
    assert torch.equal(found[1], found[2])
    assert store.stats().hits == 2


def test_a_chat_that_grows(make: Maker) -> None:
    """Each turn reads what is new; entries that a longer one begins with are dropped."""
    model, store = build_model("llama"), make()
    ids = random_tokens(1, 60)
    with tokens_read(model) as read, enable(model, budget=1 << 20, store=store):
        for turn in range(4):
            ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
            ids = torch.cat([ids, random_tokens(1, 30, seed=turn)], 1)
    assert read == [60, 35, 35, 35]
    assert store.stats().entries == 1


def test_a_prompt_with_few_new_tokens_is_not_stored() -> None:
    """In memory, an entry that holds all of it but a block serves it as well."""
    model, document, store = build_model("llama"), random_tokens(1, 60), PromptStore(block_tokens=BLOCK)
    answer(model, document, SpinCache(model, budget=1 << 20, store=store))
    for new in (BLOCK, 1, BLOCK + 1):  # the last one replaces the document
        ids = torch.cat([document, random_tokens(1, new, seed=new)], 1)
        assert_fresh(model, ids, SpinCache(model, budget=1 << 20, store=store))
        assert store.stats().entries == 1
    (held,) = store._held.values()
    assert len(held.ids) == 60 + BLOCK + 1


def test_an_entry_that_cannot_serve_a_prompt_does_not_keep_it_out() -> None:
    """Of a model with windows, a prompt is served by entries that it holds whole."""
    model, ids, store = build_model("gemma3_text"), random_tokens(1, 60), PromptStore(block_tokens=BLOCK)
    other = torch.cat([ids[:, :57], (ids[:, 57:] + 1) % 50], 1)
    for prompt in (ids, other):
        answer(model, prompt, SpinCache(model, budget=1 << 20, store=store))
    assert store.stats().entries == 2
    assert_fresh(model, torch.cat([other, ids[:, :5]], 1), SpinCache(model, budget=1 << 20, store=store))
    assert store.stats().reused_tokens == 60
    twin = build_model("gemma3_text")  # equal weights; a cache of one model cannot serve the other
    answer(twin, ids, SpinCache(twin, budget=1 << 20, store=store))
    assert len([held for held in store._held.values() if held.model() is twin]) == 1


def test_the_best_of_many_entries_with_the_same_blocks() -> None:
    """Entries that differ within the last block, of which the first one is the best."""
    model, ids, store = build_model("gemma3_text"), random_tokens(1, 60), PromptStore(block_tokens=16)
    prompts = [ids, *(torch.cat([ids[:, :50], random_tokens(1, 9, seed=seed)], 1) for seed in range(1, 9))]
    for prompt in prompts:
        answer(model, prompt, SpinCache(model, budget=1 << 20, store=store))
    assert store.stats().entries == 9
    assert_fresh(model, torch.cat([ids, ids[:, :20]], 1), SpinCache(model, budget=1 << 20, store=store))
    assert store.stats().reused_tokens == 60


def test_a_prompt_is_identified_once(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the look-up found out about prompt and model is used again when the prompt is stored; not for another prompt."""
    model, store, calls = build_model("llama"), make(), [0]
    space_of = prompt_store.space_of

    def counted(*args: Any) -> str:
        calls[0] += 1
        return space_of(*args)

    monkeypatch.setattr(prompt_store, "space_of", counted)
    answer(model, random_tokens(1, 40), SpinCache(model, budget=1 << 20, store=store))
    assert calls == [1]
    assert store.stats().entries == 1
    cache, ids = SpinCache(model, budget=1 << 20, store=store), random_tokens(1, 40, seed=1)
    store.restore(cache, random_tokens(1, 30, seed=2), None)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    store.keep(cache, ids, None)
    assert calls == [3]
    assert store.stats().entries == 2
    assert_fresh(model, ids, SpinCache(model, budget=1 << 20, store=store))
    assert store.stats().reused_tokens == 39


def test_batches(make: Maker) -> None:
    model, store = build_model("llama"), make()
    ids = random_tokens(1, 40)
    answer(model, ids, SpinCache(model, budget=1 << 20, store=store))
    many = torch.cat([ids, random_tokens(1, 5, seed=1)], 1).expand(3, -1)
    assert_fresh(model, many, SpinCache(model, budget=1 << 20, store=store))
    assert store.stats().reused_tokens == 40
    beams = SpinCache(model, budget=1 << 20, store=store)
    assert_fresh(model, many[:1], beams, num_beams=3)
    assert store.stats().reused_tokens == 80
    padded, mask = left_padded([45, 40])
    assert_fresh(model, padded, SpinCache(model, budget=1 << 20, store=store), attention_mask=mask)
    different = torch.cat([many[:1], random_tokens(1, 45, seed=9)])
    assert_fresh(model, different, SpinCache(model, budget=1 << 20, store=store))
    assert store.stats().hits == 2


def test_caps(make: Maker) -> None:
    """The least recently used entries go; one that is larger than the cap is not kept."""
    model, store = build_model("llama"), make()
    one = SpinCache(model, budget=1 << 20, store=store)
    answer(model, random_tokens(1, 40), one)
    size = store.stats().stored_bytes
    store.clear()
    assert store.stats().entries == store.stats().stored_bytes == 0
    in_memory = store.directory is None
    capped = make(**{"max_host_bytes" if in_memory else "max_bytes": int(2.5 * size)})
    for seed in (0, 1, 0, 2):
        answer(model, random_tokens(1, 40, seed=seed), SpinCache(model, budget=1 << 20, store=capped))
    assert capped.stats().stored_bytes <= 2.5 * size
    assert capped.stats().entries == 2
    hits = capped.stats().hits
    for seed, more in ((0, 1), (2, 1), (1, 0)):
        answer(model, random_tokens(1, 40, seed=seed), SpinCache(model, budget=1 << 20, store=capped))
        hits += more
        assert capped.stats().hits == hits
    tiny = make(**{"max_host_bytes" if in_memory else "max_bytes": 100})
    assert_fresh(model, random_tokens(1, 40), SpinCache(model, budget=1 << 20, store=tiny))


def test_entries_outlive_caches_and_are_not_changed_by_them(make: Maker) -> None:
    model, ids, store = build_model("llama"), random_tokens(1, 60), make()
    cache = SpinCache(model, budget=1 << 20, store=store)
    answer(model, ids, cache)
    cache.crop(-40)
    answer(model, torch.cat([ids[:, :25], random_tokens(1, 30, seed=5)], 1), cache)
    del cache
    for question in range(2):
        longer = torch.cat([ids, random_tokens(1, 4, seed=question + 1)], 1)
        assert_fresh(model, longer, SpinCache(model, budget=1 << 20, store=store))
    assert store.stats().reused_tokens >= 120


# ------------------------------------------------------------------------------------------------------------- on disk


_PROGRAM = """
import sys, torch
from spin_hf import PromptStore, SpinCache
from tests.support.zoo import build_model, random_tokens
store = PromptStore(sys.argv[1], block_tokens=8)
model = build_model("llama")
ids = torch.cat([random_tokens(1, 40), random_tokens(1, 5, seed=int(sys.argv[2]))], 1)
cache = SpinCache(model, budget=1 << 20, store=store)
tokens = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=5, do_sample=False)
print(store.stats().reused_tokens, tokens[0, -5:].tolist())
"""


def test_another_process_goes_on(tmp_path: Path) -> None:
    def run(seed: int) -> list[str]:
        made = finished(_PROGRAM, tmp_path / "store", seed)
        assert made.returncode == 0, made.stderr
        return made.stdout.strip().splitlines()[-1].split(" ", 1)

    first, second, again = run(1), run(2), run(1)
    assert [first[0], second[0], again[0]] == ["0", "40", "44"]
    assert first[1] == again[1]
    model = build_model("llama")
    ids = torch.cat([random_tokens(1, 40), random_tokens(1, 5, seed=2)], 1)
    assert second[1] == str(model.generate(ids, max_new_tokens=5, do_sample=False)[0, -5:].tolist())


def test_damaged_entries_are_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, ids, draw = build_model("llama"), random_tokens(1, 40), random.Random(0)
    for trial in range(12):
        store = StoredAtOnce(tmp_path / f"store {trial}", block_tokens=BLOCK)
        answer(model, ids, SpinCache(model, budget=1 << 20, store=store))
        (folder,) = (tmp_path / f"store {trial}" / "entries").iterdir()
        file = draw.choice(sorted(each for each in folder.iterdir() if each.stat().st_size))
        content = bytearray(file.read_bytes())
        if trial % 3 == 0:
            file.unlink()
        elif trial % 3 == 1:
            file.write_bytes(content[: draw.randrange(len(content))])
        else:
            content[draw.randrange(len(content))] ^= 255
            file.write_bytes(content)
        caplog.clear()
        later = StoredAtOnce(tmp_path / f"store {trial}", block_tokens=BLOCK)
        assert_fresh(model, ids, SpinCache(model, budget=1 << 20, store=later))
        if not later.stats().hits:
            assert "is removed" in caplog.text
        assert later.stats().entries == 1, "the prompt is stored again"
        assert_fresh(model, ids, SpinCache(model, budget=1 << 20, store=later))
        assert later.stats().hits


def test_an_entry_that_does_not_fit_a_cache_stays(tmp_path: Path) -> None:
    model, ids, store = build_model("llama"), random_tokens(1, 200), StoredAtOnce(tmp_path, block_tokens=BLOCK)
    answer(model, ids, SpinCache(model, "shadowkv", budget=24, store=store, **SMALL_ZONES))
    small = SpinCache(model, "shadowkv", budget=24, store=store, gpu_memory=1000, cpu_memory=1000, **SMALL_ZONES)
    with pytest.raises((BudgetError, CapacityError)):  # the model cannot read it either
        answer(model, ids, small)
    assert small.get_seq_length() == 0
    assert store.stats().entries == 1
    answer(model, ids, SpinCache(model, "shadowkv", budget=24, store=store, **SMALL_ZONES))
    assert store.stats().hits == 1


@pytest.mark.parametrize("name", ["find", "insert", "touch"])
def test_an_index_that_cannot_be_used_costs_no_answer(
    name: str, make: Maker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids, store = build_model("llama"), random_tokens(1, 40), make()
    if name == "touch":
        answer(model, ids, SpinCache(model, budget=1 << 20, store=store))

    def locked(*_: Any, **__: Any) -> None:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(PrefixIndex, name, locked)
    assert_fresh(model, ids, SpinCache(model, budget=1 << 20, store=store))
    assert "cannot be used: database is locked" in caplog.text


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    store = StoredAtOnce(tmp_path, block_tokens=BLOCK)
    for name, age in (("old.new", 7200), ("young.new", 10)):
        (tmp_path / "entries" / name).mkdir()
        os.utime(tmp_path / "entries" / name, (time.time() - age,) * 2)
    model = build_model("llama")
    answer(model, random_tokens(1, 40), SpinCache(model, store=store))
    gone = PromptStore(tmp_path, block_tokens=BLOCK)
    assert sorted(folder.name for folder in (tmp_path / "entries").iterdir() if "new" in folder.name) == ["young.new"]
    assert gone.stats().entries == 1


def test_an_entry_enters_and_others_leave_in_one_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a process that is killed in between leaves no more than the cap allows."""
    model = build_model("llama")
    first = StoredAtOnce(tmp_path, block_tokens=BLOCK)
    answer(model, random_tokens(1, 40, seed=0), SpinCache(model, store=first))
    size = first.stats().stored_bytes
    capped = StoredAtOnce(tmp_path, block_tokens=BLOCK, max_bytes=int(1.5 * size))
    held = capped.stats()

    def stopped(*_: Any, **__: Any) -> None:
        raise sqlite3.OperationalError("stopped before others leave")

    with monkeypatch.context() as patch:
        patch.setattr(PrefixIndex, "remove_beyond", stopped)
        answer(model, random_tokens(1, 40, seed=1), SpinCache(model, store=capped))
    assert PromptStore(tmp_path, block_tokens=BLOCK).stats() == held
    assert len(list((tmp_path / "entries").iterdir())) == 1
    answer(model, random_tokens(1, 40, seed=1), SpinCache(model, store=capped))
    assert capped.stats().entries == 1


def test_bad_arguments(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x" * 1000)
    for arguments, error, words in (
        (dict(directory=3), OptionTypeError, "expected a path"),
        (dict(directory=file), OptionError, "folder of a PromptStore"),
        (dict(max_host_bytes=None), OptionError, "expected a folder"),
        (dict(directory=tmp_path, max_bytes="many"), OptionError, "max_bytes"),
        (dict(block_tokens=0), OptionError, "block_tokens"),
    ):
        with pytest.raises(error, match=words):
            PromptStore(**arguments)  # type: ignore[arg-type]
    with pytest.raises(OptionTypeError, match="expected a PromptStore"):
        SpinCache(build_model("llama"), store="folder")  # type: ignore[arg-type]
    (tmp_path / "index.sqlite").unlink(missing_ok=True)
    (tmp_path / "index.sqlite").write_text("no database " * 100)
    with pytest.raises(OptionError, match="folder of a PromptStore"):
        PromptStore(tmp_path)
