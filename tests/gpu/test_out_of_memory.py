"""A full GPU: a prefill, a step that needs more memory, and a capture fail, are rolled back and repeated.

A filler tensor leaves as much memory as the case needs; the errors are CUDA's own.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from spin_hf import SpinCache
from spin_hf.errors import CapacityError
from tests.support.refusals import refusal_of
from tests.support.tuning import grow_by_segments, tuned
from tests.support.zoo import build_model, random_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

OPTIONS: dict[str, Any] = {"method": "shadowkv", "budget": 64, "recent_window": 16, "gpu_memory": "64GiB"}
"""With "auto" there would be less in a GPU that is full, and nothing would fail."""
MIB = 1 << 20


class Filled:
    """The allocator may take `left` bytes more from CUDA; large blocks that it holds free already are taken away."""

    def __init__(self, left: int) -> None:
        self.left, self.taken = left, list[torch.Tensor]()

    def __enter__(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self._allow(0)
        for size in (16 * MIB, 4 * MIB, MIB + 1):
            while True:
                try:
                    self.taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
                except torch.OutOfMemoryError:
                    break
        self._allow(self.left)

    def __exit__(self, *error: Any) -> None:
        self.taken.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)

    @staticmethod
    def _allow(more: int) -> None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + more) / total))


def _held() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


@torch.no_grad()
def _feed(model: Any, cache: SpinCache, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids, past_key_values=cache, logits_to_keep=1).logits
    return logits


def _fails(model: Any, cache: SpinCache, ids: torch.Tensor) -> BaseException | None:
    """What a forward raised; None where it went through."""
    return refusal_of(lambda: _feed(model, cache, ids))


@pytest.fixture(scope="module")
def model() -> Any:
    """With room made for what is made once: kernels, workspaces, and the captured step. It is that of the tests' tuning."""
    made = build_model("llama").cuda().eval()
    with tuned(dense_factor=0, compiles_early=False):
        cache = SpinCache(made, **OPTIONS)
    for ids in (random_tokens(2, 600), *random_tokens(2, 4, seed=2).split(1, 1)):
        _feed(made, cache, ids.cuda())
    return made


def test_prefill(model: Any) -> None:
    """It fails in some layer, or after the last one. Without the filler it works."""
    ids, token = random_tokens(2, 8192, seed=3).cuda(), random_tokens(2, 1, seed=4).cuda()
    undisturbed = SpinCache(model, **OPTIONS)
    expected = [_feed(model, undisturbed, ids), _feed(model, undisturbed, token)]
    del undisturbed
    cache, before, failed = SpinCache(model, **OPTIONS), _held(), 0
    lowest = before  # what tests before have left may still go
    for left in (2, 12, 22, 32, 42, 62):
        with Filled(left * MIB):
            error = _fails(model, cache, ids)
        if error is None:
            cache = SpinCache(model, **OPTIONS)
            break
        failed += 1
        del error
        assert cache.get_seq_length() == cache.stats().tokens == cache.stats().sequences == 0
        cache.check_integrity()
        held, lowest = lowest, _held()
        assert lowest <= held
    assert failed >= 2
    for step, logits in zip((ids, token), expected, strict=True):
        torch.testing.assert_close(_feed(model, cache, step), logits, rtol=0, atol=1e-4)
    cache.check_integrity()
    del cache
    assert _held() <= before


@pytest.mark.parametrize("captured", [False, True])
def test_a_step_that_needs_more_room(model: Any, captured: bool) -> None:
    """Tokens are decoded up to where the next one takes new segments, of which a chunk has a few."""
    batch, steps = 4, 3
    ids = random_tokens(batch, 20_000, seed=5).cuda()
    probe = SpinCache(model.config, **OPTIONS)
    _feed(model, probe, ids[:, :8])
    store = probe.layers[0].store
    start = store.backing.num_rows // (32 * store.num_heads) // batch * 256  # what one chunk holds
    del probe, store
    undisturbed, cache = (SpinCache(model if captured else model.config, **OPTIONS) for _ in range(2))
    for each in (undisturbed, cache):
        _feed(model, each, ids[:, : start - steps])
        for at in range(start - steps, start):
            _feed(model, each, ids[:, at : at + 1])
    before = _held()
    with Filled(2 * MIB):  # enough for what a step computes with, and too little for a chunk of pages
        for _ in range(3):
            error = _fails(model, cache, ids[:, start : start + 1])
            assert isinstance(error, CapacityError)
            assert "bytes" in str(error)
            assert isinstance(error.__cause__, torch.OutOfMemoryError)
            assert cache.get_seq_length() == cache.stats().tokens == start
            del error
    cache.check_integrity()
    assert _held() - before < MIB // 2  # tables of steps, at most
    for at in range(start, start + 4):
        ours, theirs = (_feed(model, each, ids[:, at : at + 1]) for each in (cache, undisturbed))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    cache.check_integrity()


def test_pages_that_move_to_host_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver refuses to lock more; nothing stays locked, and the step works when it does not."""
    from spin_hf.storage import pinned_slab
    from spin_hf.storage.host_register import CudaRegistrar

    grow_by_segments(monkeypatch)
    ids = random_tokens(2, 3000, seed=6).cuda()
    options = {**OPTIONS, "gpu_memory": "3MB"}
    undisturbed, cache = (SpinCache(model, **options) for _ in range(2))
    for each in (undisturbed, cache):
        _feed(model, each, ids[:, :1000])
    gc.collect()
    pinned_slab.give_back_dropped()  # what tests before left
    mapped = sum(len(mapping) for mapping in pinned_slab._mappings.values())

    def refuse(self: Any, address: int, num_bytes: int) -> None:
        raise CapacityError(f"page-locking {num_bytes} bytes was refused; free host memory")

    with monkeypatch.context() as patched:
        patched.setattr(CudaRegistrar, "register", refuse)
        for _ in range(2):
            assert isinstance(_fails(model, cache, ids[:, 1000:3000]), CapacityError)
            assert cache.get_seq_length() == 1000
            cache.check_integrity()
        gc.collect()
        pinned_slab.give_back_dropped()
        assert sum(len(mapping) for mapping in pinned_slab._mappings.values()) == mapped
    for part in (ids[:, 1000:2999], ids[:, 2999:]):
        ours, theirs = (_feed(model, each, part) for each in (cache, undisturbed))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    cache.check_integrity()
