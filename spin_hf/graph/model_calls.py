"""Begin and end of each model call that carries a cache.

    wrapped forward ──> run: config set to "spin", log watches ──> replayed step (graph/runner.py) or the model's forward
                    ──> commit, or roll back on an exception

A cache belongs to one model object. Model and config are unchanged outside of its calls, so other users of the model are not
affected. A cache made from a config holds the config at "spin" until the first forward shows which model runs it
(`find_model`). From the next call on it behaves as if made from that model.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..attention import implementation
from ..attention.masks import check_argument
from ..backends.kernel_pool import pool_of
from ..errors import AttentionError
from ..forward_log import ForwardLog
from ..forward_pass import ForwardPass
from ..inference_mode import outside_inference_mode
from ..integration import deferred_stop, forward_hook
from ..integration.device_map import uses_a_gpu
from ..integration.forward_hook import CACHE_NAMES
from ..integration.layer_types import decoder_config, is_croppable, is_placeholder
from ..integration.rank_agreement import meeting
from ..layer import SpinLayer
from .prompt_reader import PromptReader, has_no_padding
from .rectifier import Rectifier
from .runner import GraphRunner

logger = logging.getLogger("spin_hf")

_LATE_DEVICES = ("cuda",)
_FRAMES = 6
"""Stack frames that are searched for the caller of `SpinCache.update`."""


class ModelCalls:
    """The calls of one cache. `close` undoes the constructor's changes to model and config.

    Args:
        config: the config that attention modules read.
        model: the model that is called with the cache; None if the first forward has to show it.
        layers, passes, log: of the cache.
        wrapped: the forwards that a living cache of `model` has wrapped, if one is copied; None to look for them.
    """

    def __init__(
        self, config: Any, model: nn.Module | None, layers: list[Any], passes: ForwardPass, log: ForwardLog,
        wrapped: forward_hook.Wrapped | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.switched = config if passes.state.layers else None
        """The config that is set to "spin" in calls. None if no layer is paged: the model then keeps its own setting."""
        self.layers, self.passes, self.log = layers, passes, log
        self.wrapped: forward_hook.Wrapped = []
        self.model: Any = lambda: None
        """Returns the model while it lives, else None."""
        self.steps: GraphRunner | None = None
        self.prompts = PromptReader(layers, passes, config)
        self.rectifier = Rectifier(layers, passes, log, self.prompts)
        self.inside = False
        """Whether a call is in progress."""
        self.holds = False
        """Whether the config is set to "spin" outside of a call."""
        self._unpadded: Tensor | None = None
        """The padding mask of a prompt that `generate` reads in chunks, if it is all true."""
        self.belongs = model is not None
        """Whether only calls of the model are accepted. For a cache made from a config: from the first wrapped call on."""
        if self.switched is not None:
            implementation.announce(config)
        if model is None:
            self._hold()
        else:
            self._bind(model, wrapped)

    def close(self) -> None:
        """Restore model and config, and free the cache's storage without waiting for the garbage collector."""
        self.unhook()
        self.passes.dispose()

    def unhook(self) -> None:
        """Restore model and config. The cache can be forked and saved, and the model cannot be called with it any more."""
        self._drop()
        wrapped, self.wrapped = self.wrapped, []
        forward_hook.release(wrapped)
        if self.steps is not None:
            self.steps = None
            deferred_stop.release()

    def run(self, module: nn.Module, forward: Any, kwargs: dict[str, Any], name: str) -> Any:
        """Call `forward(**kwargs)` of `module`; the cache is `kwargs[name]`.

        Raises:
            AttentionError: the cache was made from another model, or the attention mask has an unsupported type.
            Whatever the forward raises. The cache is then as before the call.
        """
        if self.inside and self._runs():  # a submodel of the call, or a capture within it
            return self.prompts.of(module, forward, kwargs, name)(**kwargs)
        if self.belongs and not any(wrapped() is module for wrapped in self.wrapped):
            raise AttentionError(
                f"expected a call of the {self.passes.state.model_name} that this SpinCache was made from, got one of another "
                f"model ({type(module).__name__}); make a SpinCache of that model, or SpinCache.from_cache(cache, model) to "
                "take over its tokens"
            )
        check_argument(kwargs.get("attention_mask"))
        num_tokens, ids = new_tokens(kwargs)
        if _begins(self._unpadded, kwargs.get("attention_mask"), self.passes.state.committed + num_tokens):
            kwargs = {**kwargs, "attention_mask": None}  # else every chunk would look, and wait for the one before
        if self.passes.state.ranks is not None and (num_tokens > 1 or not self.passes.state.committed):
            with meeting(self.passes.state.ranks, "call the model", *_facts(num_tokens, ids)):
                pass  # other shapes would break the model's all-reduce
        self.inside, self.belongs = True, bool(self.wrapped)
        try:
            held = nullcontext() if self.switched is None else implementation.held(self.switched)
            with held, self.passes.backends.forward():
                self.rectifier.before(module, forward, kwargs, name)
                if self.steps is not None and module is self.model() and not forward_hook.is_compiled(forward):
                    output = self.steps.run(module, self.prompts.of(module, forward, kwargs, name), kwargs, name)
                else:
                    with self.log.watching(self.layers):
                        output = self.prompts.of(module, forward, kwargs, name)(**kwargs)
            self._record(num_tokens, ids)
            return output
        finally:
            self.inside = False
            if self.wrapped:
                self._drop()

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]  # see `new_tokens`
    @outside_inference_mode
    def _record(self, num_tokens: int, ids: Tensor | None) -> None:
        """Note the ids of the tokens that a forward has added; None if they are unknown."""
        state = self.passes.state
        if state.committed >= num_tokens:
            state.tokens = state.tokens.recorded(state.committed - num_tokens, ids)

    def before_prompt(self, cache: Any, ids: Tensor, mask: Tensor | None) -> None:
        """Prepare `cache` for a prompt which `generate` is about to read.

        Tokens that are not the first ones of the prompt are removed. Layers that cannot be cropped are read anew. An empty
        cache gets what its store has of the prompt. At least one token is left to read.

        Args:
            ids: [B, n], the whole prompt.
            mask: [B, n], its padding mask; None for no padding.
        """
        held, state = cache.get_seq_length(), self.passes.state
        if not held:
            if state.store is not None:
                state.store.restore(cache, ids, mask)
            return
        common = state.tokens.common_prefix(ids, held, mask)
        keep = min(common, ids.shape[1] - 1)
        if keep >= held:
            return
        if not all(_may_be_cropped(layer) for layer in self.layers):
            keep = 0
        if common < held and common < ids.shape[1]:
            logger.warning(_OTHER_PROMPT, type(self.model()).__name__, common, held, held - keep, ids.shape[1] - keep)
        if keep:
            cache.crop(keep - held)
        else:
            cache.reset()

    @contextmanager
    def expecting(self, ids: Tensor, mask: Tensor | None) -> Iterator[None]:
        """Within this context, `generate` reads a prompt in chunks. Arguments as for `before_prompt`.

        Memory that was reserved for tokens that do not come is given back.
        """
        if has_no_padding(mask, self.passes.state.sequences.mask.valid, *ids.shape):
            self._unpadded = mask
        try:
            with self.passes.reading(ids.shape[1], here=False):
                yield
        except BaseException:
            self.passes.roll_back()
            raise
        finally:
            self._unpadded = None

    def after_prompt(self, cache: Any, ids: Tensor, mask: Tensor | None) -> None:
        """Store a prompt that `generate` has read. Arguments as for `before_prompt`."""
        if self.passes.state.store is not None:
            self.passes.state.store.keep(cache, ids, mask)

    def _runs(self) -> bool:
        """Whether this thread is within `run`. Reads the stack, since an interruption may leave `inside` set."""
        frame: Any = sys._getframe(2)
        while frame is not None and not (
            frame.f_code is ModelCalls.run.__code__ and frame.f_locals.get("self") is self
        ):
            frame = frame.f_back
        return frame is not None

    def before_mask(self, cache: Any) -> None:
        """Called when a mask is built: set the config to "spin" until the end of the call, and find the model."""
        self._hold()
        if not self.wrapped and self.switched is not None and (model := find_model(cache, self.config)) is not None:
            self._bind(model)

    def _bind(self, model: nn.Module, wrapped: forward_hook.Wrapped | None = None) -> None:
        """Wrap the forward of `model`."""
        self.wrapped = forward_hook.acquire_again(wrapped) if wrapped else forward_hook.acquire(model)
        self.model = weakref.ref(model)
        if may_be_captured(model):
            self.passes.backends.use_pool(pool_of(model))
            self.steps = GraphRunner(model, self.layers, self.passes, self.log)
            deferred_stop.acquire(reads_late)

    def _hold(self) -> None:
        if self.switched is not None and not self.inside and not self.holds:
            self.holds = True
            implementation.acquire(self.switched)

    def check(self) -> None:
        """Check the caller before a layer is updated.

        Raises:
            AttentionError: the caller uses another attention implementation, which would never read the cache.
        """
        config, name = self.switched, self.passes.state.model_name
        if config is None:
            return
        if self.belongs and not self.inside and (self.holds or config._attn_implementation != implementation.NAME):
            self._drop()
            raise AttentionError(
                f"expected a call of the {name} that this SpinCache was made from, got states of another model, or of a layer "
                "that was called by itself; make a SpinCache of the model that is called, SpinCache.from_cache(cache, model) "
                "to take over its tokens, or SpinCache(model.config) to call layers"
            )
        implementation.check(config)
        caller = None if self.inside else _caller()
        if caller is not None and caller.config._attn_implementation != implementation.NAME:
            raise AttentionError(
                f"expected states of a model with the {type(config).__name__} object that this SpinCache was made from, got "
                f"some of a {type(caller).__name__} with another config, whose attention implementation is "
                f"{caller.config._attn_implementation!r}; make a SpinCache of that model or of its config"
            )

    def check_traced(self) -> None:
        """As `check`, during Dynamo tracing."""
        if self.switched is not None:
            implementation.check(self.switched)

    def _drop(self) -> None:
        if self.holds:
            self.holds = False
            implementation.release(self.switched)


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
@outside_inference_mode
def new_tokens(kwargs: dict[str, Any]) -> tuple[int, Tensor | None]:
    """Number of tokens of a forward, and a copy of their ids, int32; None for embeddings. The caller may reuse its tensor.

    Never traced: the next replay of a CUDA graph that a user's compiled forward makes would overwrite the copy.
    """
    new = forward_hook.new_inputs(kwargs)
    if new is None:
        return 0, None
    return new.shape[1], None if kwargs.get("input_ids") is None else new.detach().to(torch.int32, copy=True)


