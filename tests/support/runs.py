"""How modes run a model: the registry they enter, and the calls they are made of.

@mode def name(subject) -> Trace      enters MODES under its name
generate(...)                         model.generate with everything recorded
advance(...), decode(...)             model(...) by hand: several tokens, or greedy steps
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache

from tests.support.compare import Trace
from tests.support.subjects import Subject

Mode = Callable[[Subject], Trace]
MODES: dict[str, Mode] = {}
EVERYTHING: dict[str, Any] = {"budget": 1 << 20}
"""Options with which nothing is left out."""


def mode(function: Mode) -> Mode:
    """Register a mode under its function's name."""
    MODES[function.__name__] = function
    return function


def generate(subject: Subject, ids: torch.Tensor, cache: Any, new_tokens: int = 14, **kwargs: Any) -> Any:
    """`model.generate` with everything recorded and nothing random left open."""
    kwargs.setdefault("do_sample", False)
    if kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = torch.ones_like(ids)
    torch.manual_seed(7)
    return subject.model.generate(
        ids,
        past_key_values=cache,
        max_new_tokens=new_tokens,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )


def logits_of(call: Callable[..., Any], ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits of `call(ids)`, a model or what wraps it, with a cache."""
    with torch.no_grad():
        logits: torch.Tensor = call(ids, past_key_values=cache).logits
    return logits


def advance(
    subject: Subject,
    cache: Cache,
    ids: torch.Tensor,
    trace: Trace,
    label: str,
    valid: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Feed `ids` [rows, n], record the logits of all (or the valid) positions, return the greedy next [rows, 1]."""
    with torch.no_grad():
        logits = subject.model(input_ids=ids, past_key_values=cache, use_cache=True, **kwargs).logits
    trace.add_logits(label, logits, valid)
    return logits[:, -1:].argmax(-1)


def decode(
    subject: Subject, cache: Cache, token: torch.Tensor, trace: Trace, label: str, steps: int, **kwargs: Any
) -> torch.Tensor:
    """`steps` greedy steps from `token` [rows, 1] on; returns the next token."""
    for step in range(steps):
        trace.add_tokens(f"{label} {step}", token)
        token = advance(subject, cache, token, trace, f"{label} {step}", **kwargs)
    return token
