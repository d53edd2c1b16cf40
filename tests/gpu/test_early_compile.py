"""On a machine without compiled kernels, the main thread compiles none behind a prompt, and a later process none at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.speed.new_machine import in_new_process

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

TOKENS = 30_000
"""More than dense attention is faster for: the first step clusters the prompt, summarises it and selects."""


def test_a_prompt_hides_the_compiler(tmp_path: Path) -> None:
    made = []
    for number in (1, 2):  # the same cache of kernels
        made += in_new_process("qwen3-0.6b", TOKENS, 1, 12, number, str(tmp_path))
    new, again, _ = made
    assert new["compiled_by_other_threads"] > 20, "kernels, and libraries that launch them"
    late = [row for row in new["compiled_by_main_thread"] if row[2] > new["first_token_s"]]
    assert late == []
    assert (again["compiled_by_main_thread"], again["compiled_by_other_threads"]) == ([], 0)
