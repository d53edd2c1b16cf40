"""Prompts of requests: token ids, texts and chats become one list of ids each."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config import shown
from ..errors import OptionError, OptionTypeError


def prompt_of(given: Any, tokenizer: Any, vocabulary: int) -> array[int]:
    """Ids of a prompt, of type "q".

    Args:
        given: token ids as a list or a tensor [n] or [1, n]; a text; a chat, which is a list of messages; or what a tokenizer
            returns for one text.
        tokenizer: for texts and chats; None for none.
        vocabulary: number of ids of the model.
    Raises:
        OptionTypeError, OptionError: it is none of these, is empty, or has an id that the model does not know.
    """
    if isinstance(given, str):
        ids = _needed(tokenizer, "a text")(given)["input_ids"]
    elif isinstance(given, (list, tuple)) and given and isinstance(given[0], Mapping):
        template = _needed(tokenizer, "a chat").apply_chat_template
        ids = template(list(given), add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    elif isinstance(given, Mapping) and "input_ids" in given:
        mask = given.get("attention_mask")
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise OptionError(
                "inputs: expected a prompt without padding, got a padding mask with zeros; pass its own tokens only"
            )
        ids = given["input_ids"]
    else:
        ids = given
    return _checked(_flat(ids, given), vocabulary)


def _needed(tokenizer: Any, what: str) -> Any:
    if tokenizer is None:
        raise OptionTypeError(f"tokenizer: expected one for {what}, got None; pass tokenizer=..., or token ids")
    return tokenizer


def _flat(ids: Any, given: Any) -> Tensor:
    """[n], int64, on the CPU."""
    try:
        found = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionTypeError(
            "inputs: expected a list of token ids, a tensor of one sequence, a text or a chat, got "
            f"{type(given).__name__}: {shown(given, 60)}; pass one request for each sequence, without padding"
        ) from error
    if found.dim() == 2 and found.shape[0] == 1:
        found = found[0]
    is_empty = found.dim() == 1 and not len(found)
    are_ids = found.dim() == 1 and found.dtype != torch.bool and not found.is_floating_point()
    if not are_ids and not is_empty:
        raise OptionTypeError(
            "inputs: expected a list of token ids, a tensor of one sequence, a text or a chat, got a tensor of shape "
            f"{tuple(found.shape)} and dtype {found.dtype}; pass one request for each sequence, without padding"
        )
    return found.detach().to("cpu", torch.int64)


def _checked(ids: Tensor, vocabulary: int) -> array[int]:
    if not len(ids):
        raise OptionError("inputs: expected at least one token in a prompt, got none; pass the tokenizer's first token")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        wrong = low if low < 0 else high
        raise OptionError(
            f"inputs: expected ids from 0 to {vocabulary - 1}, got {wrong}; use the tokenizer of this model"
        )
    return array("q", ids.contiguous().numpy().tobytes())
