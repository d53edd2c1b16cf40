"""Masks between captured steps: a 4-D mask runs eagerly and is applied exactly; a padding mask is checked before the launch."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

import pytest
import torch

from spin_hf import AttentionError, BatchSizeError, SpinCache
from tests.support.graph_recorder import capture_on_cpu, eagerly
from tests.support.zoo import build_model, random_tokens

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.environ.get("TRITON_INTERPRET") != "1", reason="needs interpreted kernels"
)


@pytest.mark.parametrize("form", ["bool", "columns", "float"])
def test_between_replays(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build_model("llama").eval(), random_tokens(2, 50)
    recorder = capture_on_cpu(monkeypatch)
    results = []
    for mode in (eagerly(model), nullcontext()):
        with mode:
            cache = SpinCache(model, budget=1 << 20, method="shadowkv")
        logits = []
        with torch.no_grad():
            model(ids[:, :40], past_key_values=cache)
            for i in range(40, 48):
                given = None
                if i in (43, 46):
                    given = torch.ones(2, 1, 1, i + 1, dtype=torch.bool)
                    given[:, ..., 5:25] = False
                    if form == "float":
                        given = torch.zeros(given.shape).masked_fill(~given, -torch.inf)
                    elif form == "bool":
                        given = given.expand(-1, 4, -1, -1)
                out = model(input_ids=ids[:, i : i + 1], attention_mask=given, past_key_values=cache)
                logits.append(out.logits)
        cache.check_integrity()
        results.append(logits)
    assert recorder.replays > 0
    for eager, captured in zip(*results, strict=True):
        torch.testing.assert_close(captured, eager, rtol=0, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_refused_between_replays(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refused call changes nothing, and replays continue."""
    model, ids = build_model("llama").eval(), random_tokens(2, 50)
    recorder = capture_on_cpu(monkeypatch)
    mask = torch.ones(2, 50, dtype=torch.long)
    if padded:
        mask[0, :9] = mask[1, :4] = 0
    results = []
    for wrong in (False, True):
        cache, logits = SpinCache(model, budget=16, recent_window=8, method="shadowkv"), []
        with torch.no_grad():
            model(ids[:, :40], attention_mask=mask[:, :40], past_key_values=cache)
            for i in range(40, 48):
                if wrong and i > 42:
                    integers = torch.ones(2, 1, 1, i + 1, dtype=torch.long)
                    with pytest.raises(AttentionError, match=r"torch\.int64"):
                        model(input_ids=ids[:, i : i + 1], attention_mask=integers, past_key_values=cache)
                    if padded:
                        with pytest.raises(BatchSizeError, match="a row for each of the 2 sequences"):
                            model(input_ids=ids[:, i : i + 1], attention_mask=mask[:1, : i + 1], past_key_values=cache)
                out = model(input_ids=ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache)
                logits.append(out.logits)
        assert recorder.replays > 0
        cache.check_integrity()
        results.append(logits)
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
