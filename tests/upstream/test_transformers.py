"""transformers' own generation tests with the cache replaced: none fails that does not fail with DynamicCache.

Each file runs in a process of its own, with `tests/support/upstream/swapped.py` as a plugin. `conftest.py` has the command.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(os.environ["SPIN_HF_TRANSFORMERS_TESTS"]).resolve()
ROOT = Path(__file__).parents[2]
FAMILIES = (
    "arcee", "aya_vision", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3", "gemma3n", "gemma4",
    "glm", "glm4", "gpt2", "gpt_neox", "gpt_oss", "granite", "granitemoe", "helium", "idefics3", "internvl", "llama",
    "llama4", "llava", "mistral", "mistral3", "mixtral", "nemotron", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen2_5_vl",
    "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_vl", "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
FILES = {family: TESTS / "models" / family / f"test_modeling_{family}.py" for family in FAMILIES}


@functools.cache
def outcome(family: str, kind: str) -> tuple[frozenset[str], str]:
    """The tests of a family that failed, and what pytest said."""
    path = os.pathsep.join(
        filter(None, [str(ROOT / "tests" / "support" / "upstream"), str(ROOT), os.environ.get("PYTHONPATH")])
    )
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", str(FILES[family]), "-p", "swapped", "-p", "no:cacheprovider", "-p",
            "no:xdist", "-q", "-rf", "--tb=short", "-W", "ignore", f"--rootdir={TESTS.parent}", "-c", os.devnull,
        ],
        cwd=TESTS.parent,
        env=os.environ | {"SPIN_HF_UPSTREAM_CACHE": kind, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout[-4000:] + done.stderr[-2000:]
    assert kind == "dynamic" or not re.search("SpinCache was made 0 times", done.stdout), "no cache was swapped in"
    return frozenset(re.findall(r"^FAILED \S*::(\S+)", done.stdout, re.MULTILINE)), done.stdout


NAMES_THE_CLASS = {"test_generate_compile_model_forward_fullgraph"}
"""Tests that assert that the cache is a DynamicCache."""


@pytest.mark.parametrize("kind", ["exact", "tiered", "small"])
@pytest.mark.parametrize("family", [family for family, file in FILES.items() if file.exists()])
def test_nothing_more_fails(family: str, kind: str) -> None:
    ours, said = outcome(family, kind)
    more = ours - outcome(family, "dynamic")[0] - NAMES_THE_CLASS
    assert not more, f"{sorted(more)}\n{said[-6000:]}"
