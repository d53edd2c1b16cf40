"""PEFT adapters under decode steps that are CUDA graphs: exact, captured, and never a stale one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from spin_hf import SpinCache, enable
from tests.support.zoo import random_tokens

pytest.importorskip("peft")

from tests.support.adapters import CHANGES, PROMPT, adapted_model, saved_adapter, steps_around_changes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT says what merging does
]

FULL: dict[str, Any] = {"method": "shadowkv", "budget": 1 << 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_adapter(tmp_path_factory.mktemp("adapter"))


def _graphs(cache: SpinCache) -> int:
    return sum(step is not None for step in cache.calls.steps.captured.values())


def _close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((actual - expected).abs().max() / expected.abs().max()) < 1e-4


def _generate(model: Any, **options: Any) -> Any:
    inputs = random_tokens(2, PROMPT, 3).cuda()
    return model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=20, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("given", ["peft model", "base model"])
@pytest.mark.parametrize("caller", ["peft model", "base model"])
def test_generate(given: str, caller: str) -> None:
    model = adapted_model().cuda()
    expected = _generate(model, past_key_values=DynamicCache(config=model.config))
    subjects = {"peft model": model, "base model": model.get_base_model()}
    cache = SpinCache(subjects[given], **FULL)
    actual = _generate(subjects[caller], past_key_values=cache)
    assert torch.equal(actual.sequences, expected.sequences)
    assert _close(torch.stack(actual.logits), torch.stack(expected.logits))
    assert _graphs(cache) == 1, cache.calls.steps.refused
    cache.check_integrity()


@pytest.mark.parametrize("name", CHANGES)
def test_no_stale_step_is_replayed(name: str, folder: Path) -> None:
    model, twin = adapted_model().cuda(), adapted_model().cuda()
    expected = steps_around_changes(twin, DynamicCache(config=twin.config), CHANGES[name], folder, lambda: None)
    cache, graphs = SpinCache(model, **FULL), []
    actual = steps_around_changes(model, cache, CHANGES[name], folder, lambda: graphs.append(_graphs(cache)))
    assert _close(actual, expected)
    assert graphs[0] == 1, cache.calls.steps.refused
    assert graphs[2] >= (name != "hooked"), cache.calls.steps.refused  # of a hook that is gone the watch need not hear
    cache.check_integrity()


def test_between_two_generations(folder: Path) -> None:
    """`enable` makes a cache for each; the adapter of a `with` block is that of the calls inside."""
    model, twin = adapted_model().cuda(), adapted_model().cuda()
    with enable(model.get_base_model(), **FULL):
        ours = [_generate(model)]
        with model.disable_adapter():
            ours.append(_generate(model))
        model.set_adapter("other")
        ours.append(_generate(model))
    theirs = [_generate(twin)]
    with twin.disable_adapter():
        theirs.append(_generate(twin))
    twin.set_adapter("other")
    theirs.append(_generate(twin))
    for actual, expected in zip(ours, theirs, strict=True):
        assert torch.equal(actual.sequences, expected.sequences)
        assert _close(torch.stack(actual.logits), torch.stack(expected.logits))
    assert not torch.equal(ours[0].sequences, ours[1].sequences)


@torch.no_grad()
def test_an_adapter_for_each_sequence() -> None:
    """PEFT chooses them by hooks that live for one call, which are not to be captured."""
    model, twin = adapted_model().cuda(), adapted_model().cuda()
    tokens = random_tokens(2, PROMPT + 8, 3).cuda()
    logits: list[list[torch.Tensor]] = [[], []]
    caches = [SpinCache(model, **FULL), DynamicCache(config=twin.config)]
    for subject, cache, out in zip((model, twin), caches, logits, strict=True):
        subject(tokens[:, :PROMPT], past_key_values=cache)
        for index, token in enumerate(tokens[:, PROMPT:].split(1, 1)):
            names = {"adapter_names": ["other", "__base__"]} if index in (3, 4) else {}
            out.append(subject(token, past_key_values=cache, **names).logits)
            if index == 2 and subject is model:
                assert _graphs(caches[0]) == 1, caches[0].calls.steps.refused
    assert _close(*(torch.cat(each, 1) for each in logits))
    caches[0].check_integrity()
