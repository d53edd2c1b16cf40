"""Numbers of any kind and size, as options, parameters of methods, caps and arguments of `plan`.

Each has the effect of the largest sensible value, or raises an error with expected, actual and remedy.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from spin_hf import Bisection, OptionError, Quest, RetroInfer, SeerAttention, ShadowKV, SpinCache, SpinError, plan
from spin_hf.attention.methods.base import Method
from spin_hf.attention.methods.registry import resolve_method
from spin_hf.config import MOST_BYTES, MOST_TOKENS, SpinOptions, parse_bytes
from spin_hf.kernels.descriptor_fields import Rating
from spin_hf.kernels.recipe import KernelRecipe
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.zoo import build_model

HUGE = [MOST_TOKENS, 2**31 - 1, 2**31, 2**32 + 1, 2**60, 2**63 - 1, 2**63, 2**64 + 1, 10**30, 10**5000]
TOKENS = ("budget", "num_sink_tokens", "recent_window", "dense_below")
METHODS: list[Callable[[], Method]] = [ShadowKV, Bisection, lambda: RetroInfer(0.5), lambda: Quest(0)]

# ------------------------------------------------------------------------------------------------------- what is huge


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("number", HUGE, ids=lambda number: str(number.bit_length()))
def test_tokens_are_cut(name: str, number: int) -> None:
    parsed = SpinOptions.parse(**{"budget": number, name: number})  # type: ignore[arg-type]
    assert getattr(parsed, name) == MOST_TOKENS
    assert f"{name}={MOST_TOKENS}" in repr(parsed)


def outputs(**options: Any) -> Tensor:
    """Of a prompt of 200 tokens and ten steps."""
    shape = Shape(layers=2)
    kv, driver = RandomKV.random(shape, 2, 210, 0), CacheDriver(shape, **options)
    valid = torch.ones((2, 210), dtype=torch.bool)
    valid[0, :13] = False
    steps = [(0, 200), *((start, start + 1) for start in range(200, 210))]
    parts = [driver.step(kv, start, stop, valid[:, :stop]) for start, stop in steps]
    driver.cache.check_integrity()
    return torch.cat([part[-1][:, -1:] for part in parts], 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [2**63])
@pytest.mark.parametrize("name", TOKENS)
def test_huge_numbers_of_tokens_mean_the_whole_context(name: str, number: int, method: Callable[[], Method]) -> None:
    """As 1,000 of 210 tokens do."""
    small = {"budget": 1000} if name == "num_sink_tokens" else {}
    large = {"budget": number} if name == "num_sink_tokens" else {}
    options = {"budget": 16, "recent_window": 8}
    ours = outputs(method=method(), **{**options, **large, name: number})
    assert torch.equal(ours, outputs(method=method(), **{**options, **small, name: 1000}))


@pytest.mark.parametrize("method", ["bisection", "shadowkv", "retroinfer", "quest", "fitted"])
def test_a_huge_budget_is_exact(method: str) -> None:
    model = build_model("llama")
    ids = torch.randint(3, 128, (1, 90), generator=torch.Generator().manual_seed(0))
    arguments: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(ids, **arguments, past_key_values=DynamicCache(config=model.config))
    for options in (dict(budget=2**63), dict(budget=2**31, recent_window=2**63, num_sink_tokens=2**31)):
        cache = SpinCache(model, method, **options)  # type: ignore[arg-type]
        assert torch.equal(model.generate(ids, **arguments, past_key_values=cache), expected)


@pytest.mark.parametrize("number", [2**60, 10**30])
def test_huge_parameters_are_as_large_ones(number: int) -> None:
    options: dict[str, Any] = dict(budget=16, recent_window=8)
    pairs: list[tuple[Method, Method]] = [
        (Bisection(rerank_factor=number), Bisection(rerank_factor=1000)),
        (RetroInfer(0.1, cluster_tokens=number), RetroInfer(0.1, cluster_tokens=8192)),
        (Quest(dense_layers=number), Quest(dense_layers=2)),
    ]
    for ours, expected in pairs:
        assert torch.equal(outputs(method=ours, **options), outputs(method=expected, **options))
    assert Bisection(rerank_factor=number) == Bisection(rerank_factor=MOST_TOKENS)
    assert RetroInfer(cluster_tokens=number) == RetroInfer(cluster_tokens=8192)


def test_a_tiny_share_is_estimated_by_kernels_too() -> None:
    """It is handed over in billionths, and 0 of them would turn that off."""
    method = RetroInfer(1e-12)
    assert method.recipe is not None
    assert method.recipe.estimated_fraction == 1e-12
    assert method.recipe.estimated_billionths == 1
    assert [RetroInfer(share).recipe.estimated_billionths for share in (0, 0.232, 1)] == [0, 232_000_000, 10**9]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (MOST_BYTES, MOST_BYTES), (2**63, MOST_BYTES), (10**5000, MOST_BYTES), ("9" * 40 + "TiB", MOST_BYTES),
        ("36028797018963969B", 36028797018963969), ("0.1GiB", 107374182), (np.int64(5), 5),
    ],
    ids=range(7),
)  # fmt: skip
def test_sizes_in_bytes(given: Any, expected: int) -> None:
    """To the last byte, where a float would round."""
    found = parse_bytes("gpu_memory", given)
    assert found == expected
    assert type(found) is int


NO_SIZES = ["9" * 5000 + "GiB", "1." + "0" * 5000, "٣GiB", "nan", "inf", "1e400", -(10**5000)]


@pytest.mark.parametrize("given", NO_SIZES, ids=range(len(NO_SIZES)))
def test_sizes_that_are_none(given: Any) -> None:
    with pytest.raises(OptionError, match=r"(?s)gpu_memory: expected .*got .*; pass gpu_memory=") as raised:
        parse_bytes("gpu_memory", given)
    assert len(str(raised.value)) < 600


def test_release_gpu_memory() -> None:
    cache = SpinCache(Shape().config())
    for given in (2**63, 10**400, "9" * 40 + "TiB", np.int64(7)):
        assert cache.release_gpu_memory(given) == 0  # type: ignore[arg-type]
    for given in (0, -1, -(10**5000), "0", "x", float("nan"), True, 1.5, [1]):
        with pytest.raises(SpinError, match="num_bytes: expected"):
            cache.release_gpu_memory(given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["batch_size", "context_length"])
def test_plan(name: str) -> None:
    arguments: dict[str, Any] = {"context_length": 4096}
    for number in (0, -1, MOST_TOKENS + 1, 2**63, 10**400, 10**5000):
        with pytest.raises(
            OptionError, match=rf"{name}: expected at (least 1|most {MOST_TOKENS}), got .*; pass {name}="
        ):
            plan(Shape().config(), **{**arguments, name: number})
    for wrong in (True, 1.0, "8", None, float("nan")):
        with pytest.raises(SpinError, match=f"{name}: expected an int"):
            plan(Shape().config(), **{**arguments, name: wrong})
    made = plan(Shape().config(), **{**arguments, name: np.int32(64)})
    assert made == plan(Shape().config(), **{**arguments, name: 64})
    assert plan(Shape().config(), **{**arguments, name: MOST_TOKENS}).fits
    huge: dict[str, Any] = dict(budget=2**63, recent_window=10**30, gpu_memory=10**400, cpu_memory="9" * 40)
    assert plan(Shape().config(), **arguments, **huge).fits
    for dtype in (torch.int8, torch.bool, torch.complex64):
        with pytest.raises(OptionError, match="dtype: expected one of floating point"):
            plan(Shape().config(), context_length=8, dtype=dtype)


# ------------------------------------------------------------------------------------------------------ of what kind


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint16])
def test_ints_of_numpy(kind: Any) -> None:
    parsed = SpinOptions.parse(**{name: kind(64) for name in TOKENS}, gpu_memory=kind(9))
    assert parsed == SpinOptions(64, 64, 64, 64, gpu_memory=9)
    assert all(type(getattr(parsed, name)) is int for name in (*TOKENS, "gpu_memory"))
    made: list[tuple[Any, str]] = [
        (Bisection(kind(3)), "rerank_factor"), (RetroInfer(cluster_tokens=kind(9)), "cluster_tokens"),
        (Quest(kind(1)), "dense_layers"),
        (ShadowKV(kind(7)), "outlier_pages_per_1024"), (SeerAttention("x", page_size=kind(16)), "page_size"),
    ]  # fmt: skip
    assert all(type(getattr(method, name)) is int for method, name in made)


@pytest.mark.parametrize("number", [np.float64(0.25), np.float32(0.25), np.float16(0.25), Fraction(1, 4)])
def test_floats_of_numpy(number: Any) -> None:
    found = [
        SpinOptions.parse(budget=number).budget, RetroInfer(number).estimated_fraction,
        SeerAttention(threshold=number).threshold,
    ]  # fmt: skip
    assert found == [0.25] * 3
    assert all(type(value) is float for value in found)


NO_COUNTS = [True, np.True_, "8", b"8", None, [8], 8.0, float("nan"), float("inf"), np.float64(8), torch.tensor(8), 8j]
PARAMETERS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda value: SpinOptions.parse(num_sink_tokens=value), "num_sink_tokens"),
    (lambda value: SpinOptions.parse(recent_window=value), "recent_window"),
    (lambda value: SpinOptions.parse(dense_below=value), "dense_below"),
    (lambda value: SpinOptions.parse(gpu_memory=value), "gpu_memory"),
    (lambda value: SpinOptions.parse(cpu_memory=value), "cpu_memory"),
    (lambda value: Bisection(rerank_factor=value), "rerank_factor"),
    (lambda value: RetroInfer(cluster_tokens=value), "cluster_tokens"),
    (lambda value: Quest(dense_layers=value), "dense_layers"),
    (lambda value: ShadowKV(outlier_pages_per_1024=value), "outlier_pages_per_1024"),
    (lambda value: SeerAttention(page_size=value), "page_size"),
]


@pytest.mark.parametrize(("make", "name"), PARAMETERS, ids=[name for _, name in PARAMETERS])
def test_what_is_no_count(make: Callable[[Any], Any], name: str) -> None:
    for value in NO_COUNTS:
        if name.endswith("_memory") and value == "8":
            continue  # a text is a size in bytes
        with pytest.raises(SpinError, match=f"{name}: expected an int.*, got .*; pass"):
            make(value)
    for value in (-1, -(2**63), -(10**5000)):
        with pytest.raises(SpinError, match=f"{name}: expected .*, got .*; pass"):
            make(value)


FRACTIONS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda value: SpinOptions.parse(budget=value), "budget"),
    (lambda value: RetroInfer(value), "estimated_fraction"),
    (lambda value: SeerAttention(threshold=value), "threshold"),
]


@pytest.mark.parametrize(("make", "name"), FRACTIONS, ids=[name for _, name in FRACTIONS])
def test_what_is_no_share(make: Callable[[Any], Any], name: str) -> None:
    wrong: list[Any] = [
        float("nan"),
        float("inf"),
        -float("inf"),
        np.float32("nan"),
        -0.5,
        1.5,
        True,
        "0.5",
        [0.5],
        0.5j,
    ]
    wrong += [torch.tensor(0.5), -(10**400), Fraction(-(10**400), 3), *([] if name == "budget" else [10**400])]
    for value in wrong:
        with pytest.raises(SpinError, match=rf"{name}.*(expected|below|share).*; (pass|raise)"):
            make(value)


def test_classes_whose_numbers_cannot_work() -> None:
    """Of a method of one's own, refused before anything is divided by them."""
    makers: list[Callable[[Any], Any]] = [
        lambda method: SpinCache(Shape().config(), method),
        lambda method: plan(Shape().config(), context_length=9, method=method),
    ]
    wrong = {"page_size": (0, -8, 2.0, True, 2**31, "8"), "span_tokens": (0, 1.5), "cluster_interval": (0, None)}
    for name, value in [(name, value) for name, values in wrong.items() for value in values]:
        mine = type("Mine", (Bisection,), {name: value})
        for make in makers:
            with pytest.raises(SpinError, match=f"Mine: {name}: expected"):
                make(mine())
    with pytest.raises(SpinError, match="Mine: num_observation_queries: expected"):
        resolve_method(type("Mine", (Bisection,), {"num_observation_queries": -1})())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rerank_factor", 2**31), ("rerank_factor", -1), ("rerank_factor", True), ("dense_layers", 1.0), ("outliers_per_1024",
        -1), ("estimated_fraction", float("nan")), ("estimated_fraction", 1.5), ("threshold", float("inf")),
        ("threshold", "0.1"),
    ],
)  # fmt: skip
def test_recipes_whose_numbers_cannot_work(field: str, value: Any) -> None:
    class Mine(Bisection):
        recipe: ClassVar[KernelRecipe] = KernelRecipe(Rating.MEAN, **{field: value})  # type: ignore[misc]

    with pytest.raises(SpinError, match=f"recipe: {field}: expected"):
        SpinCache(Shape().config(), Mine())


def test_messages_are_short() -> None:
    with pytest.raises(OptionError) as raised:
        SpinCache(Shape().config(), "x" * 100_000)
    assert len(str(raised.value)) < 1000
