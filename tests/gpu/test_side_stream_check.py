"""On a GPU: a mask is checked on a side stream, with no wait before the launch and none for the full step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spin_hf import SpinCache
from spin_hf.graph.replay_check import ReplayCheck, SideStreamCheck
from tests.support.synchronisation import no_synchronisation
from tests.support.zoo import build_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

OPTIONS: dict[str, Any] = {"method": "shadowkv", "budget": 24, "recent_window": 8}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.uint8])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_result_is_that_of_the_mask_and_does_not_wait_for_the_step(dtype: torch.dtype, mode: Any) -> None:
    check = SideStreamCheck(torch.device("cuda", torch.cuda.current_device()))
    step = torch.cuda.Event()
    with mode():
        mask = torch.ones((2, 5000), dtype=dtype, device="cuda")
        for turn, full in enumerate((True, False, True)):
            mask[1, 4321] = int(full)
            check.mark()
            torch.cuda._sleep(200_000_000)  # the step
            step.record()
            check.launch(lambda: mask.all())
            assert check.result() == full
            assert not turn or not step.query()  # the first loads kernels
            torch.cuda.synchronize()


@torch.no_grad()
def test_steps_with_a_mask_do_not_synchronise() -> None:
    model = build_model("llama").cuda().eval()
    cache = SpinCache(model, **OPTIONS)
    model(torch.full((2, 90), 5, device="cuda"), past_key_values=cache)
    token = torch.full((2, 1), 5, device="cuda")
    masks = [torch.ones((2, 91 + i), dtype=torch.int64, device="cuda") for i in range(40)]
    for mask in masks[:3]:
        model(token, past_key_values=cache, attention_mask=mask)
    with no_synchronisation():
        for mask in masks[3:]:
            model(token, past_key_values=cache, attention_mask=mask)
    assert isinstance(cache.calls.steps.replay_check, ReplayCheck)
    assert cache.calls.steps.replay_check.side_stream is not None
    cache.check_integrity()


@torch.no_grad()
def test_what_is_taken_back_on_a_gpu() -> None:
    """A parameter replaced, and padding that appears: as eager steps of the same kernels."""
    logits = []
    for captured in (False, True):
        model = build_model("llama").cuda().eval()
        cache = SpinCache(model if captured else model.config, **OPTIONS)
        ids = torch.randint(3, 100, (2, 102), generator=torch.Generator().manual_seed(1)).cuda()
        mask = torch.ones_like(ids)
        parts = [model(ids[:, :90], past_key_values=cache, attention_mask=mask[:, :90]).logits[:, -1:]]
        for place in range(90, 102):
            if place == 94:
                weight = model.model.layers[1].mlp.up_proj
                weight.weight = torch.nn.Parameter(weight.weight * 2)
            if place == 98:
                mask[0, :11] = 0
            options = {"attention_mask": mask[:, : place + 1], "position_ids": torch.full((2, 1), place, device="cuda")}
            parts.append(model(ids[:, place : place + 1], past_key_values=cache, **options).logits)
            cache.check_integrity()
        logits.append(torch.cat(parts, 1))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
