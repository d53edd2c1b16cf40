"""Kernels that other processes compile are found in triton's cache. Whatever goes wrong there, this process compiles them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from spin_hf.kernels import compile_ahead, compile_process
from spin_hf.kernels.compile_process import CompilerProcesses, Job

ROOT = Path(__file__).parents[2]
KERNELS = {"gather_tokens_kernel", "merge_partials_kernel"}


def printed(*arguments: str, folder: Path) -> Any:
    """What `compile_by_processes` prints, with an empty cache of kernels."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_by_processes", *arguments], cwd=ROOT, text=True, capture_output=True,
        env=env | {"TRITON_CACHE_DIR": str(folder)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_processes_compile_is_found(tmp_path: Path) -> None:
    """In an empty cache, so only a process can have put it there. None is left afterwards."""
    first = printed("compile", folder=tmp_path)
    every = dict.fromkeys(KERNELS, True)
    assert first == {"found": every, "asked": every, "jobs": 0, "idle": 0}
    assert printed("compile", folder=tmp_path) == {"found": every, "asked": {}, "jobs": 0, "idle": 0}


def test_processes_that_end_leave_it_to_this_one(tmp_path: Path) -> None:
    none = dict.fromkeys(KERNELS, False)
    assert printed("broken", folder=tmp_path) == {"found": none, "asked": none, "jobs": 0, "idle": 0}


def test_kernels_that_are_needed_soon_are_compiled_here(tmp_path: Path) -> None:
    """Processes take longer to start than these take to compile, and end with them."""
    none = dict.fromkeys(KERNELS, False)
    assert printed("soon", folder=tmp_path) == {"found": none, "asked": none, "jobs": 0, "idle": 0}


def test_keys_do_not_depend_on_what_was_compiled_before(tmp_path: Path) -> None:
    first, *others = printed("keys", folder=tmp_path)
    assert others == [first] * 2


def test_few_cores_compile_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, processes in ((1, 0), (7, 0), (8, 4), (16, 8), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)), raising=False)
        assert compile_process.most_processes() == processes
    monkeypatch.setattr(sys, "executable", "")
    assert compile_process.most_processes() == 0


class Process:
    """A process that answers. It is ready when it was asked, or when the test says so."""

    made: list[Process]

    def __init__(self) -> None:
        self.jobs, self.ended, self.ready = 0, False, False
        self.made.append(self)

    def is_ready(self) -> bool:
        return self.ready

    def ask(self, job: Any) -> bool:
        self.jobs, self.ready = self.jobs + 1, True
        if job == "broken":
            raise EOFError
        return bool(job == "good")

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    """Processes that are made, in order. Jobs named "broken" end theirs."""
    made = list[Process]()
    monkeypatch.setattr(Process, "made", made, raising=False)
    monkeypatch.setattr(compile_process, "Compiler", Process)
    return made


def expecting(number: int) -> Any:
    """Processes to which so many jobs are announced."""
    processes = CompilerProcesses()
    for _ in range(number):
        processes.expect()
    return processes


def test_a_process_serves_one_job_after_the_other_and_ends_with_the_last(fake: list[Process]) -> None:
    processes = expecting(3)
    for job, done in (("good", True), ("bad", False), ("good", True)):
        assert not any(each.ended for each in fake)
        assert processes.compile(job) is done
        processes.ended()
    assert [(each.jobs, each.ended) for each in fake] == [(3, True)]


def test_a_process_that_breaks_is_replaced(fake: list[Process]) -> None:
    processes = expecting(2)
    for job, done in (("broken", False), ("good", True)):
        assert processes.compile(job) is done
        processes.ended()
    assert [(each.jobs, each.ended) for each in fake] == [(1, True), (1, True)]


def test_a_job_that_is_needed_soon_does_not_wait_for_a_process_to_start(fake: list[Process]) -> None:
    """The process is kept while there are jobs, and taken once it is ready."""
    processes = expecting(1)
    assert not processes.compile("good", waits=False)
    assert [(each.jobs, each.ended) for each in fake] == [(0, False)]
    processes.expect()  # the first job has not ended: its thread does it
    processes.ended()
    fake[0].ready = True
    assert processes.compile("good", waits=False)
    processes.ended()
    assert [(each.jobs, each.ended) for each in fake] == [(1, True)]


def test_a_process_that_is_ready_is_taken_first(fake: list[Process]) -> None:
    processes = expecting(3)
    processes._idle = [Process(), Process(), Process()]
    fake[1].ready = True
    assert processes.compile("good", waits=False)
    assert [each.jobs for each in fake] == [0, 1, 0]


def test_a_process_that_cannot_start_leaves_it_to_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoMemory(Process):
        def __init__(self) -> None:
            raise OSError("no memory for it")

    monkeypatch.setattr(compile_process, "Compiler", NoMemory)
    processes = expecting(1)
    assert not processes.compile("good")
    processes.ended()
    assert (processes._jobs, processes._busy, processes._idle) == (0, 0, [])


def test_only_kernels_of_the_package_are_compiled_elsewhere() -> None:
    """A function that is not triton's has no job."""
    assert compile_process.job_of("key", lambda: None) is None


def test_a_launch_waits_for_a_kernel_that_is_being_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be compiled twice. Nothing is asked while nothing is compiled."""
    asked, launched = list[Any](), list[Any]()

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: launched.append((grid, args, options))

    def ahead(launches: Any) -> None:
        launches(lambda kernel, grid, *args, **options: asked.append((grid, args, options)))

    monkeypatch.setattr(compile_ahead, "compile_ahead", ahead)
    compile_ahead.launch_now(Kernel(), (1,), 2, num_warps=4)
    assert not asked
    monkeypatch.setitem(compile_ahead._running, "another", SimpleNamespace())
    compile_ahead.launch_now(Kernel(), (1,), 2, num_warps=4)
    assert asked == [((1,), (2,), {"num_warps": 4})]
    assert launched == asked * 2


def test_a_launch_among_those_that_are_compiled_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method may launch a kernel of its own for what the other launches take, while kernels are compiled."""
    launched = list[Any]()

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args: launched.append((grid, *args))

    monkeypatch.setitem(compile_ahead._running, "another", SimpleNamespace())
    compile_ahead.compile_ahead(lambda launch: compile_ahead.launch_now(Kernel(), (1,), 2))
    assert launched == [((1,), 2)]


def test_jobs_are_sent_as_they_are() -> None:
    import pickle

    job = Job("a", "b", {"x": "i32"}, {(0,): 1}, {(1,): [["tt.divisibility", 16]]}, None, {"num_warps": 4}, {}, "c")
    assert pickle.loads(pickle.dumps(job)) == job


def test_threads_wait_for_processes_side_by_side(fake: list[Process], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two jobs at once take two processes."""
    together, processes = threading.Barrier(2), expecting(2)

    def ask(process: Process, job: Any) -> bool:
        together.wait(10)
        return True

    monkeypatch.setattr(Process, "ask", ask)
    threads = [threading.Thread(target=processes.compile, args=("good",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fake) == 2
    for left in (1, 0):
        processes.ended()
        assert sum(not each.ended for each in fake) == left
