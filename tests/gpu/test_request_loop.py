"""A loop on a GPU: tokens of each request as alone, with pages on the GPU, with pages in host memory, and under pressure."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spin_hf import RequestLoop, generate_batch
from tests.support.freed_memory import without_gc
from tests.support.loop_schedules import generated_alone
from tests.support.zoo import build_model, random_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

LENGTHS = (5, 300, 40, 170, 90, 600, 33, 200)
NEW = 12
SAMPLING: dict[str, Any] = dict(do_sample=True, temperature=0.9, top_k=30)


def alone(model: Any, prompt: list[int], **kwargs: Any) -> list[int]:
    return generated_alone(model, prompt, {"budget": 4096}, max_new_tokens=NEW, **kwargs)


def prompts() -> list[list[int]]:
    return [random_tokens(1, length, seed=length)[0].tolist() for length in LENGTHS]


@pytest.mark.parametrize(
    "options", [{}, {"gpu_memory": "2MB"}, {"method": "shadowkv"}], ids=["fitted", "capped", "shadowkv"]
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
def test_tokens_are_those_of_each_request_alone(family: str, options: dict[str, Any]) -> None:
    model = build_model(family).cuda().eval()
    expected = [alone(model, prompt) for prompt in prompts()]
    results = generate_batch(model, prompts(), budget=4096, max_rows=3, max_new_tokens=NEW, progress=False, **options)
    assert [result.tokens for result in results] == expected
    torch.cuda.synchronize()


def test_seeds() -> None:
    model = build_model("llama").cuda().eval()
    expected = []
    for number, prompt in enumerate(prompts()):
        torch.manual_seed(number)
        expected.append(alone(model, prompt, **SAMPLING))
    results = generate_batch(
        model, prompts(), budget=4096, max_rows=5, max_new_tokens=NEW, seed=0, progress=False, **SAMPLING
    )
    assert [result.tokens for result in results] == expected


def test_steps_and_prompts_that_run_out_of_memory_shrink_the_batch() -> None:
    model = build_model("llama").cuda().eval()
    expected = [alone(model, prompt) for prompt in prompts()]
    with RequestLoop(model, budget=4096, max_rows=4, max_slowdown=None) as loop:  # all prompts are read first
        step, fails = loop.scheduler.batch.step, [True] * 12

        def failing(tokens: dict[int, int], ids: torch.Tensor | None) -> torch.Tensor:
            if len(tokens) > 2 and fails and fails.pop():
                raise torch.OutOfMemoryError("a step")
            return step(tokens, ids)

        loop.scheduler.batch.step = failing  # type: ignore[method-assign]
        handles = [loop.submit(prompt, max_new_tokens=NEW) for prompt in prompts()]
        assert [handle.result(120).tokens for handle in handles] == expected
        assert loop.stats().paused > 0


def test_a_sequence_that_waits_takes_the_place_of_another() -> None:
    model = build_model("llama").cuda().eval()
    expected = [alone(model, prompt) for prompt in prompts()]
    with RequestLoop(model, budget=4096, max_rows=2, max_wait_s=0.0, gpu_memory="2MB") as loop:
        handles = [loop.submit(prompt, max_new_tokens=NEW) for prompt in prompts()]
        assert [handle.result(120).tokens for handle in handles] == expected
        assert loop.stats().paused > 0


def test_ended_requests_free_their_memory() -> None:
    """Without the garbage collector, so that many requests need no more memory than those that run."""
    model = build_model("llama").cuda().eval()
    long = random_tokens(1, 4000)[0].tolist()
    with without_gc(), RequestLoop(model, budget=64, max_rows=1, share_prefixes=False) as loop:
        held = []
        for _ in range(5):
            loop.submit(long, max_new_tokens=NEW).result(120)
            loop.submit(prompts()[0], max_new_tokens=1).result(120)  # behind it the first one's row is empty
            held.append(torch.cuda.memory_allocated())
    pages = (
        4000 * 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * 16 * 4
    )  # float32, heads of 16
    assert held[-1] - held[1] < pages
