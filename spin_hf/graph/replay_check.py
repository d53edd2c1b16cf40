"""What a captured step takes for granted, and what of it is looked at only behind its launch.

    before    assume(mask)     its shape; a mark in the stream
    launch    of the step, as if nothing more were padded and the model were what it was
    behind    holds(watch)     mask     on a stream of its own: wait for the mark -> the padding known so far, and else ones?
                                        -> a flag on the host
                               positions, of methods that need them: likewise, whether they count the tokens
                               model    on the host: modules, parameters, hooks, adapters

All of that costs the host more time than it has while the device waits for work, and behind the launch it costs none: the
device is busy for longer. It hardly ever fails. Where it does, the caller takes the step back and does the call again,
looking first. So this is for steps that can be done twice at one place, which those that write to pages only can.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .eligibility import ModelGuard


class ReplayCheck:
    """Of the captured steps of one cache, one at a time."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        """The mask [B, tokens] that the step under way takes for ones behind `held`."""
        self.held: Tensor | None = None
        """Validity [B, tokens held], as far as there is padding; None for all ones."""
        self.positions: Tensor | None = None
        """Position ids of its token, which are taken for `position`."""
        self.position = 0
        self.beside: StreamBeside | None = None

    def start(
        self, mask: Tensor | None, length: int, positions: Tensor | None = None, held: Tensor | None = None
    ) -> bool:
        """Take `mask` [B, n] (None: no padding) for one without padding but what is `held`; nothing waits.

        Args:
            length: tokens held and new; what a mask does not cover is padding.
            positions: position ids of the new token, to be taken for its place; None for any.
            held: validity [B, length - 1] of the tokens before; None for no padding.
        Returns:
            False where shapes show other padding; then there is nothing to assume.
        """
        self.mask = self.positions = self.held = None
        if mask is not None and mask.shape[1] < length:
            return False
        if held is not None and (mask is None or mask.device != held.device or len(mask) != len(held)):
            return False
        if mask is not None and positions is not None and mask.device != positions.device:
            return False
        if mask is not None:
            self.mask = mask if mask.shape[1] == length else mask[:, :length]
        self.positions, self.position, self.held = positions, length - 1, held
        given = positions if mask is None else mask
        if given is not None and given.is_cuda:
            if self.beside is None or self.beside.device != given.device:
                self.beside = StreamBeside(given.device)
            self.beside.mark()
        return True

    def passed(self, watch: ModelGuard) -> bool:
        """Whether all that was assumed is so. Waits for mask and positions, and not for the step."""
        mask, positions, position, held = self.mask, self.positions, self.position, self.held
        self.mask = self.positions = self.held = None
        given = positions if mask is None else mask
        if given is None:
            return watch.unchanged()

        def as_assumed() -> Tensor:
            if mask is None:
                right = given.new_ones((), dtype=torch.bool)
            elif held is None:
                right = mask.all()
            else:
                right = (mask[:, :-1].bool() == held).all() & mask[:, -1].all()
            return right if positions is None else right & (positions == position).all()

        if not given.is_cuda or self.beside is None:
            return watch.unchanged() and bool(as_assumed())
        self.beside.ask(as_assumed)
        unchanged = watch.unchanged()  # while the device looks at what was given
        return self.beside.answer() and unchanged


class StreamBeside:
    """Asks a question about tensors beside the work that the current stream got since `mark`.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device, priority=-1)  # before the blocks of the step, which may fill the device
        self.marked, self.answered = torch.cuda.Event(), torch.cuda.Event()
        with torch.inference_mode(False):  # it outlives an inference mode
            self.flag = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)

    def mark(self) -> None:
        """What the current stream has now is what `ask` waits for: the tensors are part of it."""
        self.marked.record(torch.cuda.current_stream(self.device))

    def ask(self, question: Callable[[], Tensor]) -> None:
        """Let the device look; the tensors that the question is about must live until the answer."""
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.marked)
            self.flag.copy_(question(), non_blocking=True)
            self.answered.record(self.stream)

    def answer(self) -> bool:
        """The answer; waits for that and nothing else."""
        self.answered.synchronize()
        return bool(self.flag)
