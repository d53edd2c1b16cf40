"""What `save_pretrained` and `from_pretrained` accept: the same model, method and stored options; other options are free."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from spin_hf import (
    Bisection,
    BudgetError,
    OptionError,
    OptionTypeError,
    Quest,
    RetroInfer,
    SavedCacheError,
    ShadowKV,
    SpinCache,
)  # fmt: skip
from spin_hf.persistence.manifest import VERSION
from tests.support.error_messages import check_message
from tests.support.saved_caches import assert_goes_on, change_json, prefilled, read_json, shards_of
from tests.support.zoo import build_model, random_tokens, subject_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved cache that no test changes."""
    folder = tmp_path_factory.mktemp("saved")
    prefilled("llama", method="bisection").save_pretrained(folder, random_tokens(2, 73))
    return folder


def other_weights() -> Any:
    model = copy.deepcopy(build_model("llama"))
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 3] += 1
    return model


def other_eps() -> Any:
    model = build_model("llama")
    model.config.rms_norm_eps *= 2
    return model


def fewer_layers() -> Any:
    model = build_model("llama")
    model.config.num_hidden_layers = 1
    return model


OTHER_MODELS = {
    "other weights": (other_weights, "weights"), "other eps": (other_eps, "rms_norm_eps"),
    "another family": (lambda: build_model("qwen2"), "model_type"), "fewer layers": (fewer_layers, "layers"),
    "half precision": (lambda: build_model("llama").half(), "dtype"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_another_model_is_refused(name: str, saved: Path) -> None:
    make, fact = OTHER_MODELS[name]
    model = make()
    implementation = model.config._attn_implementation
    with pytest.raises(SavedCacheError) as raised:
        SpinCache.from_pretrained(saved, model)
    check_message(raised.value, fact, "expected", "got")
    assert model.config._attn_implementation == implementation


OTHER_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"method": "quest"}, "Quest"), "another parameter": ({"method": Bisection(4)}, "rerank_factor"),
    "another window": ({"recent_window": 16}, "recent_window"), "other sinks": ({"num_sink_tokens": 8}, "num_sink_tokens"),
    "other summaries": ({"summary_dtype": "int8"}, "summaries"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_OPTIONS)
def test_options_that_change_what_is_stored_are_refused(name: str, saved: Path) -> None:
    options, fact = OTHER_OPTIONS[name]
    with pytest.raises(SavedCacheError) as raised:
        SpinCache.from_pretrained(saved, subject_model("llama"), **options)
    check_message(raised.value, fact, "expected", "got", "as in the saved cache")


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 24}, {"budget": 0.3}, {"dense_below": 100}, {"prefill_chunk_size": 32},
        {"prefill": "sparse", "prefill_top_p": 0.5},
    ],
)  # fmt: skip
def test_other_options_are_free(options: dict[str, Any], tmp_path: Path) -> None:
    """They act as they do in a cache that has read the prompt with them."""
    model = subject_model("llama")
    prefilled("llama", steps=0).save_pretrained(tmp_path)
    restored = SpinCache.from_pretrained(tmp_path, model, **options)
    assert_goes_on(model, prefilled("llama", steps=0, **options), restored, exact=False)


def test_windows_are_free_where_nothing_is_clustered(tmp_path: Path) -> None:
    prefilled("llama", method=ShadowKV(), steps=0).save_pretrained(tmp_path)
    other = {"recent_window": 24, "num_sink_tokens": 12}
    restored = SpinCache.from_pretrained(tmp_path, subject_model("llama"), **other)
    assert_goes_on(subject_model("llama"), prefilled("llama", method=ShadowKV(), steps=0, **other), restored)


@pytest.mark.parametrize("method", [Bisection(4), Quest(0), RetroInfer(0.5, 32), ShadowKV(7)], ids=lambda m: m.name)
def test_method_and_options_are_those_of_the_saved_cache(method: Any, tmp_path: Path) -> None:
    cache = prefilled("llama", method=method)
    cache.save_pretrained(tmp_path)
    restored = SpinCache.from_pretrained(tmp_path, subject_model("llama"))
    assert str(restored).split("gpu_memory")[0] == str(cache).split("gpu_memory")[0]


