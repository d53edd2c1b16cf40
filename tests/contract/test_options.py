"""Options: accepted values, their normal form, and refusals with expected, actual and remedy."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from transformers import DynamicCache

from spin_hf import BudgetError, OptionError, OptionTypeError, ShadowKV, SpinCache, SpinError, plan
from spin_hf.attention.methods.registry import resolve_method
from spin_hf.config import SpinOptions, parse_bytes
from spin_hf.kernels.descriptor_fields import Rating
from spin_hf.kernels.recipe import KernelRecipe
from tests.support.cache_driver import Shape
from tests.support.inspection import state_of


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, 1), (8 << 30, 8 << 30), ("auto", None), (" Auto ", None), ("8GiB", 8 << 30), ("8 gib", 8 << 30),
        ("500MB", 500_000_000), ("500 MB", 500_000_000), ("1.5KiB", 1536), ("0.5TB", 500_000_000_000), ("7", 7),
        ("7B", 7), ("  3kb ", 3000), ("2MiB", 2 << 20), ("1GB", 10**9), ("1TiB", 1 << 40), ("0.1KB", 100),
    ],
)  # fmt: skip
def test_sizes(given: int | str, expected: int | None) -> None:
    assert parse_bytes("gpu_memory", given) == expected


@pytest.mark.parametrize(
    "given", [0, -1, "0", "0GiB", "", "GiB", "8 XB", "-8GiB", "8GiB more", "1e9", "eight", "0.2B", "8,5GB"]
)
def test_wrong_sizes(given: int | str) -> None:
    with pytest.raises(OptionError, match=r"cpu_memory: expected .*got .*; pass cpu_memory="):
        parse_bytes("cpu_memory", given)


@pytest.mark.parametrize("given", [True, None, 1.5, [1], b"8GiB"])
def test_wrong_types_of_sizes(given: Any) -> None:
    with pytest.raises(OptionTypeError, match=f"gpu_memory: expected an int or a text, got {type(given).__name__}"):
        parse_bytes("gpu_memory", given)


def test_defaults_and_units() -> None:
    assert SpinOptions.parse() == SpinOptions()
    assert SpinOptions.parse(gpu_memory="1KiB", cpu_memory=5, budget=0.02) == SpinOptions(
        0.02, gpu_memory=1024, cpu_memory=5
    )
    with pytest.raises(FrozenInstanceError):
        SpinOptions().budget = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "options",
    [
        dict(budget=1, num_sink_tokens=0), dict(budget=1.0), dict(budget=1e-9), dict(budget=4), dict(recent_window=1),
        dict(num_sink_tokens=0), dict(dense_below=0), dict(dense_below=10**9), dict(budget=1 << 30),
        dict(cpu_dtype="int8"), dict(cpu_dtype="auto"), dict(prefill="sparse"), dict(prefill="dense"),
        dict(prefill_top_p=1.0), dict(prefill_top_p=1e-9), dict(rectify_interval=64), dict(rectify_interval=1024),
        dict(rectify_interval=None),
    ],
)  # fmt: skip
def test_edges_that_are_fine(options: dict[str, Any]) -> None:
    parsed = SpinOptions.parse(**options)
    assert {name: getattr(parsed, name) for name in options} == options


WRONG: list[tuple[dict[str, Any], type[SpinError], str]] = [
    (dict(budget=3), BudgetError, r"budget=3 is below num_sink_tokens=4 .*; raise budget or lower num_sink_tokens"),
    (dict(budget=0, num_sink_tokens=0), BudgetError, "must be at least 1"),
    (dict(budget=-5), BudgetError, "budget=-5"),
    (dict(budget=0.0), OptionError, r"\(0, 1\], got 0.0; pass an int"),
    (dict(budget=1.01), OptionError, r"\(0, 1\], got 1.01"),
    (dict(budget=-0.5), OptionError, "got -0.5"),
    (dict(budget=float("nan")), OptionError, "got nan"),
    (dict(budget=True), OptionTypeError, r"got bool; pass budget=2048 or budget=0.02"),
    (dict(budget="2048"), OptionTypeError, "got str"),
    (dict(budget=None), OptionTypeError, "got NoneType"),
    (
        dict(num_sink_tokens=-1),
        OptionError,
        "num_sink_tokens: expected at least 0, got -1; pass num_sink_tokens=0 or more",
    ),
    (dict(num_sink_tokens=4.0), OptionTypeError, "num_sink_tokens: expected an int, got float"),
    (dict(recent_window=0), OptionError, "recent_window: expected at least 1, got 0"),
    (dict(recent_window=True), OptionTypeError, "recent_window: expected an int, got bool"),
    (dict(dense_below=-1), OptionError, "dense_below: expected at least 0, got -1"),
    (dict(gpu_memory="lots"), OptionError, "gpu_memory: expected a size"),
    (dict(cpu_memory=None), OptionTypeError, "cpu_memory"),
    (
        dict(cpu_dtype="int4"),
        OptionError,
        "cpu_dtype: expected one of 'auto', 'int8', got 'int4'; pass cpu_dtype=\"auto\"",
    ),
    (dict(cpu_dtype=None), OptionTypeError, "cpu_dtype: expected one of .* got None"),
    (dict(cpu_dtype="model"), OptionError, "cpu_dtype"),
    (dict(prefill="sprase"), OptionError, "prefill: expected one of 'dense', 'sparse', got 'sprase'"),
    (dict(prefill=None), OptionTypeError, "prefill: expected one of .* got None"),
    (
        dict(prefill_top_p=0),
        OptionError,
        r"prefill_top_p: expected a share in \(0, 1\], got 0.0; pass prefill_top_p=0.9",
    ),
    (dict(prefill_top_p=1.01), OptionError, "got 1.01"),
    (dict(prefill_top_p=float("nan")), OptionError, "prefill_top_p: .*got nan"),
    (dict(prefill_top_p="0.9"), OptionTypeError, "prefill_top_p: expected a float, got str"),
    (
        dict(rectify_interval=63),
        OptionError,
        "rectify_interval: expected at least 64, got 63; pass rectify_interval=1024",
    ),
    (dict(rectify_interval=2000), OptionError, "rectify_interval: expected at most 1024, got 2000"),
    (dict(rectify_interval="auto"), OptionTypeError, "rectify_interval: expected an int, got str"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG)
def test_refusals(options: dict[str, Any], error: type[SpinError], message: str) -> None:
    """From the cache too, and before it has touched the model's config."""
    with pytest.raises(error, match=message):
        SpinOptions.parse(**options)
    config = Shape().config()
    before = config._attn_implementation
    with pytest.raises(error, match=message):
        SpinCache(config, **options)
    assert config._attn_implementation == before


