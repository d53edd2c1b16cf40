"""Tensor-parallel models on two and four processes: the tokens of one process, and of DynamicCache."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.all_modes import MODES
from tests.support.compare import assert_same
from tests.support.memory import SMALL_ZONES
from tests.support.ranks import rank_pool, saved_model
from tests.support.runs import EVERYTHING
from tests.support.subjects import SpinSubject, dense_subject

FAMILIES = ["llama", "qwen3", "olmo2", "phi3", "gemma2", "gpt_oss", "qwen3_moe", "granite"]
"""Olmo2 and Phi3 have all heads on each rank."""
GENERATED = [
    "greedy", "sampling", "beam_search", "return_sequences", "left_padding", "holes", "multi_turn", "chunked_prefill",
    "prompt_lookup", "assisted",
]  # fmt: skip
PAGED: dict[str, Any] = {**EVERYTHING, **SMALL_ZONES, "gpu_memory": 60_000}
"""Options with which two KV heads of a tiny model do not fit the compute tier."""


def compare(size: int, family: str, modes: list[str], options: dict[str, Any] | None, gathers: bool = False) -> None:
    """All ranks have the traces of DynamicCache in one process."""
    found = rank_pool().run(size, "traces", family, saved_model(family), modes, options, gathers)
    for name in modes:
        expected = MODES[name](dense_subject(family))
        for traces in found:
            assert_same(traces[name], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_on_two_ranks(family: str) -> None:
    compare(2, family, ["greedy"], EVERYTHING)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_cache_on_two_ranks(family: str) -> None:
    compare(2, family, ["greedy", "left_padding"], None)


@pytest.mark.sweep(keep=[0, 1, 3, 5, 8])
@pytest.mark.parametrize("mode", GENERATED[1:])
def test_modes_on_two_ranks(mode: str) -> None:
    compare(2, "llama", [mode], EVERYTHING)


@pytest.mark.slow
@pytest.mark.parametrize("mode", sorted(MODES.keys() - {"compiled", "greedy"}))
@pytest.mark.parametrize("family", FAMILIES)
def test_all_modes_of_all_families(family: str, mode: str) -> None:
    if mode in dense_limits(family):
        pytest.skip("transformers cannot do it")
    compare(2, family, [mode], EVERYTHING)


def dense_limits(family: str) -> set[str]:
    from tests.support.families import FAMILIES as ENTRIES

    return set(ENTRIES[family].limits())


@pytest.mark.sweep(keep=[0])
@pytest.mark.parametrize("mode", ["left_padding", "multi_turn", "beam_search", "greedy"])
def test_pages_in_host_memory(mode: str) -> None:
    compare(2, "llama", [mode], {**PAGED, "gpu_memory": 90_000} if mode == "beam_search" else PAGED)


@pytest.mark.sweep(keep=[0])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("fitted", {"cpu_dtype": "int8", "gpu_memory": 60_000}),
        ("shadowkv", {}),
        ("quest", {"gpu_memory": 90_000}),
        ("retroinfer", {}),
        ("bisection", {"cpu_dtype": "int8", "gpu_memory": 60_000}),
    ],
)
def test_what_approximates_is_that_of_one_process(method: str, options: dict[str, Any]) -> None:
    """Heads choose pages by themselves. In one process two heads have twice the memory of one."""
    sparse = {"method": method, "budget": 16, **SMALL_ZONES, **options}
    one = {name: 2 * value if name == "gpu_memory" else value for name, value in sparse.items()}
    modes = ["greedy", "left_padding"]
    found = rank_pool().run(2, "traces", "llama", saved_model("llama"), modes, sparse)
    for name in modes:
        expected = MODES[name](SpinSubject("llama", **one))
        for traces in found:
            assert_same(traces[name], expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmo2", "phi3"])
@pytest.mark.parametrize("options", [EVERYTHING, {**PAGED, "gpu_memory": 180_000}], ids=["resident", "paged"])
def test_four_ranks_with_all_heads_each(family: str, options: dict[str, Any]) -> None:
    compare(4, family, ["greedy", "left_padding", "beam_search"], options)


@pytest.mark.sweep(keep=[0])
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3", "gemma2", "gpt_oss"])
def test_fewer_heads_than_ranks(family: str) -> None:
    """Four ranks, one or two KV heads: a plan gives all heads to each rank."""
    compare(4, family, ["greedy", "left_padding"], EVERYTHING, gathers=True)
