"""Triton compiles the launches of a generation, for GPUs that this machine need not have: the interpreter accepts more code.

Turing is the oldest that PyTorch serves. It has no bfloat16 and, in Triton, no products on tensor cores. Ada has two fifths of
an H100's shared memory, and float32 takes twice as much of it as 16 bits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.compile_for_gpu import SHARED_MEMORY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only")

BEFORE_AMPERE_BY_FORMULAS = {
    "gram_kernel", "axis_kernel", "along_kernel", "halve_kernel", "halve_part_kernel", "halve_all_kernel",
    "encode_pages_kernel", "weigh_blocks_kernel", "list_blocks_kernel", "attend_blocks_kernel",
    "block_addresses_kernel", "attend_resident_blocks_kernel",
}  # fmt: skip
"""Without tensor cores their matrices do not fit the shared memory."""


COMPILED_AHEAD = {
    "gram_kernel", "axis_kernel", "along_kernel", "halve_kernel", "halve_part_kernel", "halve_all_kernel",
    "plan_step_kernel", "find_outliers_kernel", "score_kernel", "rate_kernel", "rerank_kernel", "rate_rerank_kernel",
    "choose_kernel", "rank_kernel", "estimate_kernel", "attend_kernel", "attend_segments_kernel", "project_kernel",
    "scan_kernel", "encode_last_unit_kernel",
}  # fmt: skip
"""What a step launches behind its tokens' keys, and what parts tokens."""


def compiled_for(capability: int, dtype: str, folder: Path, *more: str) -> dict[str, Any]:
    """What `absent_gpu` reports, from a process that compiles: nothing is taken from a cache."""
    report = folder / "report.json"
    settings = {"TRITON_CACHE_DIR": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_for_gpu", str(capability), dtype, str(report), *more],
        cwd=Path(__file__).parents[2], env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | settings,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    read: dict[str, Any] = json.loads(report.read_text())
    return read


GPUS = [(90, "bfloat16"), (89, "float32"), (75, "float16")]


@pytest.mark.parametrize(
    ("capability", "dtype", "every"),
    [(90, "bfloat16", False), *(pytest.param(*gpu, True, marks=pytest.mark.slow) for gpu in GPUS)],
)
def test_kernels_compile_and_fit(capability: int, dtype: str, every: bool, tmp_path: Path) -> None:
    """Every kernel, in one of the variants that are launched or in every one."""
    report = compiled_for(capability, dtype, tmp_path, *["every"] * every)
    assert report["failed"] == []
    kernels, functions, called = (set(report[names]) for names in ("kernels", "functions", "called"))
    assert len(functions) == len(report["functions"]), "names tell functions apart"
    assert kernels, "the process compiles"
    assert functions - called == kernels, "what no other function calls is launched, and is named so"
    variants = Counter(variant["name"] for variant in report["compiled"])
    assert set(variants) == (kernels if capability >= 80 else kernels - BEFORE_AMPERE_BY_FORMULAS)
    binaries = Counter(file.stem for file in (tmp_path / "cache").rglob("*.cubin"))
    assert binaries == variants
    assert all(variant["built"] for variant in report["compiled"] if variant["ahead"]), "with what launches it"
    late = {variant["name"] for variant in report["compiled"] if not variant["ahead"]}
    assert not late & COMPILED_AHEAD, "these are compiled several at a time, before the first of them is launched"
    limit = SHARED_MEMORY[capability]
    assert {v["name"]: v["shared"] for v in report["compiled"] if v["shared"] > limit} == {}


OF_ROWS = {
    "plan_step_kernel", "find_outliers_kernel", "score_kernel", "rate_kernel", "rerank_kernel", "rate_rerank_kernel",
    "choose_kernel", "rank_kernel", "estimate_kernel", "attend_kernel", "attend_segments_kernel", "project_kernel",
    "scan_kernel", "encode_last_unit_kernel", "copy_page_kernel",
}  # fmt: skip
"""Kernels that steps of rows launch."""


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), [(90, "bfloat16"), (75, "float16")])
def test_kernels_of_rows_compile_and_fit(capability: int, dtype: str, tmp_path: Path) -> None:
    report = compiled_for(capability, dtype, tmp_path, "rows")
    assert report["failed"] == []
    assert {variant["name"] for variant in report["compiled"]} >= OF_ROWS
    limit = SHARED_MEMORY[capability]
    assert {v["name"]: v["shared"] for v in report["compiled"] if v["shared"] > limit} == {}


def test_numbers_that_mean_everything_launch_the_same_kernels(tmp_path: Path) -> None:
    """Budget, window and factor of 2 ** 31 and more: an int beyond 32 bits would be another variant, or none that compiles."""
    report = compiled_for(90, "bfloat16", tmp_path, "numbers")
    assert report["failed"] == []
    assert {variant["name"] for variant in report["compiled"]} == {
        "plan_step_kernel", "rerank_kernel", "rate_rerank_kernel",
    }  # fmt: skip
    first, wide, *others = report["launches"]
    assert len(others) == 6
    for launches, expected in zip(others, [first, wide] * 3, strict=True):
        assert launches == expected


def test_steps_behind_a_prompt_are_compiled_while_it_is_read(tmp_path: Path) -> None:
    """In the variants that are launched: what clusters and summarises the prompt, steps, the summary of a completed page.

    And what the second chunk of a prompt does about the first.
    """
    fitted, bisection, dense, chunks = compiled_for(90, "bfloat16", tmp_path, "early")["launches"]
    assert (fitted, bisection, dense, chunks) == ([], [], [], [])
