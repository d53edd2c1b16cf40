"""Prompts are written to the disk while the model decodes on a GPU: neither writes nor captures disturb each other."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_hf import PromptStore, SpinCache
from spin_hf.persistence import files
from tests.support.memory import SMALL_ZONES, with_tight_gpu_memory
from tests.support.stores import StoredAtOnce
from tests.support.zoo import build_model, random_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
OPTIONS: dict[str, Any] = {"do_sample": False, "max_new_tokens": 60}


@pytest.fixture(autouse=True)
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    write_all = files.write_all

    def slow(*args: Any) -> None:
        time.sleep(0.01)
        write_all(*args)

    monkeypatch.setattr(files, "write_all", slow)


@pytest.mark.parametrize("tiers", ["one", "two"])
@pytest.mark.parametrize("method", ["bisection", "retroinfer"])
def test_steps_are_captured_meanwhile(
    method: str, tiers: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = build_model("llama").to("cuda", torch.bfloat16), random_tokens(1, 400).cuda()

    def generate(number: int, gpu_memory: Any, store: PromptStore | None) -> Any:
        given = {"budget": 32, "gpu_memory": gpu_memory, **SMALL_ZONES}
        cache = SpinCache(model, method, store=store, **given)
        prompt = (ids + number) % 100
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, **OPTIONS)
        cache.check_integrity()
        return made

    def run(gpu_memory: Any) -> None:
        folder = tmp_path / str(gpu_memory)
        store = PromptStore(folder, block_tokens=8)
        with caplog.at_level(logging.WARNING, "spin_hf"):
            for number in range(3):
                assert torch.equal(generate(number, gpu_memory, store), generate(number, gpu_memory, None))
            assert store.wait(120)
        assert "could not be stored" not in caplog.text
        assert "decodes eagerly" not in caplog.text
        later = StoredAtOnce(folder, block_tokens=8)
        for number in range(3):
            pending, stored = PromptStore(max_host_bytes="1GiB", block_tokens=8), []
            for each in (pending, pending, later):
                stored.append(generate(number, gpu_memory, each))
            assert torch.equal(stored[1], stored[2])
        assert later.stats().reused_tokens == 3 * 399

    run("auto") if tiers == "one" else with_tight_gpu_memory(run)


def test_captures_of_the_user(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In CUDA's strictest mode, in which calls of any thread may end a capture."""
    model, ids = build_model("llama").to("cuda", torch.bfloat16), random_tokens(1, 400).cuda()
    store, numbers = PromptStore(tmp_path, block_tokens=8), torch.zeros(8, device="cuda")
    cache = SpinCache(model, store=store)
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **OPTIONS)
    captured = 0
    while not store.wait(0) or not captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            numbers += 1
            time.sleep(0.005)
        graph.replay()
        captured += 1
    assert int(numbers[0]) == captured
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert store.stats().entries == 1
