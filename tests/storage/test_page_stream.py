"""Streams of a layer's first tokens: the tokens of `PageStore.held`, in pieces, from either tier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_hf.storage import page_stream
from spin_hf.storage.chunked_array import ChunkedArray
from spin_hf.storage.page_store import PageStore
from spin_hf.storage.page_stream import TokenStream, gather_all
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.tuning import tune

SHAPE = Shape(layers=1, kv_heads=2, group=1, key_dim=8, value_dim=4)
LENGTH = 1211


class FakeStream:
    """Notes the order of what is done on the streams."""

    order: list[str]

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def wait_event(self, event: FakeEvent) -> None:
        assert event.recorded, f"{self.name} waits for an event that was never recorded"
        self.order.append(f"{self.name} waits")

    def wait_stream(self, other: FakeStream) -> None:
        self.order.append(f"{self.name} waits for {other.name}")


class FakeEvent:
    recorded = False

    def record(self, stream: FakeStream) -> None:
        self.recorded = True


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU whose streams are the CPU; pages in the cpu tier count as registered. Returns the order of their waits."""
    order: list[str] = []
    compute, copies = FakeStream("compute", order), FakeStream("copies", order)

    @contextmanager
    def on(stream: FakeStream) -> Iterator[None]:
        order.append(f"load on {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(page_stream, "_copy_stream", lambda device: copies)
    monkeypatch.setattr(PageStore, "is_registered", property(lambda store: store.frames is not None))
    return order


def filled(**options: Any) -> tuple[PageStore, RandomKV]:
    """A layer that holds LENGTH tokens of two sequences, which have changed places."""
    kv = RandomKV.random(SHAPE, 2, LENGTH + 40, seed=0)
    driver = CacheDriver(SHAPE, budget=64, recent_window=16, **options)
    driver.steps(kv, 0, [700, LENGTH])
    driver.cache.reorder_cache(torch.tensor([1, 0]))
    driver.steps(kv.rows([1, 0]), LENGTH, [LENGTH + 40])
    (layer,) = driver.cache.paged_layers
    assert layer.store is not None
    return layer.store, kv


def streamed(store: PageStore, stop: int) -> tuple[Tensor, Tensor, int]:
    """Keys and values of a stream, concatenated, and the number of pieces. A piece is copied before the next."""
    pieces, position = [], 0
    with TokenStream(store, stop) as stream:
        for first, keys, values in stream:
            assert first == position
            position += keys.shape[2]
            pieces.append((keys.clone(), values.clone()))
    return torch.cat([keys for keys, _ in pieces], 2), torch.cat([values for _, values in pieces], 2), len(pieces)


@pytest.mark.parametrize("stop", [1, 8, 255, 256, 257, 1024, LENGTH])
@pytest.mark.parametrize("segments", [1, 2, 100])
def test_resident(stop: int, segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = filled()
    monkeypatch.setattr(store, "piece_bytes", segments * 2 * 32 * 2 * store.layout.row_bytes)
    keys, values, pieces = streamed(store, stop)
    wanted = store.held(stop)
    assert torch.equal(keys, wanted[0])
    assert torch.equal(values, wanted[1])
    power = 1 << (segments.bit_length() - 1)
    assert pieces == -(-stop // (power * 32 * 8))


def test_large_pieces(monkeypatch: pytest.MonkeyPatch, streams: list[str]) -> None:
    """Of pages in the compute tier, as large as all buffers that are set aside; loads from host memory use these."""
    for options, expected in (({}, 2), ({"gpu_memory": "60kB"}, 5)):
        store, _ = filled(**options)
        monkeypatch.setattr(store, "piece_bytes", 2 * 32 * 2 * store.layout.row_bytes)
        with TokenStream(store, LENGTH, large=True) as stream:
            pieces = [(first, keys.clone(), values.clone()) for first, keys, values in stream]
        assert len(pieces) == expected
        assert torch.equal(torch.cat([keys for _, keys, _ in pieces], 2), store.held(LENGTH)[0])
        assert torch.equal(torch.cat([values for _, _, values in pieces], 2), store.held(LENGTH)[1])


def test_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as all buffers, and a quarter more behind the last chunk of a prompt."""
    store, _ = filled()
    segment = 2 * 32 * 2 * store.layout.row_bytes
    monkeypatch.setattr(store, "piece_bytes", segment)
    gathered = gather_all(store, LENGTH)
    assert gathered is not None
    for found, wanted in zip(gathered, store.held(LENGTH), strict=True):
        assert torch.equal(found, wanted)
    assert gather_all(store, 1024) is not None
    monkeypatch.setattr(store.sequences, "expected_tokens", LENGTH + 1)
    assert gather_all(store, LENGTH) is None
    assert gather_all(store, 1024) is not None
    monkeypatch.setattr(store.sequences, "expected_tokens", 0)
    monkeypatch.setattr(store, "piece_bytes", segment - 1)
    assert gather_all(store, LENGTH) is None


@pytest.mark.parametrize("cpu_dtype", ["auto", "int8"])
@pytest.mark.parametrize("stop", [3, 256, 700, LENGTH])
@pytest.mark.parametrize("segments", [1, 4])
def test_from_host_memory(
    stop: int, segments: int, cpu_dtype: str, monkeypatch: pytest.MonkeyPatch, streams: list[str]
) -> None:
    tune(monkeypatch, max_chunk_segments=3, min_chunk_segments=1)  # runs cross chunks
    store, _ = filled(gpu_memory="60kB", cpu_dtype=cpu_dtype)
    assert store.frames is not None
    monkeypatch.setattr(store, "piece_bytes", segments * 2 * 32 * 2 * store.layout.row_bytes)
    loads = store.frames.loads
    streams.clear()
    keys, values, pieces = streamed(store, stop)
    wanted = store.held(stop)
    assert torch.equal(keys, wanted[0])
    assert torch.equal(values, wanted[1])
    assert streams.count("load on copies") == pieces
    assert streams[0] == "copies waits for compute", "buffers may still be in use"
    assert streams[-1] == "compute waits for copies", "loads may outlive their buffers"
    assert store.frames.loads == loads, "page frames are not used"


def test_a_stream_that_is_left_early_waits_for_its_loads(streams: list[str]) -> None:
    store, _ = filled(gpu_memory="60kB")
    with TokenStream(store, LENGTH) as stream:
        assert "load on copies" in streams, "loads begin before the first piece is requested"
        next(iter(stream))
    assert streams[-1] == "compute waits for copies"


def test_copy_runs() -> None:
    array = ChunkedArray((3,), 8, torch.float32, torch.device("cpu"))
    array.grow(40)
    content = torch.arange(120.0).view(40, 3)
    array.put(torch.arange(40), content)
    for starts in ([0, 4, 8], [12, 4, 8, 36], [20], []):
        target = torch.full((len(starts) * 4 + 1, 3), -1.0)
        array.copy_runs(starts, 4, target)
        rows = [start + i for start in starts for i in range(4)]
        assert torch.equal(target[:-1], content[rows])
        assert bool((target[-1] == -1).all())
