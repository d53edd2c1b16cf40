"""SeerAttention against the oracle: gates on keys before RoPE, with padding, groups, several queries, paging and crops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from spin_hf import AttentionError, OptionError, OptionTypeError, SeerAttention, SpinCache
from spin_hf.attention.methods.seer_gate_file import load_gates
from spin_hf.attention.methods.seer_gates import Gates, LayerGate, describe
from tests.support.cache_driver import CacheDriver, RandomKV, Shape, poisoned_memory
from tests.support.conversation import compare_with_oracle, random_pages, single_steps, without_near_ties
from tests.support.seer_gates import RULES, compare_above, gates_for, method_of, rules_for
from tests.support.zoo import build_model


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("prompt", [1, 31, 32, 33, 280])
def test_choice(prompt: int, group: int, tmp_path: Path) -> None:
    shape = Shape(layers=2, kv_heads=2, group=group)
    rules = rules_for(shape, tmp_path)

    def run(seed: int) -> None:
        steps = single_steps(prompt, prompt + 6)
        driver = compare_with_oracle(
            random_pages(shape, 2, prompt + 6, seed), rules, steps, method=method_of(rules, tmp_path)
        )
        assert prompt < 280 or driver.cache.stats().attended_tokens < 150  # else nothing was left out

    without_near_ties(run)


@pytest.mark.parametrize(
    "options",
    [dict(interleaved=True), dict(turned=2), dict(turned=2, interleaved=True), dict(turned=0), dict(page_size=64)],
)
def test_rotations_and_page_sizes(options: dict[str, Any], tmp_path: Path) -> None:
    rules = rules_for(Shape(), tmp_path, **options)

    def run(seed: int) -> None:
        compare_with_oracle(
            random_pages(Shape(), 1, 410, seed), rules, single_steps(400, 410), method=method_of(rules, tmp_path)
        )

    without_near_ties(run)


def test_padding_left_and_in_the_middle_several_queries_and_a_share(tmp_path: Path) -> None:
    shape = Shape(kv_heads=1)
    base = rules_for(shape, tmp_path)

    def run(seed: int) -> None:
        valid = torch.ones((3, 300), dtype=torch.bool)
        valid[0, 33:90], valid[1, ::3], valid[2, :41] = False, False, False
        valid[1, 260:] = True
        for rules in (base, replace(base, budget=0.3)):
            kv = random_pages(shape, 3, 300, seed)
            steps = [(stop, valid[:, :stop]) for stop in (270, 271, 277, 300)]
            compare_with_oracle(kv, rules, steps, method=method_of(rules, tmp_path))

    without_near_ties(run)


def test_page_by_page_is_as_all_at_once(tmp_path: Path) -> None:
    """Pages that decoding fills are summarised like those of a prompt, from the first token on."""
    rules = rules_for(Shape(), tmp_path, replace(RULES, budget=32))

    def run(seed: int) -> None:
        compare_with_oracle(
            random_pages(Shape(), 1, 140, seed), rules, single_steps(0, 140), method=method_of(rules, tmp_path)
        )

    without_near_ties(run)


def test_paged(tmp_path: Path) -> None:
    rules = rules_for(Shape(kv_heads=1), tmp_path)

    def run(seed: int) -> None:
        kv = random_pages(Shape(kv_heads=1), 2, 420, seed)
        driver = compare_with_oracle(
            kv, rules, single_steps(400, 420), method=method_of(rules, tmp_path), gpu_memory=40_000
        )
        assert driver.cache.stats().evictions > 0

    without_near_ties(run)


@pytest.mark.parametrize("threshold", [0.02, 0.2])
def test_threshold(threshold: float, tmp_path: Path) -> None:
    compare_above(threshold, 410, tmp_path)


def test_crop_and_append_again(tmp_path: Path) -> None:
    """Other tokens were there for a while and indexed; with padding, so that positions are rolled back too."""
    shape = Shape(layers=2)
    method = method_of(rules_for(shape, tmp_path), tmp_path)
    kv, other = random_pages(shape, 2, 300, 0), random_pages(shape, 2, 300, 1)
    valid = torch.ones((2, 300), dtype=torch.bool)
    valid[0, :45], valid[1, 70:80] = False, False
    holes = valid.clone()
    holes[:, 205:215] = False
    options: dict[str, Any] = dict(method=method, budget=64, num_sink_tokens=4, recent_window=10)

    def rest(driver: CacheDriver) -> Tensor:
        outputs = [driver.step(kv, at, at + 1, valid[:, : at + 1])[-1] for at in range(200, 300)]
        driver.cache.check_integrity()
        return torch.cat(outputs, 1)

    straight, cropped = CacheDriver(shape, **options), CacheDriver(shape, **options)
    straight.step(kv, 0, 200, valid[:, :200])
    cropped.step(kv, 0, 200, valid[:, :200])
    cropped.step(other, 200, 260, holes[:, :260])
    cropped.cache.crop(-60)
    assert float((rest(cropped) - rest(straight)).abs().max()) <= 2e-6


def test_a_cache_that_was_reset(tmp_path: Path) -> None:
    """The next batch has positions of its own, with padding where the first had none."""
    shape = Shape(kv_heads=1)
    kv = random_pages(shape, 2, 120, 0)
    valid = torch.ones((2, 120), dtype=torch.bool)
    valid[0, :21] = False
    options: dict[str, Any] = dict(method=method_of(rules_for(shape, tmp_path), tmp_path), budget=32, recent_window=10)
    used, fresh = CacheDriver(shape, **options), CacheDriver(shape, **options)
    used.step(kv, 0, 100)
    used.cache.reset()
    for start, stop in ((0, 110), (110, 111), (111, 120)):
        ours, theirs = (driver.step(kv, start, stop, valid[:, :stop])[0] for driver in (used, fresh))
        assert torch.equal(ours, theirs)


def test_positions_stay_when_tokens_before_become_padding(tmp_path: Path) -> None:
    """The keys were rotated when they came: a mask that changes later does not change what undoes that."""
    shape = Shape(kv_heads=1, group=1)
    seer = rules_for(shape, tmp_path).seer
    assert seer is not None
    kv = random_pages(shape, 1, 128, 0)
    driver = CacheDriver(shape, method=SeerAttention(tmp_path), budget=64, recent_window=10)
    driver.step(kv, 0, 127)
    mask = torch.ones((1, 128), dtype=torch.bool)
    mask[0, 5:20] = False
    driver.step(kv, 127, 128, mask)
    driver.cache.check_integrity()
    held = driver.cache.paged_layers[0].store.summary("gate_key")[0, 0, 1]  # tokens 32 to 63, all of them real

    whole = CacheDriver(shape, method=SeerAttention(tmp_path), budget=64, recent_window=10)
    whole.step(kv, 0, 128)
    whole.cache.check_integrity()  # a prompt's pages are summarised by whoever looks next
    assert torch.allclose(held, whole.cache.paged_layers[0].store.summary("gate_key")[0, 0, 1], atol=1e-5)
    counted = CacheDriver(shape, method=SeerAttention(tmp_path), budget=64, recent_window=10)
    counted.step(kv, 0, 128, mask)
    counted.cache.check_integrity()
    assert not torch.allclose(held, counted.cache.paged_layers[0].store.summary("gate_key")[0, 0, 1], atol=1e-2)


# ------------------------------------------------------------------------------------------------------------ with models


def padded_batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 128, (2, 150), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_a_budget_of_everything_is_exact(family: str, tmp_path: Path) -> None:
    model = build_model(family)
    method = gates_for(model, tmp_path)
    arguments = dict(**padded_batch(), max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = model.generate(**arguments, past_key_values=DynamicCache(config=model.config))
    for given in (method, replace(method, threshold=0.9)):
        cache = SpinCache(model, given, budget=150)  # fewer than the tokens, and all the pages that can be chosen
        assert torch.equal(model.generate(**arguments, past_key_values=cache), expected)
        assert cache.stats().sparse_queries
        cache.check_integrity()


def test_positions_of_a_padded_batch_are_those_of_generate(tmp_path: Path) -> None:
    """A padded row's gate keys are those of the row by itself, where pages begin at the same token."""
    model = build_model("llama")
    method = gates_for(model, tmp_path)
    batch = padded_batch()
    batch["attention_mask"][0, :64] = batch["attention_mask"][0, :64] * 0  # two pages of padding
    batch["input_ids"][0, :64] = 0
    caches = [SpinCache(model, method, budget=32, recent_window=8) for _ in range(2)]
    arguments = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    model.generate(**batch, **arguments, past_key_values=caches[0])
    model.generate(batch["input_ids"][:1, 64:], **arguments, past_key_values=caches[1])
    for together, alone in zip(caches[0].paged_layers, caches[1].paged_layers, strict=True):
        held, expected = (layer.store.summary("gate_key") for layer in (together, alone))
        assert torch.allclose(held[:1, :, 2:5], expected[:, :, :3], atol=1e-4)
    assert caches[0].stats().attended_tokens < 100
    caches[0].check_integrity()


