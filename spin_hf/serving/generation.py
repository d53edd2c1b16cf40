"""How a request generates: its processors, criteria and limits, prepared by transformers' own `generate`.

    model.generate(ids, ..., custom_generate=take)  ->  transformers merges and checks arguments and configs, and makes
                                                        processors and criteria  ->  take(...)  ->  Generation

So arguments mean what they mean for `generate`, in every version of transformers. No forward runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteriaList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from ..config import require_count
from ..errors import OptionError, OptionTypeError
from ..integration.prefill_hook import CACHE_NAME, CACHE_NAMES

_MODES = ("greedy_search", "sample")
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_REFUSED = {
    "assistant_model": "a loop decodes one token of each request at a time",
    "streamer": "iterate over the handle that submit returns",
    "synced_gpus": "each process of a machine runs a loop of its own",
    "custom_generate": "a loop has a decoding loop of its own",
    "negative_prompt_ids": "a loop has one cache for each request",
    "inputs_embeds": "a loop takes token ids",
    "attention_mask": "a loop takes single sequences without padding",
    "position_ids": "a loop takes single sequences without padding",
}
"""Argument of `generate` -> why a loop refuses it."""
_OWN_ARGUMENTS = {*CACHE_NAMES, "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
"""What `generate` itself hands to a decoding method for the model."""
_SEEDS = 1 << 63
_lock = threading.Lock()
"""Held while a model's own generation config is changed."""


@dataclass(eq=False)
class Generation:
    """How one request chooses tokens, and when it ends.

    Attributes:
        processors: a `LogitsProcessorList`, on the model's device.
        generator: of this request's random numbers; None for greedy search.
        max_length: most tokens, with the prompt.
        end_tokens: ids that end the text.
        deadline: `time.time()` at which it ends; None for no limit.
        criteria: all others that may end it, called with ids [1, n] on the model's device.
    """

    processors: Any
    generator: torch.Generator | None
    max_length: int
    end_tokens: frozenset[int] = frozenset()
    deadline: float | None = None
    criteria: list[Any] = field(default_factory=list)

    def ends(self, length: int, token: int) -> str | None:
        """Why the request ends with `token`, without the criteria that need all ids; None if it goes on.

        Args:
            length: tokens with the prompt and this one.
        """
        if token in self.end_tokens:
            return "stop"
        late = self.deadline is not None and time.time() > self.deadline
        return "length" if length >= self.max_length or late else None


def prepare(
    model: Any, ids: Tensor, generation_config: GenerationConfig | None, *, tokenizer: Any = None, seed: int | None = None,
    logits_processor: Any = None, stopping_criteria: Any = None, stop_strings: Any = None, **kwargs: Any,
) -> Generation:  # fmt: skip
    """Processors, criteria and limits of a request.

    Args:
        ids: [1, n], the prompt, on the model's device.
        generation_config, logits_processor, stopping_criteria, kwargs: as for `generate`.
        tokenizer: for stop strings.
        seed: of the request's random numbers; None draws one from torch's global generator.
        stop_strings: a text or several that end the answer.
    Raises:
        OptionError, OptionTypeError: an argument that a loop cannot serve.
        What `generate` raises for arguments that it does not accept.
    """
    for name, reason in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise OptionError(
                f"{name}: expected no such argument for a request, got one: {reason}; call generate, or leave it out"
            )
    if seed is not None:
        seed = require_count("seed", seed, 0, _SEEDS - 1, example=0)
    found: list[dict[str, Any]] = []

    def take(model: Any, input_ids: Tensor, **prepared: Any) -> Tensor:
        found.append(prepared)
        return input_ids

    config = generation_config if generation_config is not None else model.generation_config
    strings = stop_strings if stop_strings is not None else getattr(config, "stop_strings", None)
    criteria = StoppingCriteriaList(stopping_criteria or [])
    if strings is not None:  # `generate` hands no tokenizer to what a custom decoding method needs
        if tokenizer is None:
            raise OptionTypeError("tokenizer: expected one for stop_strings, got None; pass the model's tokenizer")
        criteria.append(StopStringCriteria(tokenizer, strings))
        if generation_config is not None and generation_config.stop_strings is not None:
            generation_config = GenerationConfig.from_dict({**generation_config.to_dict(), "stop_strings": None})
    with _without_stop_strings(model):
        model.generate(
            ids, generation_config, logits_processor=logits_processor, stopping_criteria=criteria, custom_generate=take,
            attention_mask=torch.ones_like(ids), **{CACHE_NAME: DynamicCache()}, **kwargs,
        )  # fmt: skip
    (prepared,) = found
    _check(prepared)
    return _made(prepared, ids.device, seed)


@contextmanager
def _without_stop_strings(model: Any) -> Iterator[None]:
    """Within this context the model's own generation config has no stop strings."""
    strings = getattr(model.generation_config, "stop_strings", None)
    if strings is None:
        yield
        return
    with _lock:
        model.generation_config.stop_strings = None
        try:
            yield
        finally:
            model.generation_config.stop_strings = strings


def _check(prepared: dict[str, Any]) -> None:
    """Refuse what `generate` can do and a loop cannot."""
    config: GenerationConfig = prepared["generation_config"]
    mode = str(config.get_generation_mode().value)
    if mode not in _MODES:
        raise OptionError(
            f"generation_config: expected greedy search or sampling, got {mode}; leave out beams, assistants and prompt "
            "lookup, or call generate"
        )
    copies = getattr(config, "num_return_sequences", None) or 1
    if copies > 1:
        raise OptionError(
            f"num_return_sequences: expected 1 for a request, got {copies}; submit it {copies} times, its prompt is read once, "
            "or call generate_batch"
        )
    for name in _OUTPUTS:
        if getattr(config, name, None):
            raise OptionError(f"{name}: expected False, got True: a loop returns tokens only; call generate")
    if getattr(config, "token_healing", None):
        raise OptionError("token_healing: expected False, got True; heal the prompt first, with model.heal_tokens")
    if config.use_cache is False:
        raise OptionError(
            "use_cache: expected True, got False: a loop decodes with a cache; leave it out, or call generate"
        )
    strange = sorted(
        name
        for name, value in prepared.items()
        if name not in _OWN_ARGUMENTS and value is not None and name not in _OF_GENERATE and value is not False
    )
    if strange:
        raise OptionError(
            f"{strange[0]}: expected arguments of text generation, got one that the model would be called with; a loop takes "
            "token ids only, call generate"
        )


_OF_GENERATE = {"logits_processor", "stopping_criteria", "generation_config"}


def _made(prepared: dict[str, Any], device: torch.device, seed: int | None) -> Generation:
    config: GenerationConfig = prepared["generation_config"]
    generator = None
    if config.do_sample:
        seed = int(torch.randint(_SEEDS - 1, ())) if seed is None else seed
        generator = torch.Generator(device).manual_seed(seed)
    made = Generation(prepared["logits_processor"], generator, int(config.max_length))
    for criterion in prepared["stopping_criteria"]:
        if type(criterion) is MaxLengthCriteria:
            made.max_length = min(made.max_length, int(criterion.max_length))
        elif type(criterion) is EosTokenCriteria:
            made.end_tokens |= frozenset(criterion.eos_token_id.tolist())
        elif type(criterion) is MaxTimeCriteria:
            made.deadline = criterion.initial_timestamp + criterion.max_time
        else:
            made.criteria.append(criterion)
    return made
