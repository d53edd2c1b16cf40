"""Dense rectification: generated tokens are read again like a prompt, which replaces their keys and values.

    tokens    [ prompt ][ exact ][ decoded by sparse steps ] next
                                  exact             committed

A sparse step attends to a part of the context, so the hidden states of its token, and the keys and values that later layers
cache of it, are off by a little. Later tokens read these, and the errors add up over a long output. Reading the last tokens
again in one forward, with attention to all, ends that. It costs as much as a prompt chunk of as many tokens.

Source: Rectified Sparse Attention, arXiv 2506.04108.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CapacityError
from ..forward_log import ForwardLog
from ..forward_pass import ForwardPass
from ..inference_mode import outside_inference_mode
from ..integration.forward_hook import new_inputs
from ..integration.layer_types import is_placeholder
from ..kernels.descriptor_fields import MAX_QUERIES
from ..layer import SpinLayer
from ..storage import permute_pages
from .prompt_reader import PromptReader

logger = logging.getLogger("spin_hf")

_PLAIN = (bool, str, int, float)
_NOT_REPEATED = ("logits_to_keep", "output_hidden_states", "output_attentions", "output_router_logits", "labels")


class Rectifier:
    """Reads generated tokens of one cache again.

    Args:
        layers, passes, log: of the cache.
        prompts: reads prompts of the cache.
    """

    def __init__(self, layers: list[Any], passes: ForwardPass, log: ForwardLog, prompts: PromptReader) -> None:
        self.layers, self.passes, self.state, self.log, self.prompts = layers, passes, passes.state, log, prompts
        self.interval = self.state.options.rectify_interval

    def before(self, module: nn.Module, forward: Callable[..., Any], kwargs: dict[str, Any], name: str) -> None:
        """Read the tokens behind the exact ones again, if it is time. To be called before a forward.

        If memory runs out, the tokens stay as they were, with a warning.

        Args:
            kwargs: arguments of the forward, with the cache under `name`.
        Raises:
            Whatever `forward` raises. The cache is as before.
        """
        if self.interval is None or not self._is_due(kwargs):
            return
        self.log.settle(self.layers)
        first, stop = self.state.exact, self.state.committed
        given = None if self._are_clustered(first) else self._arguments(module, forward, kwargs, name, first, stop)
        if given is None:
            self.state.exact = stop  # so that not every step tries, and no more than an interval is ever read
            return
        try:
            with self._put_back_on_error(first, stop), torch.no_grad():
                self.passes.truncate(first)
                with self.log.watching(self.layers):
                    self.prompts.of(module, forward, given, name)(**given)
        except (CapacityError, torch.OutOfMemoryError) as error:
            self.state.exact = stop  # tried again with the next tokens
            logger.warning(_NO_MEMORY, self.state.model_name, stop - first, str(error).split("\n")[0])
            return
        self.state.tokens = self.state.tokens.recorded(first, given["input_ids"].to(torch.int32))

    def _is_due(self, kwargs: dict[str, Any]) -> bool:
        """Whether enough tokens are behind the exact ones, or a prompt follows."""
        state, new = self.state, new_inputs(kwargs)
        behind = state.committed - state.exact
        if new is None or behind <= MAX_QUERIES or new.shape[0] != state.sequences.batch_size:
            return False
        return behind >= (self.interval or 0) or new.shape[1] > MAX_QUERIES

    def _are_clustered(self, first: int) -> bool:
        """Whether some tokens from `first` on, or of the window before it, are clustered, as behind steps of a `RowBatch`."""
        sequences = self.state.sequences
        clustered = sequences.spans.num_pages * sequences.page_size
        return bool(clustered) and first < clustered + self.state.options.recent_window

    def _arguments(
        self, module: nn.Module, forward: Callable[..., Any], kwargs: dict[str, Any], name: str, first: int, stop: int
    ) -> dict[str, Any] | None:  # fmt: skip
        """Arguments of a forward of the tokens [first, stop); None if they cannot be read again with the same result."""
        if not all(isinstance(layer, SpinLayer) or is_placeholder(layer) for layer in self.layers):
            return None
        ids, valid = self.state.tokens.between(first, stop), self.state.sequences.mask.valid
        if ids is None or (valid is not None and not bool(valid[:, first:stop].all())):
            return None
        given = {key: value for key, value in kwargs.items() if key == name or isinstance(value, _PLAIN)}
        for key in _NOT_REPEATED:
            given.pop(key, None)
        for key, value in kwargs.items():
            if key in given or key in _NOT_REPEATED or value is None:
                continue
            if key == "input_ids":
                given[key] = ids.to(value.device, value.dtype)
            elif key == "attention_mask" and isinstance(value, Tensor) and value.dim() == 2:
                given[key] = value[:, :stop]
            elif key in ("position_ids", "cache_position") and isinstance(value, Tensor):
                given[key] = value[..., :1] - torch.arange(stop - first, 0, -1, device=value.device)
            else:
                return None
        if "input_ids" not in given:
            return None
        if "logits_to_keep" in inspect.signature(type(module).forward).parameters:
            given["logits_to_keep"] = 1
        return given if self.prompts.may_read(module, forward, given, name) else None

    @contextmanager
    def _put_back_on_error(self, first: int, stop: int) -> Iterator[None]:
        """Within this context the tokens [first, stop) may be removed. An exception puts them back."""
        state = self.state
        exact, tokens, held = state.exact, state.tokens, [self._states(layer, first, stop) for layer in self._paged()]
        try:
            yield
        except BaseException:
            self.passes.roll_back()
            if state.committed != stop:
                self.passes.truncate(first)
                self._append(held, stop)
            state.exact, state.tokens = exact, tokens
            raise

    def _paged(self) -> list[SpinLayer]:
        return [layer for layer in self.layers if isinstance(layer, SpinLayer)]

    @outside_inference_mode
    def _states(self, layer: SpinLayer, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, stop - first, D] of a layer. Their pages are not clustered."""
        store = layer.store
        assert store is not None
        size = store.page_size
        pages = permute_pages.content([store], first // size, -(-stop // size))
        start = first - first // size * size
        key, value = (
            part.flatten(2, 3)[:, :, start : start + stop - first] for part in store.backing_layout.take(pages)
        )
        return key.to(store.device), value.to(store.device)

    @outside_inference_mode
    def _append(self, held: list[tuple[Tensor, Tensor]], stop: int) -> None:
        """Append keys and values to all layers, as a prompt does."""
        with self.passes.reading(stop):
            for layer, (key, value) in zip(self._paged(), held, strict=True):
                layer.append(key, value, None)
            self.passes.commit()
        self.state.visible_length.fill_(self.state.committed)


_NO_MEMORY = "%s: the last %d tokens were not read again (rectify_interval), as memory ran out: %s"
