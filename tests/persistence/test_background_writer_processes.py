"""Processes that end, are killed or fork while prompts are written to the disk."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from spin_hf import PromptStore
from tests.support import fork_server
from tests.support.stores import BLOCK, folders, restored
from tests.support.zoo import random_tokens

_PROGRAM = """
import os, sys, threading, time, torch
from spin_hf import PromptStore, SpinCache
from spin_hf.persistence import background_writer, files, writer
from spin_hf.persistence.background_writer import BackgroundWriter
from spin_hf.persistence.contents import Contents
from spin_hf.persistence.fingerprint import ModelFacts
from spin_hf.persistence.opened import OpenCache
from tests.support.zoo import build_model, random_tokens
torch.set_num_threads(1)
folder, seconds = sys.argv[1], float(sys.argv[2])
written = writer._written
def late(*args):
    done = written(*args)
    print("writes", flush=True)
    time.sleep(seconds)
    return done
writer._written = late
store, model = PromptStore(folder, block_tokens=8), build_model("llama")
def generate(seed):
    ids = random_tokens(1, 60, seed=seed)
    cache = SpinCache(model, budget=1 << 20, store=store)
    model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3, do_sample=False)
generate(0)
generate(1)
"""


def finished(folder: Path, seconds: float, more: str) -> subprocess.CompletedProcess[str]:
    return fork_server.finished(_PROGRAM + more, folder, seconds)


@pytest.mark.parametrize(("end", "code"), [("", 0), ("sys.exit(3)", 3), ("1 / 0", 1), ("del store, model", 0)])
def test_the_exit_waits(end: str, code: int, tmp_path: Path) -> None:
    made = finished(tmp_path, 0.0, end)
    assert made.returncode == code
    assert "the process ends once" not in made.stderr
    assert [restored(tmp_path, random_tokens(1, 60, seed=seed)) for seed in (0, 1)] == [59, 59]


def test_an_exit_that_waits_long_says_so(tmp_path: Path) -> None:
    made = finished(tmp_path, 1.5, "")
    assert made.returncode == 0
    assert f"the process ends once its prompts are stored in {tmp_path}, 2 to go" in made.stderr
    assert [restored(tmp_path, random_tokens(1, 60, seed=seed)) for seed in (0, 1)] == [59, 59]


@pytest.mark.parametrize("stuck", ["the thread", "a saving thread"])
def test_an_exit_waits_for_a_bounded_time(stuck: str, tmp_path: Path) -> None:
    """The disk does not answer any more. The process says so and ends, with its own exit code."""
    more = "background_writer._MOST_EXIT_S, background_writer._MOST_STOP_S = 3.0, 1.0\n"
    if stuck == "a saving thread":
        more += "writer.files.os.fsync = lambda descriptor: time.sleep(3600)\ngenerate(5)\n"
    began = time.monotonic()
    made = finished(tmp_path, 3600.0 if stuck == "the thread" else 0.0, more + "sys.exit(7)")
    assert made.returncode == 7, made.stderr
    assert time.monotonic() - began < 120
    assert re.search(r"the process ends once its prompts are stored in .*, \d to go, or in \d s; Ctrl-C", made.stderr)
    assert re.search(r"\d prompts are not stored in .*: the process ends", made.stderr)
    assert "Traceback" not in made.stderr


def test_an_exit_without_threads(tmp_path: Path) -> None:
    """From Python 3.12 on no thread can be started while the interpreter exits."""
    more = """
import atexit
def none(self):
    raise RuntimeError("can't create new thread at interpreter shutdown")
def end():
    threading.Thread.start = none
atexit.register(end)
"""
    made = finished(tmp_path, 0.5, more)
    assert made.returncode == 0, made.stderr
    assert "could not be stored" not in made.stderr
    assert [restored(tmp_path, random_tokens(1, 60, seed=seed)) for seed in (0, 1)] == [59, 59]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c at exit"])
def test_killed_while_a_prompt_is_written(number: signal.Signals, tmp_path: Path) -> None:
    """What is unfinished is in no index and is swept an hour later."""
    process = fork_server.started(_PROGRAM, tmp_path, 3600.0)
    timer = threading.Timer(120, process.kill)
    timer.daemon = True
    timer.start()
    assert process.stdout.readline() == "writes\n"
    if number == signal.SIGINT:
        assert "the process ends once" in process.stderr.readline()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 0
        assert "2 prompts are not stored in" in errors
        assert "Traceback" not in errors
    store = PromptStore(tmp_path, block_tokens=BLOCK)
    assert store.stats().entries == 0
    (left,) = folders(tmp_path)
    assert left.endswith(".new")
    os.utime(tmp_path / "entries" / left, (time.time() - 7200,) * 2)
    assert restored(tmp_path, random_tokens(1, 60)) == 0
    assert left not in folders(tmp_path)
    assert restored(tmp_path, random_tokens(1, 60)) == 59


_HELD = {
    "locks": "store._lock, store._writer._changed",
    "a change of the index": "_change(store._disk.index)",
    "locks of the package, while a fork is released": "background_writer._not_forking, forward_hook._lock",
}
"""What a thread of the parent holds while the process forks."""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize(("end", "held"), [("os._exit(0)", held) for held in _HELD] + [("sys.exit(0)", "locks")])
def test_a_forked_child(end: str, held: str, tmp_path: Path) -> None:
    """It waits for nothing of the parent's, and stores prompts of its own."""
    more = f"""
from spin_hf.integration import forward_hook
from spin_hf.persistence.prefix_index import _change
held = threading.Event()
def hold():
    with {_HELD[held]}:
        held.set()
        time.sleep(1)
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if not child:
    import signal
    signal.alarm(60)
    assert store.wait(0)
    assert store.stats().entries == 0
    began = time.monotonic()
    generate(2)
    assert time.monotonic() - began < 20
    store._writer._thread.join()
    {end}
assert os.waitpid(child, 0)[1] == 0, "the child"
"""
    made = finished(tmp_path, 2.0, more)
    assert made.returncode == 0, made.stderr
    assert "cannot be used" not in made.stderr
    assert [restored(tmp_path, random_tokens(1, 60, seed=seed)) for seed in (0, 1, 2)] == [59, 59, 59]


@pytest.mark.parametrize("begin", ["", "store.wait()"], ids=["the parent writes too", "the parent has written"])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_worker_of_multiprocessing(begin: str, tmp_path: Path) -> None:
    """It ends by `os._exit`, and runs no handlers of `atexit`."""
    more = f"""
import multiprocessing
{begin}
worker = multiprocessing.get_context("fork").Process(target=generate, args=(2,))
worker.start()
worker.join()
assert worker.exitcode == 0
"""
    made = finished(tmp_path, 0.5, more)
    assert made.returncode == 0, made.stderr
    assert [restored(tmp_path, random_tokens(1, 60, seed=seed)) for seed in (0, 1, 2)] == [59, 59, 59]
