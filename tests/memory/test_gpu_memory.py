"""`gpu_memory="auto"`: sized by the free memory, shared with the user, and without effect on outputs.

Several caches on one GPU are in `test_gpu_memory_shared.py`.

The GPU is only counted (`tests/support/fake_gpu.py`). Every history also runs with a cache without a cap, whose outputs must be
the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spin_hf import BudgetError, CapacityError, SpinCache
from spin_hf.storage.chunked_array import ChunkedArray
from spin_hf.storage.page_frames import PageFrames
from tests.support.cache_driver import CacheDriver, RandomKV, smallest_gpu_memory
from tests.support.fake_gpu import (
    CHECK_INTERVAL_STEPS,
    OPTIONS,
    PAGE,
    SHAPE,
    WATERMARKS,
    Conversation,
    bytes_of,
    fake_gpu,
    other_device,
    resident_batch_bytes,
)
from tests.support.tuning import tuned

# ------------------------------------------------------------------------------------------------------------ sizing


def test_a_context_that_fits_stays_resident() -> None:
    with fake_gpu(2 * resident_batch_bytes(2, 500)) as gpu:
        talk = Conversation(gpu, 2, 400).begin()
        talk.decode(2 * CHECK_INTERVAL_STEPS)
        stats = talk.cache.stats()
        assert (talk.frames, stats.loads, stats.cpu_bytes) == ([], 0, 0)
        assert gpu.looks <= 20


def test_frames_are_sized_behind_the_prompt() -> None:
    """By what is free then: what the prompt's activations took is there again, and what came meanwhile is not."""
    total, sizes = resident_batch_bytes(2, 1000) // 2, []
    for user in (0, total // 4):
        with fake_gpu(total) as gpu:
            talk = Conversation(gpu, 2, 900)
            gpu.user = total // 3
            talk.read(300)
            assert gpu.free >= total // 10
            talk.read(600)
            gpu.user = user
            few = talk.frames
            talk.decode()
            margin = WATERMARKS.margin(total - user)
            assert max(few) < min(talk.frames)
            assert margin <= gpu.free <= margin + 2 * SHAPE.layers * SHAPE.kv_heads * (PAGE + 12) + total // 50
            sizes.append(talk.frames[0])
    assert sizes[1] < sizes[0]


def test_few_frames_while_a_prompt_is_read() -> None:
    with tuned(prompt_frames=16), fake_gpu(resident_batch_bytes(2, 1000) // 2) as gpu:
        talk = Conversation(gpu, 2, 900)
        talk.read(900)
        assert talk.frames == [16, 16]
        talk.decode()
        assert min(talk.frames) > 40
        talk.read(40)  # another turn: what was made stays, up to the larger margin
        assert min(talk.frames) > 40
        assert gpu.free >= 2 * WATERMARKS.margin(gpu.total) - 2 * SHAPE.layers * SHAPE.kv_heads * (PAGE + 12)


def test_all_pages_have_frames_at_low_load() -> None:
    """A context that was paged for a while: once there is room, nothing is loaded any more."""
    with fake_gpu(4 * resident_batch_bytes(1, 800)) as gpu:
        gpu.user = gpu.total - resident_batch_bytes(1, 800) // 2
        talk = Conversation(gpu, 1, 700).begin()
        assert 0 < talk.frames[0] < 88
        gpu.user = 0
        talk.decode(CHECK_INTERVAL_STEPS)
        assert min(talk.frames) >= -(-talk.length // 8)
        talk.read(20)  # reads everything
        pages, loads = talk.cache.stats().pages, talk.cache.stats().loads
        talk.decode(20)
        talk.read(20)
        assert talk.cache.stats().loads - loads <= talk.cache.stats().pages - pages  # but for pages that are new


def test_decode_steps_seldom_look() -> None:
    with fake_gpu(resident_batch_bytes(1, 800) // 2) as gpu:
        talk = Conversation(gpu, 1, 700).begin()
        gpu.looks = 0
        talk.decode(3 * CHECK_INTERVAL_STEPS)
        assert gpu.looks <= 3 * 2


# ---------------------------------------------------------------------------------------------------------- pressure


def test_the_users_own_allocations() -> None:
    with fake_gpu(resident_batch_bytes(2, 900)) as gpu:
        gpu.user = gpu.total // 2
        talk = Conversation(gpu, 2, 700).begin()
        before, free = talk.frames[0], gpu.free
        gpu.user += free // 4  # not enough to care
        talk.decode(CHECK_INTERVAL_STEPS)
        assert talk.frames[0] == before
        gpu.user += free // 2
        talk.decode(CHECK_INTERVAL_STEPS)
        least = talk.frames[0]
        assert least < before
        assert gpu.free >= WATERMARKS.margin(gpu.total - gpu.user)
        gpu.user -= free // 2  # nor is that enough to grow
        talk.decode(CHECK_INTERVAL_STEPS)
        assert talk.frames[0] == least
        gpu.user = 0
        talk.decode(CHECK_INTERVAL_STEPS)
        assert talk.frames[0] > before


def test_never_below_what_a_step_needs() -> None:
    with fake_gpu(resident_batch_bytes(1, 900) // 2) as gpu:
        talk = Conversation(gpu, 1, 700).begin()
        needed = 2 + 3 + 3  # pages of sinks, recent window and budget
        talk.cache.release_gpu_memory()
        assert needed <= min(talk.frames) <= needed + 6  # there is room for the summaries of some more tokens
        gpu.user += gpu.free - 2000
        talk.decode(2 * CHECK_INTERVAL_STEPS)
        assert needed <= min(talk.frames) <= needed + 6
        assert talk.cache.stats().loads > 0


def test_a_resident_context_goes_to_the_cpu_tier_under_pressure() -> None:
    with fake_gpu(2 * resident_batch_bytes(1, 900)) as gpu:
        talk = Conversation(gpu, 1, 700).begin()
        assert talk.frames == []
        gpu.user = gpu.free - 10
        talk.decode(CHECK_INTERVAL_STEPS)
        assert min(talk.frames) > 20
        assert gpu.free >= WATERMARKS.margin(gpu.total - gpu.user)
        gpu.user = 0
        talk.decode(CHECK_INTERVAL_STEPS)
        assert not talk.cache.paged_layers[0].store.lacks_frames


def test_without_memory_in_the_cpu_tier_a_resident_context_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(2 * resident_batch_bytes(1, 900)) as gpu:
        talk = Conversation(gpu, 1, 700, cpu_memory=1000).begin()
        gpu.user = gpu.free - 10
        talk.decode(CHECK_INTERVAL_STEPS)
        assert (talk.frames, talk.cache.release_gpu_memory()) == ([], 0)
    with fake_gpu(2 * resident_batch_bytes(1, 900)) as gpu:
        talk = Conversation(gpu, 1, 700).begin()
        moved: list[ChunkedArray] = []

        def move(array: ChunkedArray, device: torch.device) -> None:
            if moved:  # the second layer finds none
                raise CapacityError("no memory to lock")
            moved.append(array)

        monkeypatch.setattr(ChunkedArray, "move", move)
        assert talk.cache.release_gpu_memory() == 0
        talk.decode(3)
        assert len(talk.frames) == 1


def test_a_longer_batch_and_context_share_what_there_is() -> None:
    with fake_gpu(resident_batch_bytes(1, 900)) as gpu:
        talk = Conversation(gpu, 1, 700, seed=3).begin()
        frames = talk.frames
        talk.cache.batch_repeat_interleave(4)
        with other_device():
            talk.expected.cache.batch_repeat_interleave(4)
        talk.kv = talk.kv.rows([0] * 4)
        talk.decode(2)
        assert max(talk.frames) < min(frames or [10**6])
        talk.read(150)
        talk.decode(2)
        assert gpu.free >= WATERMARKS.margin(gpu.total) // 2


@pytest.mark.parametrize("cap", ["auto", 150_000])
def test_free_memory_in_small_blocks(cap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer page frames rather than an error, where no block is large enough; more with a look, once one is."""
    move, largest = PageFrames._move_slots, 10**9

    def moving(frames: PageFrames, wanted: tuple[int, ...]) -> None:
        if sum(wanted) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        move(frames, wanted)

    monkeypatch.setattr(PageFrames, "_move_slots", moving)
    with fake_gpu(resident_batch_bytes(2, 900) if cap == "auto" else 1 << 40) as gpu:
        talk = Conversation(gpu, 3, 800, gpu_memory=cap).begin()
        talk.decode(2)
        frames, largest = talk.frames, 3 * talk.frames[0] // 4
        talk.cache.batch_select_indices(torch.tensor([0, 2]))
        with other_device():
            talk.expected.cache.batch_select_indices(torch.tensor([0, 2]))
        talk.kv = talk.kv.rows([0, 2])
        talk.decode(3)
        fewer = talk.frames
        assert largest // 4 <= max(fewer) <= largest // 2 < min(frames)
        largest = 10**9
        talk.decode(CHECK_INTERVAL_STEPS)
        assert min(talk.frames) > max(fewer)
        least = [store.mandatory_frames for layer in talk.cache.paged_layers if (store := layer.store) is not None]
        largest = min(least) // (2 * SHAPE.kv_heads) - 1
        with pytest.raises(CapacityError, match="page frames"):
            talk.cache.batch_select_indices(torch.tensor([1]))


# --------------------------------------------------------------------------------------------------- asked by the user


@pytest.mark.parametrize("cap", ["auto", 150_000])
@pytest.mark.parametrize("share", [0.1, 0.5, None])
def test_release_gpu_memory(cap: Any, share: float | None) -> None:
    with fake_gpu(resident_batch_bytes(1, 900) if cap == "auto" else 1 << 40) as gpu:
        talk = Conversation(gpu, 1, 800, gpu_memory=cap).begin()
        talk.decode(5)
        held, frames = bytes_of(talk.cache), talk.frames
        wanted = None if share is None else int(share * held)
        given = talk.cache.release_gpu_memory(wanted)
        assert given == held - bytes_of(talk.cache) > 0
        assert wanted is None or wanted <= given <= wanted + 0.1 * held
        talk.decode(5)
        assert talk.cache.release_gpu_memory(f"{given} B") <= given + 0.1 * held
        talk.decode(CHECK_INTERVAL_STEPS)
        if frames:
            assert talk.frames[0] >= frames[0] - 1
        assert cap == "auto" or bytes_of(talk.cache) <= cap


def test_release_of_an_interrupted_step() -> None:
    """As in `except torch.OutOfMemoryError`: the tokens that the forward has appended are rolled back."""
    with fake_gpu(resident_batch_bytes(1, 900)) as gpu:
        talk = Conversation(gpu, 1, 800).begin()
        new = slice(talk.length, talk.length + 1)
        talk.cache.update(talk.kv.keys[0][:, :, new], talk.kv.values[0][:, :, new], 0)
        talk.cache.roll_back()
        assert talk.cache.release_gpu_memory() > 0
        talk.decode(3)


def test_release_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="num_bytes"):
        SpinCache(SHAPE.config()).release_gpu_memory("much")
    assert SpinCache(SHAPE.config()).release_gpu_memory() == 0


# ------------------------------------------------------------------------------------------------------------ the caps


@pytest.mark.parametrize("slack", [1.0, 1.2, 2.0, 4.0])
def test_a_cap_in_bytes_is_kept(slack: float) -> None:
    """By all tensors that there are, at every step, through growth, other batches and requests."""
    kv = RandomKV.random(SHAPE, 3, 700, seed=0)

    def run(cap: int, check: bool = False) -> None:
        driver, start = CacheDriver(SHAPE, **OPTIONS, gpu_memory=cap), 0
        for stop in (100, 250, 257, *range(258, 290), 511, 513, 530, 531, 640, 700):
            driver.step(kv, start, stop)
            assert not check or bytes_of(driver.cache) <= 1.02 * cap
            start = stop
            if stop == 280:
                driver.cache.release_gpu_memory()
        driver.cache.batch_select_indices(torch.tensor([0]))
        driver.cache.batch_repeat_interleave(3)
        assert not check or bytes_of(driver.cache) <= 1.02 * cap

    run(int(slack * smallest_gpu_memory(run)), check=True)


def test_too_little_for_one_step() -> None:
    with fake_gpu(20_000) as gpu:
        with pytest.raises(BudgetError, match="gpu_memory"):
            Conversation(gpu, 1, 800).begin()
        gpu.total = resident_batch_bytes(1, 900)
        Conversation(gpu, 1, 800).begin()
