"""Processes that run tests of tensor-parallel models together: started once, and used by all tests of a session.

    pool = rank_pool()
    pool.run(2, "traces", "llama", ["greedy"])      `rank_cases.CASES["traces"](...)` on ranks 0 and 1 of 2
      -> what each rank returned, or raises RankError with what it raised

Caches of the ranks are tuned as those of the test's own process are (`tuning.py`): both take the same steps.
Starting torch takes seconds, so the processes stay. Their process group is made anew when another number of ranks is wanted. A
watchdog ends them all if one does not answer: a rank that waits for the others would wait for minutes.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.support import fork_server
from tests.support.tuning import tuned_fields
from tests.support.zoo import PAD_TOKEN_ID, build_model

WATCHDOG_SECONDS = 300.0


@dataclass
class Raised:
    """An error of a rank: its type, text and attributes."""

    kind: str
    text: str
    attributes: dict[str, Any]
    trace: str


class HangError(AssertionError):
    """A rank gave no answer in time."""


class RankPool:
    """Up to four processes.

    Args:
        backend: of the process group.
        device: "cpu", or "cuda" for a GPU for each rank.
    """

    def __init__(self, backend: str = "gloo", device: str = "cpu") -> None:
        self.backend, self.device = backend, device
        self.folder = Path(tempfile.mkdtemp(prefix="spin_hf_ranks_"))
        self.groups = self.size = 0
        self.workers: list[Any] = []
        self.connections: list[Any] = []

    def run(self, size: int, case: str, *arguments: Any, may_raise: bool = False) -> list[Any]:
        """Call a case on `size` ranks.

        Args:
            may_raise: whether an error of a rank is returned as `Raised`; otherwise the test fails with it.
        """
        from tests.support.rank_worker import work

        context = fork_server.context() if self.device == "cpu" else multiprocessing.get_context("spawn")
        while len(self.workers) < size:
            ours, theirs = context.Pipe()
            numbers = len(self.workers), self.backend, self.device
            worker = context.Process(target=work, args=(theirs, *numbers), daemon=True)
            worker.start()
            theirs.close()
            self.workers.append(worker)
            self.connections.append(ours)
        if size != self.size:  # all of them leave the group before
            self.groups, self.size = self.groups + 1, size
        store = str(self.folder / f"store{self.groups}")
        for connection in self.connections[:size]:
            connection.send((size, store, tuned_fields(), case, arguments))
        found = []
        for number, connection in enumerate(self.connections[:size]):
            if not connection.poll(WATCHDOG_SECONDS):
                self.close()
                raise HangError(f"rank {number} of {size} gave no answer to {case}{arguments}")
            try:
                found.append(connection.recv())
            except EOFError as error:
                self.close()
                raise HangError(f"rank {number} of {size} has ended in {case}{arguments}") from error
        errors = [(number, each) for number, each in enumerate(found) if isinstance(each, Raised)]
        if errors and not may_raise:
            number, error = errors[0]
            raise AssertionError(f"rank {number} raised {error.kind}: {error.text}\n{error.trace}")
        return found

    def close(self) -> None:
        """End the processes."""
        workers, self.workers, self.connections, self.size = self.workers, [], [], 0
        for worker in workers:
            worker.kill()


@functools.cache
def rank_pool(backend: str = "gloo", device: str = "cpu") -> RankPool:
    """The pool of this session."""
    pool = RankPool(backend, device)
    atexit.register(pool.close)
    return pool


@functools.cache
def saved_model(family: str) -> str:
    """A folder with the tiny model of a family."""
    return _saved(build_model(family))


@functools.cache
def four_heads(head_dim: int = 8) -> str:
    """A folder with a tiny model of four KV heads. Kernels of `fitted` take heads of 16, and none of 8."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=head_dim, max_position_embeddings=512,
    )  # fmt: skip
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, None, 0
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return _saved(model)


def _saved(model: Any) -> str:
    folder = tempfile.mkdtemp(prefix="spin_hf_model_")
    model.save_pretrained(folder)
    return folder


@functools.cache
def whole_model(folder: str) -> Any:
    """The model of a folder, in this process."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD_TOKEN_ID
    return model
