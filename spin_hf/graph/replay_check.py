"""Optimistic replay: the graph is launched first; mask, positions and model are checked while it runs.

    before    start(mask)      checks the mask's shape; records an event in the stream
    launch    the step, assuming no new padding and an unchanged model
    after     passed(watch)    mask         on a side stream: wait for the event, compare with the known padding -> host flag
                               positions    likewise, for methods that use them: do they count the tokens?
                               model        on the host: modules, parameters, hooks, adapters

The checks take host time. After the launch they overlap with the step; before it the GPU would be idle. If a check fails, the
caller rolls the step back and runs the call again with the checks first. The step must therefore be repeatable, which holds
if it writes to pages only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .eligibility import ModelGuard


class ReplayCheck:
    """Checks for the captured steps of one cache, one step at a time."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        """[B, tokens], mask of the current step. Assumed to be `held`, followed by a one."""
        self.held: Tensor | None = None
        """[B, tokens held], known validity; None for no padding."""
        self.positions: Tensor | None = None
        """Position ids of the new token. Assumed to equal `position`."""
        self.position = 0
        self.side_stream: SideStreamCheck | None = None

    def start(
        self, mask: Tensor | None, length: int, positions: Tensor | None = None, held: Tensor | None = None
    ) -> bool:
        """Begin the check of a step: compare shapes and record an event. Does not wait for the device.

        Args:
            mask: [B, n], assumed to have no other padding than `held`; None for no padding.
            length: tokens held plus the new one. Tokens beyond the mask are padding.
            positions: position ids of the new token, assumed to be `length - 1`; None for no check.
            held: [B, length - 1], validity of the earlier tokens; None for no padding.
        Returns:
            False if shapes or devices already rule out an optimistic replay.
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
            if self.side_stream is None or self.side_stream.device != given.device:
                self.side_stream = SideStreamCheck(given.device)
            self.side_stream.mark()
        return True

    def passed(self, watch: ModelGuard) -> bool:
        """Whether the assumptions of `start` hold and the model is unchanged. Does not wait for the step."""
        mask, positions, position, held = self.mask, self.positions, self.position, self.held
        self.mask = self.positions = self.held = None
        given = positions if mask is None else mask
        if given is None:
            return watch.unchanged()

        def matches() -> Tensor:
            if mask is None:
                equal = given.new_ones((), dtype=torch.bool)
            elif held is None:
                equal = mask.all()
            else:
                equal = (mask[:, :-1].bool() == held).all() & mask[:, -1].all()
            return equal if positions is None else equal & (positions == position).all()

        if not given.is_cuda or self.side_stream is None:
            return watch.unchanged() and bool(matches())
        self.side_stream.launch(matches)
        unchanged = watch.unchanged()  # on the host, while the device compares mask and positions
        return self.side_stream.result() and unchanged


class SideStreamCheck:
    """Evaluates a condition on a side stream, concurrently with work that the current stream got after `mark`.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device, priority=-1)  # high priority: the step's blocks may fill the device
        self.marked, self.evaluated = torch.cuda.Event(), torch.cuda.Event()
        with torch.inference_mode(False):  # the flag outlives inference mode
            self.flag = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=True)

    def mark(self) -> None:
        """Record an event in the current stream. `launch` waits for it, so its tensors must be computed before it."""
        self.marked.record(torch.cuda.current_stream(self.device))

    def launch(self, condition: Callable[[], Tensor]) -> None:
        """Launch `condition` on the side stream. Its tensors must live until `result`."""
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.marked)
            self.flag.copy_(condition(), non_blocking=True)
            self.evaluated.record(self.stream)

    def result(self) -> bool:
        """The result of `launch`. Waits for the side stream only."""
        self.evaluated.synchronize()
        return bool(self.flag)