def _facts(num_tokens: int, ids: Tensor | None) -> tuple[int, ...]:
    """What must be the same on all ranks: tokens of a sequence, sequences, and a checksum of the ids."""
    if ids is None:
        return (num_tokens,)
    factors = torch.arange(1, ids.numel() + 1, device=ids.device).view(ids.shape)
    return num_tokens, len(ids), int((ids * factors).sum())


def _begins(whole: Tensor | None, mask: Any, length: int) -> bool:
    """Whether `mask` is a view of the first `length` columns of `whole`. Does not read the device."""
    if whole is None or not isinstance(mask, Tensor) or mask.shape != (len(whole), length):
        return False
    same = mask.data_ptr() == whole.data_ptr() and mask.dtype == whole.dtype
    return same and (len(whole) == 1 or mask.stride() == whole.stride())


def _may_be_cropped(layer: Any) -> bool:
    """Whether a cache layer can forget its last tokens; a window can while it is not full."""
    window = type(layer) is DynamicSlidingWindowLayer and layer.get_seq_length() < layer.sliding_window
    return window or is_croppable(layer)


_OTHER_PROMPT = (
    "%s: the prompt differs from the cache behind the first %d of the %d tokens held; the last %d are removed from the cache, "
    "and %d tokens of the prompt are read"
)


