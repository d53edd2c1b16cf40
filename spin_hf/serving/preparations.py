"""Reuses the prepared arguments of a greedy request for the next one with the same arguments, as preparing takes long.

    arguments, and the model's generation config    equal, except for the prompt and `max_new_tokens`
    result of `prepare`                             no processors; it ends by its number of new tokens or by an end token

Everything else is prepared for each request: processors and criteria may keep a state, and may depend on the prompt.
"""

from __future__ import annotations

from array import array
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from .generation import Generation, prepare

_PLAIN = (int, float, bool, str, type(None), torch.dtype)


class Preparations:
    """Prepares the requests of one loop.

    Args:
        model: the model.
        tokenizer: for stop strings; None for none.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._last: tuple[str, frozenset[int]] | None = None
        """Arguments of the last request whose result may be reused, and its end tokens."""

    def of(
        self, prompt: array[int], generation_config: GenerationConfig | None, seed: int | None = None, **kwargs: Any
    ) -> Generation:
        """As `prepare`, for the ids of a prompt."""
        given = self.model.generation_config if generation_config is None else generation_config
        number: Any = kwargs.get("max_new_tokens", getattr(given, "max_new_tokens", None))
        arguments = None
        if seed is None and type(number) is int and number > 0:
            arguments = self._arguments(generation_config, kwargs)
        last = self._last  # another thread may replace it
        if arguments is not None and last is not None and last[0] == arguments:
            return Generation(LogitsProcessorList(), None, len(prompt) + number, last[1])
        ids = torch.tensor([prompt.tolist()], device=self.model.device)
        made = prepare(self.model, ids, generation_config, tokenizer=self.tokenizer, seed=seed, **kwargs)
        has_more = made.processors or made.criteria or made.generator or made.deadline
        if arguments is not None and not has_more and made.max_length == len(prompt) + number:
            self._last = arguments, made.end_tokens
        return made

    def _arguments(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> str | None:
        """The arguments of a request, without `max_new_tokens`; None if some are no plain values."""
        configs = [
            None if config is None else config.__dict__ for config in (generation_config, self.model.generation_config)
        ]
        found = [{**(each or {}), "max_new_tokens": None} for each in (kwargs, *configs)]
        return repr((configs[0] is None, found)) if _is_plain(found) else None


def _is_plain(value: Any) -> bool:
    """Whether a value and all within it is shown in full by `repr`."""
    if type(value) is dict:
        return _is_plain(list(value.values()))
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return type(value) in _PLAIN
