"""Several processes with one PromptStore folder, some of them killed: no entry is torn, and the cap is kept."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from spin_hf import PromptStore, SpinCache
from tests.support.fork_server import started
from tests.support.zoo import build_model, random_tokens

MAX_BYTES = 400_000
_PROGRAM = """
import random, sys, time, torch
from spin_hf import PromptStore, SpinCache
from tests.support.zoo import build_model, random_tokens
folder, number, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
store, model, draw = PromptStore(folder, max_bytes=400_000, block_tokens=8), build_model("llama"), random.Random(number)
print("ready", flush=True)
stop = time.monotonic() + seconds
while time.monotonic() < stop:
    ids = torch.cat([random_tokens(1, 40, seed=draw.randrange(6)), random_tokens(1, 30, seed=draw.randrange(6))], 1)
    cache = SpinCache(model, budget=1 << 20, store=store)
    ours = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=1, do_sample=False)
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    assert torch.equal(ours, theirs), "another answer than without the store"
print(store.stats().hits, flush=True)
"""


def assert_sound(folder: Path) -> int:
    """Every entry can be restored, and together they keep the cap. Returns their number."""
    store = PromptStore(folder, max_bytes=MAX_BYTES, block_tokens=8)
    stats, model = store.stats(), build_model("llama")
    assert stats.stored_bytes <= MAX_BYTES
    whole = [entry for entry in (folder / "entries").iterdir() if not entry.name.endswith(".new")]
    indexed = 0
    for entry in whole:
        try:
            cache = SpinCache.from_pretrained(entry, model)
        except Exception:
            # Renamed and not in the index yet when its process was killed, or leaving: then it is not in the index.
            continue
        cache.check_integrity()
        indexed += 1
    assert indexed >= stats.entries > 0
    return stats.entries


@pytest.mark.parametrize(("processes", "seconds"), [(2, 2.0), pytest.param(8, 30.0, marks=pytest.mark.slow)])
def test_at_once(processes: int, seconds: float, tmp_path: Path) -> None:
    running = [started(_PROGRAM, tmp_path, number, seconds) for number in range(processes)]
    printed = [process.communicate(timeout=600) for process in running]
    assert [process.returncode for process in running] == [0] * processes, [errors for _, errors in printed]
    assert not any("is removed" in errors for _, errors in printed), "an entry was torn"
    assert sum(int(out.split()[-1]) for out, _ in printed) > 0
    assert_sound(tmp_path)


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed(kills: int, tmp_path: Path) -> None:
    """At drawn moments, mostly while something is stored, as that takes most of the time."""
    draw = random.Random(0)
    for kill in range(kills):
        process = started(_PROGRAM, tmp_path, kill, 3600.0)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5 + draw.random())
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert_sound(tmp_path)
    ids = torch.cat([random_tokens(1, 40, seed=0), random_tokens(1, 30, seed=0)], 1)
    model, store = build_model("llama"), PromptStore(tmp_path, max_bytes=MAX_BYTES, block_tokens=8)
    cache = SpinCache(model, budget=1 << 20, store=store)
    ours = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3, do_sample=False
    )
    assert torch.equal(ours, model.generate(ids, max_new_tokens=3, do_sample=False))