def test_refusals_are_standard_errors_too() -> None:
    for options, standard in [
        (dict(budget=3), ValueError),
        (dict(budget=2.0), ValueError),
        (dict(budget="x"), TypeError),
    ]:
        with pytest.raises(standard):
            SpinOptions.parse(**options)  # type: ignore[arg-type]


def test_the_default_method() -> None:
    """The same for a cache, for one that takes over another, and for a plan."""
    config = Shape().config()
    taken = SpinCache.from_cache(DynamicCache(config=config), config)
    assert [state_of(cache).method.name for cache in (SpinCache(config), taken)] == ["fitted", "fitted"]
    planned = plan(config, context_length=4096)
    assert planned == plan(config, context_length=4096, method="fitted")
    assert planned != plan(config, context_length=4096, method="shadowkv")


def test_methods() -> None:
    assert resolve_method("shadowkv") == ShadowKV()
    mine = ShadowKV(outlier_pages_per_1024=0)
    assert resolve_method(mine) is mine
    with pytest.raises(OptionError, match=r"unknown method 'h2o'; pass one of 'shadowkv'"):
        resolve_method("h2o")
    for wrong in (ShadowKV, None, 3):
        with pytest.raises(OptionTypeError, match=r"expected a name .* or a method object, got"):
            resolve_method(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "error"), [(-1, OptionError), (129, OptionError), (2.0, OptionTypeError), (True, OptionTypeError)]
)
def test_parameters_of_shadowkv(count: Any, error: type[SpinError]) -> None:
    with pytest.raises(error, match=r"outlier_pages_per_1024: expected .*, got .*; pass outlier_pages_per_1024=24"):
        ShadowKV(outlier_pages_per_1024=count)
    assert ShadowKV(outlier_pages_per_1024=128).outlier_pages_per_1024 == 128


class MeansOnly:
    recipe = KernelRecipe(Rating.LIKELIEST, summarised_by_append=True)

    def summary_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        return {"mean": (head_dim,)}


class PagesOfTwelve:
    page_size = 12
    recipe = KernelRecipe(Rating.LIKELIEST)


class SixVectors:
    recipe = KernelRecipe(Rating.LIKELIEST)

    def summary_shapes(self, head_dim: int, value_dim: int) -> dict[str, tuple[int, ...]]:
        return {f"v{i}": (head_dim,) for i in range(6)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (MeansOnly, r"expected a vector \[D\] and a number as summaries"), (SixVectors, "at most 5 summaries.*got 6"),
        (PagesOfTwelve, "a power of two.*got 12"),
    ],
)  # fmt: skip
def test_recipes_that_kernels_cannot_follow(changes: type[Any], message: str) -> None:
    mine = type("Mine", (changes, ShadowKV), {})
    with pytest.raises(OptionError, match=message):
        SpinCache(Shape().config(), mine())
    without = type("Mine", (changes, ShadowKV), {"recipe": None})
    SpinCache(Shape().config(), without())