def test_caps_are_kept(saved: Path) -> None:
    with pytest.raises(BudgetError):
        SpinCache.from_pretrained(saved, subject_model("llama"), gpu_memory=1000)
    with pytest.raises(MemoryError):
        SpinCache.from_pretrained(saved, subject_model("llama"), gpu_memory="20kB", cpu_memory=1000)


def test_what_is_no_saved_cache(tmp_path: Path, saved: Path) -> None:
    model = subject_model("llama")
    (tmp_path / "file").write_text("x")
    for place in (tmp_path, tmp_path / "nowhere", tmp_path / "file", "", "\0"):
        with pytest.raises(SavedCacheError) as raised:
            SpinCache.from_pretrained(place, model)
        check_message(raised.value, "expected a folder that SpinCache.save_pretrained wrote")
    for place in (None, 3, b"x"):
        with pytest.raises(OptionTypeError, match="directory: expected a path"):
            SpinCache.from_pretrained(place, model)
    with pytest.raises(OptionTypeError, match="model"):
        SpinCache.from_pretrained(saved, "llama")


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model = subject_model("llama")
    with pytest.raises(OptionError, match="expected a cache that holds tokens, got none"):
        SpinCache(model).save_pretrained(tmp_path)
    cache = prefilled("llama")
    for tokens, error in (
        (random_tokens(2, 72), OptionError), (random_tokens(1, 73), OptionError), (torch.ones(2, 73), OptionError),
        ("text", OptionTypeError), (object(), OptionTypeError),
    ):  # fmt: skip
        with pytest.raises(error, match="tokens: expected"):
            cache.save_pretrained(tmp_path, tokens)
    for size in (0, "much", 1.5):
        with pytest.raises((OptionError, OptionTypeError), match="max_shard_bytes"):
            cache.save_pretrained(tmp_path, max_shard_bytes=size)
    with pytest.raises(OptionTypeError, match="directory"):
        cache.save_pretrained(3)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    with pytest.raises(SavedCacheError, match="expected to write"):
        cache.save_pretrained(tmp_path / "file")
    assert_goes_on(model, prefilled("llama"), cache)


def test_a_layer_of_another_kind_is_not_saved_in_part(tmp_path: Path) -> None:
    cache = prefilled("mistral")
    cache.layers[1].more = {"a": object()}
    with pytest.raises(OptionError, match=r"layer 1 is a DynamicSlidingWindowLayer whose more\.a"):
        cache.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_altered_byte_is_noticed_or_trusted(tmp_path: Path) -> None:
    prefilled("llama").save_pretrained(tmp_path)
    (shard,) = shards_of(tmp_path)
    content = bytearray(shard.read_bytes())
    content[-2000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(SavedCacheError, match="was it altered"):
        SpinCache.from_pretrained(tmp_path, subject_model("llama"))
    SpinCache.from_pretrained(tmp_path, subject_model("llama"), verify=False)


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1])
def test_another_version_of_the_format_is_refused(version: int, tmp_path: Path) -> None:
    prefilled("llama").save_pretrained(tmp_path)
    change_json(tmp_path, lambda content: content.update(version=version))
    with pytest.raises(SavedCacheError, match=f"version {VERSION} of the format, got {version}"):
        SpinCache.from_pretrained(tmp_path, subject_model("llama"))
    change_json(tmp_path, lambda content: content.update(version=VERSION))
    SpinCache.from_pretrained(tmp_path, subject_model("llama"))


def test_transformers_version_is_recorded_and_not_compared(tmp_path: Path) -> None:
    cache = prefilled("qwen3_next")
    cache.save_pretrained(tmp_path)
    assert read_json(tmp_path)["versions"]["transformers"] == transformers.__version__
    change_json(tmp_path, lambda content: content["versions"].update(transformers="4.0"))
    assert_goes_on(subject_model("qwen3_next"), cache, SpinCache.from_pretrained(tmp_path, subject_model("qwen3_next")))
