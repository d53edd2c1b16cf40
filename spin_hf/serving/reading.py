"""A prompt that is read in chunks into a cache of its own, between the steps of other sequences.

    ids      [ restored or forked ][ chunk ][ chunk ] ... [ rest ]  ->  logits of the last token
    chunk    one forward; each attends to all earlier tokens, as in `graph/prompt_reader.py`

A prompt is read in one forward if chunks would change its result (some linear attention, chunked attention).
"""

from __future__ import annotations

from array import array
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..cache import SpinCache
from ..integration.prefill_hook import CACHE_NAME
from ..kernels import BLOCK_TOKENS
from ..memory.admission import check_first_batch

_LEAST_REST = 64
"""Fewer tokens than these are no chunk of their own: methods cluster by the queries of the last chunk."""


class PromptReading:
    """Reads the ids of a request into its cache.

    Args:
        model: the model.
        cache: a cache of the model, which may hold the first of the ids.
        ids: all tokens, of type "q". At least one is not held.
    """

    def __init__(self, model: Any, cache: SpinCache, ids: array[int]) -> None:
        self.model, self.cache, self.ids = model, cache, ids
        self._prompts = cache.calls.prompts
        self._open = ExitStack()
        self._checked = False

    @property
    def held(self) -> int:
        """Tokens read so far."""
        return int(self.cache.get_seq_length())

    @property
    def left(self) -> int:
        """Tokens to be read."""
        return len(self.ids) - self.held

    @property
    def may_split(self) -> bool:
        """Whether the prompt may be read in several forwards."""
        return self._prompts.may_split

    def largest_chunk(self) -> int:
        """Tokens of one forward that free memory allows for."""
        whole = torch.empty((1, self.left), dtype=torch.int64, device=self.model.device)
        return min(self.left, self._prompts.chunk_size(self.model, whole))

    def chunk(self, wanted: int, stop: int) -> int:
        """Tokens of the next forward: about `wanted`, whole blocks if more follow, and not beyond `stop`."""
        held = self.held
        if not self.may_split:
            return stop - held
        lead = self._prompts.lead(self.left)
        if lead and held + lead < stop:
            return lead
        if wanted >= stop - held:
            return stop - held
        size = max(BLOCK_TOKENS, wanted // BLOCK_TOKENS * BLOCK_TOKENS)
        return stop - held if stop - held - size < _LEAST_REST else size

    def read(self, num_tokens: int) -> Tensor:
        """One forward over the next `num_tokens` tokens. Returns the last one's logits, [1, vocabulary], float32.

        Raises:
            BudgetError, CapacityError, torch.OutOfMemoryError: the cache is as before.
        """
        held, device = self.held, self.model.device
        self._begin(held)
        new = torch.tensor([self.ids[held : held + num_tokens].tolist()], dtype=torch.int64, device=device)
        positions = torch.arange(held, held + num_tokens, device=device)[None]
        kept = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        with torch.inference_mode(False), torch.no_grad():
            output = self.model(
                input_ids=new,
                position_ids=positions,
                use_cache=True,
                return_dict=True,
                **kept,
                **{CACHE_NAME: self.cache},
            )
            logits: Tensor = output.logits[:, -1].to(copy=True, dtype=torch.float32)
        return logits

    def close(self) -> None:
        """End reading. What was read stays in the cache."""
        self._open.close()
        self._checked = False

    def _begin(self, held: int) -> None:
        """Before the first forward: check that all tokens fit, and mark what follows as chunks of one prompt."""
        if self._checked:
            return
        state, passes = self.cache._state, self.cache._passes
        if held:
            state.sequences.check_room(held, len(self.ids) - held)
        else:
            check_first_batch(state, passes.gpu, len(self.ids), 1)
        self._checked = True
        if self.may_split:
            self._open.enter_context(passes.reading(len(self.ids)))
