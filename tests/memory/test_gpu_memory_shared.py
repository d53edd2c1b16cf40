"""Several caches with `gpu_memory="auto"` on one GPU: a starting cache gets memory, caches with buffer pages release it.

The GPU is only counted (`tests/support/fake_gpu.py`). Every history also runs with a cache without a cap, whose outputs must be
the same.
"""

from __future__ import annotations

import threading
from copy import deepcopy

import pytest

from tests.support.fake_gpu import CHECK_INTERVAL_STEPS, Conversation, bytes_of, fake_gpu, resident_batch_bytes


def test_a_second_cache_gets_its_share() -> None:
    with fake_gpu(resident_batch_bytes(1, 900)) as gpu:
        first = Conversation(gpu, 1, 800).begin()
        frames = first.frames
        second = Conversation(gpu, 1, 800, seed=1).begin()
        assert 0 < first.frames[0] < frames[0]
        assert 0.4 < bytes_of(second.cache) / bytes_of(first.cache) < 2.5
        assert gpu.free > 0
        for _ in range(2 * CHECK_INTERVAL_STEPS):
            first.decode()
            second.decode()
        assert 0.4 < bytes_of(second.cache) / bytes_of(first.cache) < 2.5
        settled = first.frames, second.frames
        for _ in range(CHECK_INTERVAL_STEPS):
            first.decode()
            second.decode()
        assert (first.frames, second.frames) == settled  # nothing oscillates
        gpu.caches.remove(second.cache)
        del second
        first.decode(CHECK_INTERVAL_STEPS)
        assert first.frames[0] > settled[0][0]


def test_a_prompt_in_parts_gets_its_share() -> None:
    """Its first piece fits, and no other cache releases memory for it."""
    with fake_gpu(resident_batch_bytes(1, 900)) as gpu:
        first = Conversation(gpu, 1, 800).begin()
        frames, second = first.frames, Conversation(gpu, 1, 800, seed=1)
        for _ in range(20):
            second.read(40)
        second.decode()
        assert 0 < first.frames[0] < frames[0]
        assert 0.4 < bytes_of(second.cache) / bytes_of(first.cache) < 2.5
        assert gpu.free > 0
        settled = first.frames, second.frames
        for _ in range(CHECK_INTERVAL_STEPS):
            first.decode()
            second.decode()
        assert (first.frames, second.frames) == settled


def test_others_give_in_proportion_to_what_they_can() -> None:
    with fake_gpu(3 * resident_batch_bytes(1, 900)) as gpu:
        small, large = Conversation(gpu, 1, 250).begin(), Conversation(gpu, 1, 860, seed=1).begin()
        held = [bytes_of(talk.cache) for talk in (small, large)]
        Conversation(gpu, 2, 860, seed=2).begin()
        given = [before - bytes_of(talk.cache) for before, talk in zip(held, (small, large), strict=True)]
        assert 0 < given[0] < given[1]
        assert given[0] / given[1] == pytest.approx(held[0] / held[1], rel=0.5)


def test_a_cap_in_bytes_makes_others_give() -> None:
    with fake_gpu(resident_batch_bytes(1, 900)) as gpu:
        first = Conversation(gpu, 1, 800).begin()
        cap = resident_batch_bytes(1, 900) // 2
        second = Conversation(gpu, 1, 800, seed=1, gpu_memory=cap).begin()
        assert bytes_of(second.cache) <= cap
        assert gpu.free >= 0
        first.decode(2)


def test_an_idle_cache_gives_everything_and_an_empty_one_all() -> None:
    with fake_gpu(2 * resident_batch_bytes(1, 900)) as gpu:
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
    with fake_gpu(resident_batch_bytes(2, 900)) as gpu:
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
    with fake_gpu(resident_batch_bytes(2, 900)) as gpu:
        first = Conversation(gpu, 2, 800).begin()
        frames = first.frames
        layer, new = first.cache.layers[0], slice(first.length, first.length + 1)
        layer.append(first.kv.keys[0][:, :, new], first.kv.values[0][:, :, new], None)
        Conversation(gpu, 1, 250, seed=1).begin()
        assert first.frames == frames
        first.decode()  # takes back what was interrupted, pays, and goes on
        assert first.frames[0] < frames[0]


def test_a_copy_has_room() -> None:
    with fake_gpu(resident_batch_bytes(1, 900)) as gpu:
        talk = Conversation(gpu, 1, 800).begin()
        gpu.caches.append(deepcopy(talk.cache))
        assert gpu.free >= 0
        talk.decode(2)
