"""The longest spans: an int16 offset reaches from one end of a span to the other, and not farther."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from spin_hf import OptionError, SpinCache, plan
from spin_hf.attention.methods.clustering import TokenClusters
from spin_hf.indexing import cluster
from spin_hf.storage import permute_pages
from tests.support.cache_driver import Shape
from tests.support.clustering_methods import Backwards, little_slack
from tests.support.inspection import forward_of, state_of

SHAPE = Shape(layers=2, kv_heads=1, group=1, key_dim=4, value_dim=4)
LONGEST = [(8, 32768), (1, 32767)]
"""By page size: shifts of 32767 at most, and partitions of as many pages."""


@dataclass(frozen=True)
class FromEndToEnd(Backwards):
    """The opposite order, all of it one partition."""

    span_tokens: ClassVar[int] = 32768

    def form_clusters(self, keys: Tensor, observation_queries: Tensor | None) -> TokenClusters:
        pages = torch.zeros((*keys.shape[:2], keys.shape[2] // self.page_size), dtype=torch.int64)
        pages[:, :, 0] = pages.shape[2]
        return TokenClusters(super().form_clusters(keys, observation_queries).order, pages)


def with_spans_of(tokens: int, page_size: int) -> Any:
    return type("Mine", (FromEndToEnd,), {"span_tokens": tokens, "page_size": page_size})()


@pytest.mark.parametrize(("page_size", "longest"), LONGEST)
def test_the_longest_span(page_size: int, longest: int) -> None:
    """Its first and last token change places, in all layers; a crop puts them back."""
    with little_slack():
        cache = SpinCache(
            SHAPE.config(), with_spans_of(longest, page_size), num_sink_tokens=8, recent_window=9, summary_dtype="model"
        )
    state = state_of(cache)
    states = torch.randn(2, SHAPE.layers, 1, 1, 8 + longest + 17, 4)  # behind the sinks, before window and slack
    for layer, keys, values in zip(cache.layers, *states, strict=True):
        layer.append(keys, values, None)
    forward_of(cache).commit()
    cluster.cluster_new_tokens(state)
    stop = (8 + longest) // page_size
    assert state.sequences.spans.stops == [stop]
    expected = torch.arange(8 + longest)
    expected[8:] = expected[8:].flip(0)
    sinks = 8 // page_size
    for layer in state.layers:
        held = layer.store.permutation
        assert torch.equal(held.positions(0, stop).flatten(), expected)
        assert held.arrays[0].dtype == held.arrays[1].dtype == torch.int16
        pages = held.pages_per_cluster(0, stop).flatten()
        assert pages[: sinks + 2].tolist() == [*[1] * sinks, longest // page_size, 0]
        assert torch.equal(permute_pages.positions([layer.store], 0, stop).flatten(), expected.int())
    cache.check_integrity()
    for layer, keys, values in zip(cache.layers, *states, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
    cache.crop(-17 - page_size)
    assert state.sequences.spans.stops == []
    cache.check_integrity()
    for layer, keys in zip(cache.layers, states[0], strict=True):
        assert torch.equal(layer.keys, keys[:, :, : 8 + longest - page_size])


@pytest.mark.parametrize(("page_size", "longest"), LONGEST)
def test_longer_spans_are_refused(page_size: int, longest: int) -> None:
    """By the cache before it holds anything, and by `plan`."""
    config = SHAPE.config()
    config._attn_implementation = "sdpa"
    for make in (
        lambda method: SpinCache(config, method),
        lambda method: plan(config, context_length=64, method=method),
    ):
        message = rf"expected span_tokens of at most {longest}, .*got {longest + 1}; lower span_tokens"
        with pytest.raises(OptionError, match=message):
            make(with_spans_of(longest + 1, page_size))
        assert config._attn_implementation == "sdpa"
    assert plan(config, context_length=64, method=with_spans_of(longest, page_size)).fits
