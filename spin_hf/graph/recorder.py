"""Records launches in a CUDA graph, which may hold work of several GPUs.

    cuda:0   capture begins ──┬── launches ── copy ─────────────────────┬── capture ends      one graph
    cuda:1                    └── waits ─────────── launches ── event ──┘
                              fork                                      join

Work of another GPU is captured if its stream waits for an event of the capturing stream, and must be joined before the end. All
streams are forked first: torch orders a copy between two GPUs by events of both streams, and one outside of the capture would
break it. A graph is launched in the order of the first GPU's stream, so events order each replay with the other streams.

What a step allocates stays reserved for its graph: on the first GPU in the graph's own pool, on each other in a `MemPool`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

from ..storage.host_register import ONE_AT_A_TIME
from ..storage.pinned_slab import give_back_dropped

_streams: dict[torch.device, torch.cuda.Stream] = {}
"""The stream of each device on which steps are captured."""


class Recorder:
    """One captured function.

    Args:
        devices: GPUs that the function launches on. The graph is launched on the current stream of the first.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.device, *self.others = devices
        self.graph = torch.cuda.CUDAGraph()
        self.pools: list[torch.cuda.MemPool] = []
        for device in self.others:
            with torch.cuda.device(device):  # a pool belongs to the device that is current
                self.pools.append(torch.cuda.MemPool())

    def record(self, step: Callable[[], Any]) -> Any:
        """Capture `step`; returns its result. `replay` fills the result's tensors. Other threads may launch meanwhile."""
        with ONE_AT_A_TIME, ExitStack() as stack:
            for device in self.others:
                torch.cuda.synchronize(device)
                stack.enter_context(torch.cuda.stream(_capture_stream(device)))
            stack.enter_context(without_gc())
            main = _capture_stream(self.device)
            stack.enter_context(
                torch.cuda.stream(main)
            )  # its device becomes current; `graph` leaves it set if it fails
            stack.enter_context(torch.cuda.graph(self.graph, stream=main, capture_error_mode="thread_local"))
            for device, pool in zip(self.others, self.pools, strict=True):
                stack.enter_context(torch.cuda.use_mem_pool(pool, device))
            stack.enter_context(_forked(main, [_capture_stream(device) for device in self.others]))
            result = step()
        give_back_dropped()  # pinned memory that was dropped during the capture
        return result

    def replay(self) -> None:
        """Launch the captured graph on the current stream of the first device, in order with those of the others."""
        if not self.others:
            self.graph.replay()
            return
        main, others = torch.cuda.current_stream(self.device), list(map(torch.cuda.current_stream, self.others))
        for stream in others:
            main.wait_stream(stream)
        self.graph.replay()
        for stream in others:
            stream.wait_stream(main)


@contextmanager
def without_gc() -> Iterator[None]:
    """Within this context the garbage collector does not run: it may destroy another graph, which breaks a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _forked(main: torch.cuda.Stream, others: Sequence[torch.cuda.Stream]) -> Iterator[None]:
    """Within this context, work on other streams belongs to the capture on `main`."""

    def join() -> None:
        for stream in others:
            main.wait_stream(stream)

    for stream in others:
        stream.wait_stream(main)
    try:
        yield
    except BaseException:
        with suppress(RuntimeError):  # the capture may be broken already; the error that broke it is raised
            join()
        raise
    join()


def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
