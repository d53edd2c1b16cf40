"""Several caches with `gpu_memory="auto"` on one GPU: a starting cache gets memory, caches with buffer pages release it.

The GPU is only counted (`tests/support/fake_gpu.py`). Every history also runs with a cache without a cap, whose outputs must be
the same.
"""

from __future__ import annotations

import threading
from copy import deepcopy
from unittest.mock import patch

import pytest
import torch

from spin_hf import BudgetError, SpinCache
from spin_hf.memory.admission import check_first_batch
from tests.support.cache_driver import CacheDriver, RandomKV
from tests.support.fake_gpu import CHECK_INTERVAL_STEPS, SHAPE, Conversation, bytes_of, fake_gpu, resident_batch_bytes
from tests.support.inspection import forward_of, state_of
from tests.support.zoo import build_model, random_tokens


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


def test_frames_are_given_in_proportion_to_how_many_there_are() -> None:
    with fake_gpu(3 * resident_batch_bytes(1, 900)) as gpu:
        small, large = Conversation(gpu, 1, 500).begin(), Conversation(gpu, 1, 860, seed=1).begin()
        for talk in (small, large):
            forward_of(talk.cache).gpu.give_back(1000)
        assert small.frames
        assert large.frames
        held = [bytes_of(talk.cache) for talk in (small, large)]
        Conversation(gpu, 2, 860, seed=2).begin()
        given = [before - bytes_of(talk.cache) for before, talk in zip(held, (small, large), strict=True)]
        assert 0 < given[0] < given[1]
        assert given[0] / given[1] == pytest.approx(held[0] / held[1], rel=0.5)


def test_as_few_caches_as_possible_move() -> None:
    """A cache moves all of its pages, and there is no way back."""
    with fake_gpu(int(4.2 * resident_batch_bytes(1, 900))) as gpu:
        talks = [Conversation(gpu, 1, length, seed=length).begin() for length in (500, 860, 861)]
        large = [Conversation(gpu, 1, 860, seed=number).begin() for number in (2, 3)]
        assert not large[0].frames
        assert [bool(talk.frames) for talk in talks] == [False, True, False], (
            "the one that was used longest ago of those that suffice"
        )
        small = Conversation(gpu, 1, 250, seed=4).begin()
        assert not small.frames
        assert not talks[0].frames, "frames are given before pages move"


def test_a_prompt_that_is_read_asks_for_nothing_more() -> None:
    """Its pages are on the GPU, and memory is not low: nobody moves for a larger margin."""
    whole = resident_batch_bytes(1, 900)
    with fake_gpu(6 * whole) as gpu:
        talks = [Conversation(gpu, 1, 860, seed=seed).begin() for seed in range(2)]
        talks.append(Conversation(gpu, 1, 860, seed=2))
        talks[2].read(860)
        gpu.user = gpu.free - int(0.12 * whole)
        talks[2].decode()
        assert not any(talk.frames for talk in talks)


def test_a_cache_whose_pages_stay_keeps_its_cap() -> None:
    """With a lower cap its next segment would move all of its pages. A step's frames take as much as its pages here."""
    kv = RandomKV.random(SHAPE, 1, 900, 0)
    with fake_gpu(8 * resident_batch_bytes(1, 900)) as gpu:
        driver = CacheDriver(SHAPE, budget=2048, num_sink_tokens=4, recent_window=10)
        gpu.caches.append(driver.cache)
        memory = forward_of(driver.cache).gpu
        driver.step(kv, 0, 200)
        driver.step(kv, 200, 201)
        caps = dict(memory.caps)
        memory.give_back()
        assert memory.caps == caps
        driver.step(kv, 201, 900)
        assert driver.cache.paged_layers[0].store.frames is None


def test_a_prompt_that_found_no_room_tries_again() -> None:
    """Its cap is that of the moment, not of its first try."""
    model, tokens = build_model("llama"), random_tokens(1, 400)
    places = patch("spin_hf.memory.admission.places", lambda state: [torch.device("cpu")] * len(state.layers))
    has_gpu = patch("torch.cuda.is_available", lambda: True)
    with fake_gpu(4 * resident_batch_bytes(1, 900)) as gpu, places, has_gpu:
        cache = SpinCache(model, "shadowkv", budget=64)
        gpu.user = gpu.total - 2000
        with pytest.raises(BudgetError):
            check_first_batch(state_of(cache), forward_of(cache).gpu, 400, 1)
        gpu.user = 0
        check_first_batch(state_of(cache), forward_of(cache).gpu, 400, 1)
        model(tokens, past_key_values=cache)
        assert cache.get_seq_length() == 400


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