def _caller() -> Any:
    """The module that calls `SpinCache.update`; None if its config names no attention implementation."""
    frame: Any = sys._getframe(2)
    for _ in range(_FRAMES):
        module = None if frame is None else frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            return module if hasattr(getattr(module, "config", None), "_attn_implementation") else None
        frame = None if frame is None else frame.f_back
    return None


def find_model(cache: Any, config: Any) -> PreTrainedModel | None:
    """The outermost running model that was called with `cache` and reads `config`; None if there is none.

    Only frames of forwards are read: reading a frame's locals keeps them alive until it returns.
    """
    frame: Any = sys._getframe(1)
    found = None
    while frame is not None:
        code = frame.f_code
        parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if code.co_name == "forward" and not set(parameters).isdisjoint(CACHE_NAMES):
            module, given = frame.f_locals.get("self"), [frame.f_locals.get(name) for name in CACHE_NAMES]
            if isinstance(module, PreTrainedModel) and any(each is cache for each in given):
                found = module if decoder_config(module)[0] is config else found
        frame = frame.f_back
    return found


def model_of(model: Any) -> nn.Module | None:
    """The module within `model`'s wrappers, such as `torch.compile`'s; None for a config."""
    found = forward_hook.unwrapped(model)
    return found if isinstance(found, nn.Module) else None


def may_be_captured(model: nn.Module) -> bool:
    """Whether decode steps of `model` may become CUDA graphs."""
    return isinstance(model, PreTrainedModel) and uses_a_gpu(model)


def reads_late(cache: Any, device: torch.device) -> bool:
    """Whether `generate` may defer its stop check: steps can be captured, and every layer can be cropped by one token."""
    return (
        getattr(getattr(cache, forward_hook.ATTRIBUTE, None), "steps", None) is not None
        and device.type in _LATE_DEVICES
        and all(isinstance(layer, SpinLayer) or is_placeholder(layer) for layer in cache.layers)
    )
