"""Loops over a tiny Llama, and what its model answers alone."""

from __future__ import annotations

from typing import Any

from spin_hf import RequestLoop
from tests.support.loop_schedules import generated_alone
from tests.support.zoo import build_model, random_tokens

OPTIONS: dict[str, Any] = dict(budget=4096, method="shadowkv")
MODEL = build_model("llama")
PROMPT = random_tokens(1, 40)[0].tolist()


def made(**options: Any) -> RequestLoop:
    return RequestLoop(MODEL, **{**OPTIONS, "max_rows": 4, **options})


def alone(prompt: list[int] = PROMPT, **kwargs: Any) -> list[int]:
    return generated_alone(MODEL, prompt, OPTIONS, **kwargs)
