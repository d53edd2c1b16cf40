"""`gpu_memory="auto"`: sized from what is free, shared with other caches and with the user, and never seen in what comes out.

The GPU is arithmetic (`gpu_of.py`); every history is also run by a cache without a cap, whose outputs must be the same.
"""

from __future__ import annotations

import threading
from copy import deepcopy
from typing import Any

import pytest
import torch

from spin_hf import BudgetError, CapacityError, SpinCache
from spin_hf.gpu_memory import LOOK_STEPS
from spin_hf.storage import pressure
from spin_hf.storage.chunked import ChunkedArray

from .gpu_of import FakeGpu, bytes_of, elsewhere, gpu_of
from .tiny import Driver, Shape, World, smallest_gpu_memory

SHAPE = Shape(layers=2, kv_heads=2, group=1, key_dim=4, value_dim=4)
OPTIONS: dict[str, Any] = dict(budget=24, num_sink_tokens=4, recent_window=10)
PAGE = 8 * (4 + 4) * 4
"""Bytes of a page."""


class Conversation:
    """A cache on a GPU, and one without a cap that sees the same."""

    def __init__(self, gpu: FakeGpu, batch_size: int, prompt: int, seed: int = 0, **options: Any) -> None:
        self.world = World.random(SHAPE, batch_size, prompt + 6 * LOOK_STEPS, seed)
        self.driver = Driver(SHAPE, **OPTIONS, **options)
        self.gpu, self.length, self.prompt = gpu, 0, prompt
        gpu.caches.append(self.driver.cache)
        self.expected = Driver(SHAPE, **OPTIONS)

    @property
    def cache(self) -> SpinCache:
        return self.driver.cache

    @property
    def frames(self) -> list[int]:
        """Page frames of a KV head, of each layer that has any."""
        stores = [layer.store for layer in self.cache._shared.layers]
        return [store.frames.num_slots for store in stores if store is not None and store.frames is not None]

    def read(self, count: int) -> None:
        """One forward over more tokens."""
        start, self.length = self.length, self.length + count
        outputs = self.driver.step(self.world, start, self.length)
        with elsewhere():
            others = self.expected.step(self.world, start, self.length)
        for ours, expected in zip(outputs, others, strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        self.cache.check_integrity()

    def decode(self, count: int = 1) -> None:
        for _ in range(count):
            self.read(1)

    def begin(self) -> Conversation:
        self.read(self.prompt)
        self.decode()
        return self


def whole(batch_size: int, tokens: int) -> int:
    """Bytes of a batch that is resident."""
    return batch_size * -(-tokens // 256) * 32 * SHAPE.layers * SHAPE.kv_heads * (PAGE + 5 * 4)


# ------------------------------------------------------------------------------------------------------------ sizing


def test_a_context_that_fits_stays_resident() -> None:
    with gpu_of(2 * whole(2, 500)) as gpu:
        talk = Conversation(gpu, 2, 400).begin()
        talk.decode(2 * LOOK_STEPS)
        stats = talk.cache.stats()
        assert (talk.frames, stats.loads, stats.cpu_bytes) == ([], 0, 0)
        assert gpu.looks <= 20


def test_frames_are_sized_behind_the_prompt() -> None:
    """By what is free then: what the prompt's activations took is there again, and what came meanwhile is not."""
    total, sizes = whole(2, 1000) // 2, []
    for user in (0, total // 4):
        with gpu_of(total) as gpu:
            talk = Conversation(gpu, 2, 900)
            gpu.user = total // 3
            talk.read(300)
            assert gpu.free >= total // 10
            talk.read(600)
            gpu.user = user
            few = talk.frames
            talk.decode()
            margin = pressure.margin(total - user)
            assert max(few) < min(talk.frames)
            assert margin <= gpu.free <= margin + 2 * SHAPE.layers * SHAPE.kv_heads * (PAGE + 12) + total // 50
            sizes.append(talk.frames[0])
    assert sizes[1] < sizes[0]


def test_few_frames_while_a_prompt_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spin_hf.gpu_memory.PROMPT_FRAMES", 16)
    with gpu_of(whole(2, 1000) // 2) as gpu:
        talk = Conversation(gpu, 2, 900)
        talk.read(900)
        assert talk.frames == [16, 16]
        talk.decode()
        assert min(talk.frames) > 40
        talk.read(40)  # another turn: what was made stays, up to the larger margin
        assert min(talk.frames) > 40
        assert gpu.free >= 2 * pressure.margin(gpu.total) - 2 * SHAPE.layers * SHAPE.kv_heads * (PAGE + 12)


def test_all_pages_have_frames_at_low_load() -> None:
    """A context that was paged for a while: once there is room, nothing is loaded any more."""
    with gpu_of(4 * whole(1, 800)) as gpu:
        gpu.user = gpu.total - whole(1, 800) // 2
        talk = Conversation(gpu, 1, 700).begin()
        assert 0 < talk.frames[0] < 88
        gpu.user = 0
        talk.decode(LOOK_STEPS)
        assert min(talk.frames) >= -(-talk.length // 8)
        talk.read(20)  # reads everything
        pages, loads = talk.cache.stats().pages, talk.cache.stats().loads
        talk.decode(20)
        talk.read(20)
        assert talk.cache.stats().loads - loads <= talk.cache.stats().pages - pages  # but for pages that are new


def test_decode_steps_seldom_look() -> None:
    with gpu_of(whole(1, 800) // 2) as gpu:
        talk = Conversation(gpu, 1, 700).begin()
        gpu.looks = 0
        talk.decode(3 * LOOK_STEPS)
        assert gpu.looks <= 3 * 2


# ---------------------------------------------------------------------------------------------------------- pressure


def test_the_users_own_allocations() -> None:
    with gpu_of(whole(2, 900)) as gpu:
        gpu.user = gpu.total // 2
        talk = Conversation(gpu, 2, 700).begin()
        before, free = talk.frames[0], gpu.free
        gpu.user += free // 4  # not enough to care
        talk.decode(LOOK_STEPS)
        assert talk.frames[0] == before
        gpu.user += free // 2
        talk.decode(LOOK_STEPS)
        least = talk.frames[0]
        assert least < before
        assert gpu.free >= pressure.margin(gpu.total - gpu.user)
        gpu.user -= free // 2  # nor is that enough to grow
        talk.decode(LOOK_STEPS)
        assert talk.frames[0] == least
        gpu.user = 0
        talk.decode(LOOK_STEPS)
        assert talk.frames[0] > before


def test_never_below_what_a_step_needs() -> None:
    with gpu_of(whole(1, 900) // 2) as gpu:
        talk = Conversation(gpu, 1, 700).begin()
        needed = 2 + 3 + 3  # pages of sinks, recent window and budget
        talk.cache.release_gpu_memory()
        assert needed <= min(talk.frames) <= needed + 6  # there is room for the summaries of some more tokens
        gpu.user += gpu.free - 2000
        talk.decode(2 * LOOK_STEPS)
        assert needed <= min(talk.frames) <= needed + 6
        assert talk.cache.stats().loads > 0


def test_a_resident_context_goes_to_the_cpu_tier_under_pressure() -> None:
    with gpu_of(2 * whole(1, 900)) as gpu:
        talk = Conversation(gpu, 1, 700).begin()
        assert talk.frames == []
        gpu.user = gpu.free - 10
        talk.decode(LOOK_STEPS)
        assert min(talk.frames) > 20
        assert gpu.free >= pressure.margin(gpu.total - gpu.user)
        gpu.user = 0
        talk.decode(LOOK_STEPS)
        assert not talk.cache._shared.layers[0].store.lacks_frames


def test_without_memory_in_the_cpu_tier_a_resident_context_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with gpu_of(2 * whole(1, 900)) as gpu:
        talk = Conversation(gpu, 1, 700, cpu_memory=1000).begin()
        gpu.user = gpu.free - 10
        talk.decode(LOOK_STEPS)
        assert (talk.frames, talk.cache.release_gpu_memory()) == ([], 0)
    with gpu_of(2 * whole(1, 900)) as gpu:
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
    with gpu_of(whole(1, 900)) as gpu:
        talk = Conversation(gpu, 1, 700, seed=3).begin()
        frames = talk.frames
        talk.cache.batch_repeat_interleave(4)
        with elsewhere():
            talk.expected.cache.batch_repeat_interleave(4)
        talk.world = talk.world.rows([0] * 4)
        talk.decode(2)
        assert max(talk.frames) < min(frames or [10**6])
        talk.read(150)
        talk.decode(2)
        assert gpu.free >= pressure.margin(gpu.total) // 2


# ----------------------------------------------------------------------------------------------------- several caches


def test_a_second_cache_gets_its_share() -> None:
    with gpu_of(whole(1, 900)) as gpu:
        first = Conversation(gpu, 1, 800).begin()
        frames = first.frames
        second = Conversation(gpu, 1, 800, seed=1).begin()
        assert 0 < first.frames[0] < frames[0]
        assert 0.4 < bytes_of(second.cache) / bytes_of(first.cache) < 2.5
        assert gpu.free > 0
        for _ in range(2 * LOOK_STEPS):
            first.decode()
            second.decode()
        assert 0.4 < bytes_of(second.cache) / bytes_of(first.cache) < 2.5
        settled = first.frames, second.frames
        for _ in range(LOOK_STEPS):
            first.decode()
            second.decode()
        assert (first.frames, second.frames) == settled  # nothing oscillates
        gpu.caches.remove(second.cache)
        del second
        first.decode(LOOK_STEPS)
        assert first.frames[0] > settled[0][0]


def test_others_give_in_proportion_to_what_they_can() -> None:
    with gpu_of(3 * whole(1, 900)) as gpu:
        small, large = Conversation(gpu, 1, 250).begin(), Conversation(gpu, 1, 860, seed=1).begin()
        held = [bytes_of(talk.cache) for talk in (small, large)]
        Conversation(gpu, 2, 860, seed=2).begin()
        given = [before - bytes_of(talk.cache) for before, talk in zip(held, (small, large), strict=True)]
        assert 0 < given[0] < given[1]
        assert given[0] / given[1] == pytest.approx(held[0] / held[1], rel=0.5)


def test_a_cap_in_bytes_makes_others_give() -> None:
    with gpu_of(whole(1, 900)) as gpu:
        first = Conversation(gpu, 1, 800).begin()
        cap = whole(1, 900) // 2
        second = Conversation(gpu, 1, 800, seed=1, gpu_memory=cap).begin()
        assert bytes_of(second.cache) <= cap
        assert gpu.free >= 0
        first.decode(2)


def test_an_idle_cache_gives_everything_and_an_empty_one_all() -> None:
    with gpu_of(2 * whole(1, 900)) as gpu:
        first = Conversation(gpu, 1, 700).begin()
        first.cache.reset()
        held = bytes_of(first.cache)
        assert held > 0
        assert first.cache.release_gpu_memory() == held
        assert bytes_of(first.cache) == 0
        first.expected.cache.reset()
        first.length = 0
        first.begin()


def test_a_cache_of_another_thread_pays_at_its_next_step() -> None:
    with gpu_of(whole(2, 900)) as gpu:
        begun, second_runs, done = threading.Event(), threading.Event(), []
        talk = Conversation(gpu, 2, 800)

        def work() -> None:
            talk.begin()
            begun.set()
            second_runs.wait(60)
            before = talk.frames
            talk.decode()
            done.append((before, talk.frames))

        thread = threading.Thread(target=work)
        thread.start()
        assert begun.wait(60)
        before = talk.frames
        Conversation(gpu, 1, 250, seed=1).begin()
        assert talk.frames == before  # it may be in the middle of something
        second_runs.set()
        thread.join(60)
        ((held, left),) = done
        assert held == before
        assert left[0] < held[0]
        third = Conversation(gpu, 1, 800, seed=2).begin()  # whose thread is gone may be asked at once
        assert talk.frames[0] < left[0]
        talk.decode()
        third.decode()


def test_a_cache_in_the_middle_of_a_step_is_left_alone() -> None:
    with gpu_of(whole(2, 900)) as gpu:
        first = Conversation(gpu, 2, 800).begin()
        frames = first.frames
        layer, new = first.cache.layers[0], slice(first.length, first.length + 1)
        layer.append(first.world.keys[0][:, :, new], first.world.values[0][:, :, new], None)
        Conversation(gpu, 1, 250, seed=1).begin()
        assert first.frames == frames
        first.decode()  # takes back what was interrupted, pays, and goes on
        assert first.frames[0] < frames[0]


def test_a_copy_has_room() -> None:
    with gpu_of(whole(1, 900)) as gpu:
        talk = Conversation(gpu, 1, 800).begin()
        gpu.caches.append(deepcopy(talk.cache))
        assert gpu.free >= 0
        talk.decode(2)


# --------------------------------------------------------------------------------------------------- asked by the user


@pytest.mark.parametrize("cap", ["auto", 150_000])
@pytest.mark.parametrize("share", [0.1, 0.5, None])
def test_release_gpu_memory(cap: Any, share: float | None) -> None:
    with gpu_of(whole(1, 900) if cap == "auto" else 1 << 40) as gpu:
        talk = Conversation(gpu, 1, 800, gpu_memory=cap).begin()
        talk.decode(5)
        held, frames = bytes_of(talk.cache), talk.frames
        wanted = None if share is None else int(share * held)
        given = talk.cache.release_gpu_memory(wanted)
        assert given == held - bytes_of(talk.cache) > 0
        assert wanted is None or wanted <= given <= wanted + 0.1 * held
        talk.decode(5)
        assert talk.cache.release_gpu_memory(f"{given} B") <= given + 0.1 * held
        talk.decode(LOOK_STEPS)
        if frames:
            assert talk.frames[0] >= frames[0] - 1
        assert cap == "auto" or bytes_of(talk.cache) <= cap


def test_release_of_an_interrupted_step() -> None:
    """As in `except torch.OutOfMemoryError`: what the forward has appended is taken back."""
    with gpu_of(whole(1, 900)) as gpu:
        talk = Conversation(gpu, 1, 800).begin()
        new = slice(talk.length, talk.length + 1)
        talk.cache.update(talk.world.keys[0][:, :, new], talk.world.values[0][:, :, new], 0)
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
    world = World.random(SHAPE, 3, 700, seed=0)

    def run(cap: int, check: bool = False) -> None:
        driver, start = Driver(SHAPE, **OPTIONS, gpu_memory=cap), 0
        for stop in (100, 250, 257, *range(258, 290), 511, 513, 530, 531, 640, 700):
            driver.step(world, start, stop)
            assert not check or bytes_of(driver.cache) <= 1.02 * cap
            start = stop
            if stop == 280:
                driver.cache.release_gpu_memory()
        driver.cache.batch_select_indices(torch.tensor([0]))
        driver.cache.batch_repeat_interleave(3)
        assert not check or bytes_of(driver.cache) <= 1.02 * cap

    run(int(slack * smallest_gpu_memory(run)), check=True)


def test_too_little_for_one_step() -> None:
    with gpu_of(20_000) as gpu:
        with pytest.raises(BudgetError, match="gpu_memory"):
            Conversation(gpu, 1, 800).begin()
        gpu.total = whole(1, 900)
        Conversation(gpu, 1, 800).begin()
