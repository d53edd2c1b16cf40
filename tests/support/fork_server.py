"""Processes that need not import torch and transformers, which takes seconds: they are forked from one that has done so.

    test  --fork_server-->  server: has imported torch and transformers, and waits
            program           |  os.fork()
            pipes             v
                           child: runs the program as `python -c` does, to the end of its interpreter

spin_hf is imported by the program itself. A `Program` is used as a `subprocess.Popen` with pipes. `context` is the same for
functions: processes of `multiprocessing`.
"""

from __future__ import annotations

import atexit
import functools
import json
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = ["torch.distributed", "transformers.models.llama.modeling_llama", "transformers.generation.utils"]
_SERVER = """
import json, os, socket, struct, sys, torch
torch.set_num_threads(1)
requests = socket.socket(fileno=int(sys.argv[1]))
while True:
    head, pipes, _, _ = socket.recv_fds(requests, 8, 2)
    if not head:
        os._exit(0)
    (size,) = struct.unpack("q", head)
    if size < 0:
        _, status = os.waitpid(-size, 0)
        requests.sendall(struct.pack("q", os.waitstatus_to_exitcode(status)))
        continue
    request = requests.recv(size, socket.MSG_WAITALL)
    child = os.fork()
    if not child:
        break
    for pipe in pipes:
        os.close(pipe)
    requests.sendall(struct.pack("q", child))
requests.close()
for pipe, place in zip(pipes, (1, 2)):
    os.dup2(pipe, place)
    os.close(pipe)
program, sys.argv[1:] = json.loads(request)
del head, pipes, requests, request, child, size, pipe, place
exec(compile(program, "<string>", "exec"))
"""


class Program:
    """A running program: its standard output and error, its end."""

    def __init__(self, source: str, arguments: list[str]) -> None:
        self.returncode: int | None = None
        pipes = os.pipe(), os.pipe()
        self.stdout, self.stderr = (os.fdopen(read, encoding="utf-8") for read, _ in pipes)
        self.pid = _server().ask(json.dumps([source, arguments]).encode(), [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 240.0) -> tuple[str, str]:
        """What it has written, once it has ended. It is killed after `timeout` seconds."""
        late = threading.Timer(timeout, self.kill)
        late.daemon = True
        late.start()
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.append(self.stderr.read()))
        reader.start()
        output = self.stdout.read()
        reader.join()
        if self.returncode is None:
            self.returncode = _server().ask(self.pid)
        late.cancel()
        self.stdout.close()
        self.stderr.close()
        return output, errors[0]


class _Server:
    def __init__(self) -> None:
        self.requests, theirs = socket.socketpair()
        program = f"import {', '.join(IMPORTED)}\n{_SERVER}"
        command = [sys.executable, "-W", "ignore", "-c", program, str(theirs.fileno())]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()
        atexit.register(self.close)

    def ask(self, request: bytes | int, pipes: list[int] | None = None) -> int:
        """Start a program, given as bytes: its process. Wait for a process: its exit code."""
        if isinstance(request, int):
            self.requests.sendall(struct.pack("q", -request))
        else:
            socket.send_fds(self.requests, [struct.pack("q", len(request))], pipes or [])
            self.requests.sendall(request)
        answer = self.requests.recv(8, socket.MSG_WAITALL)
        assert len(answer) == 8, "the server of programs has ended"
        number: int = struct.unpack("q", answer)[0]
        return number

    def close(self) -> None:
        self.requests.close()
        self.process.wait(60)


@functools.cache
def _server() -> _Server:
    return _Server()


@functools.cache
def context() -> Any:
    """`multiprocessing`, for functions instead of programs."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(IMPORTED)
    return made


def started(source: str, *arguments: object) -> Program:
    """Run `source` as `python -W ignore -c` does, in the root of the repository."""
    return Program(source, [str(each) for each in arguments])


def finished(source: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    program = started(source, *arguments)
    output, errors = program.communicate()
    assert program.returncode is not None
    return subprocess.CompletedProcess([], program.returncode, output, errors)