def test_positions_that_do_not_count_real_tokens_are_refused(tmp_path: Path) -> None:
    """A forward without position ids takes places for positions, padding included; generate does not."""
    model = build_model("llama")
    cache = SpinCache(model, gates_for(model, tmp_path))
    batch = padded_batch()
    with pytest.raises(
        AttentionError, match=r"position ids that count the real tokens.*position_ids=attention_mask.cumsum"
    ):
        model(**batch, past_key_values=cache)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    model(**batch, position_ids=positions, past_key_values=cache)
    step = dict(
        input_ids=torch.full((2, 1), 5),
        attention_mask=torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1),
    )
    with pytest.raises(AttentionError, match="position ids"):
        model(**step, position_ids=torch.full((2, 1), 150), past_key_values=cache)
    model(**step, position_ids=torch.tensor([[113], [150]]), past_key_values=cache)
    assert cache.get_seq_length() == 151
    cache.check_integrity()


# ------------------------------------------------------------------------------------------------------ refusals, the file


def test_without_gates() -> None:
    for method in ("seer", SeerAttention()):
        with pytest.raises(
            OptionError, match=r"expected gates .* got gates=None; make some with `python -m spin_hf.distill"
        ):
            SpinCache(Shape().config(), method)


def test_a_refused_cache_leaves_the_model_alone() -> None:
    config = Shape().config()
    before = config._attn_implementation
    with pytest.raises(OptionError):
        SpinCache(config, "seer")
    assert config._attn_implementation == before


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (dict(gates=3), OptionTypeError, "gates: expected a path, got int"),
        (dict(page_size=True), OptionTypeError, "page_size: expected an int, got bool"),
        (dict(page_size=8), OptionError, "page_size: expected one of .* got 8"),
        (dict(threshold="0.1"), OptionTypeError, "threshold: expected a float, got str; pass threshold=0.005"),
        (dict(threshold=1.0), OptionError, r"threshold: expected a number in \(0, 1\) or None, got 1.0"),
    ],
)
def test_parameters(given: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SeerAttention(**given)


def test_gates_of_another_model(tmp_path: Path) -> None:
    rules_for(Shape(layers=2), tmp_path)
    SpinCache(Shape(layers=2).config(), SeerAttention(tmp_path))
    with pytest.raises(
        OptionError, match=r"a model with num_hidden_layers=3, got gates for num_hidden_layers=2; make some"
    ):
        SpinCache(Shape(layers=3).config(), SeerAttention(tmp_path))
    with pytest.raises(OptionError, match=r"num_key_value_heads=1.* got gates for"):
        SpinCache(Shape(layers=2, kv_heads=1, group=4).config(), SeerAttention(tmp_path))
    with pytest.raises(
        OptionError, match=r"pages of 64 tokens, got gates for 32; pass SeerAttention\(..., page_size=32\)"
    ):
        SpinCache(Shape(layers=2).config(), SeerAttention(tmp_path, page_size=64))
    config = Shape(layers=2).config()
    config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    with pytest.raises(OptionError, match="rope parameters"):
        SpinCache(config, SeerAttention(tmp_path))


def test_files_that_are_no_gates(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"expected a file of gates or a folder with gates\.safetensors, got"):
        load_gates(tmp_path)
    (tmp_path / "gates.safetensors").write_bytes(b"no safetensors file")
    with pytest.raises(OptionError, match="expected a safetensors file"):
        load_gates(tmp_path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(OptionError, match="expected a file of format 'spin_hf seer gates 1', got None"):
        load_gates(tmp_path / "other.safetensors")


def test_the_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    config = Shape(layers=2).config()
    gate = LayerGate(torch.randn(2, 24, 6), torch.randn(2, 2, 8, 6), torch.rand(3), torch.rand(3), True)
    Gates({1: gate}, 64, describe(config)).save(tmp_path / "mine.safetensors")
    loaded = load_gates(tmp_path / "mine.safetensors")
    assert (loaded.page_size, list(loaded.layers), loaded.layers[1].interleaved) == (64, [1], True)
    assert loaded.about == describe(config)
    for name in ("key", "query", "frequencies", "gate_frequencies"):
        assert torch.equal(getattr(loaded.layers[1], name), getattr(gate, name))
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(OptionError, match=r"gates for layers \[0, 1\], got none for \[0\]"):
        SpinCache(config, SeerAttention(tmp_path / "mine.safetensors", page_size=64))


def test_other_files_under_the_same_name_are_read_again(tmp_path: Path) -> None:
    kv = RandomKV.random(Shape(), 1, 100, 0)

    def summary() -> Tensor:
        driver = CacheDriver(Shape(), method=SeerAttention(tmp_path), budget=32)
        driver.step(kv, 0, 100)
        return driver.cache.paged_layers[0].store.summary("gate_key")[:, :, :3]

    rules_for(Shape(), tmp_path, seed=0)
    first = summary()
    rules_for(Shape(), tmp_path, seed=1)
    assert not torch.allclose(first, summary())
