"""Which requests may hold memory at once.

    needs    of each request: mandatory, minimum and resident bytes on the GPU, and bytes in host memory (`request_needs.py`)
    pool     `gpu_memory`, or what this loop's caches hold and what is free, less the margin of prompts
    admit    a request, if its minimum fits beside those that hold memory; alone, if what one step needs fits

With `gpu_memory` in bytes the cap is divided among the requests (`memory/cap_division.py`). With "auto" their caches share the
GPU as any caches do (`memory/gpu_memory.py`). Then a request waits for room for all of its pages, if a running one ends sooner
than the pages of those that run would be moved to host memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..cache import SpinCache
from ..errors import CapacityError
from ..memory import watermarks
from ..memory.cap_division import set_cap, shares
from ..memory.host_memory import free_host_memory
from ..memory.request_needs import NeedsByLength, RequestNeeds

_MOVED_BYTES_PER_S = 4e9
"""Rate at which pages move to host memory, most of which goes to page-locking that memory."""
_HOST_FRACTION = 0.9
"""Of the free host memory, what pages may take."""


class Admission:
    """The memory of one loop's caches.

    Args:
        template: an empty cache of the loop.
    """

    def __init__(self, template: SpinCache) -> None:
        state, model = template._state, template.calls.model()
        self._options, self._device = state.options, torch.device(model.device)
        self._needs = NeedsByLength(model, state.method, replace(state.options, gpu_memory=None, cpu_memory=None))
        self._by_length: dict[int, RequestNeeds] = {}
        self.gpu_pool = self._gpu_pool(0)
        """Bytes of GPU memory with no request held; None without a cap, as on a CPU."""
        self.host_pool = self._host_pool(())

    def needs(self, num_tokens: int) -> RequestNeeds:
        """Needs of a sequence."""
        rounded = -(-num_tokens // 64) * 64
        if len(self._by_length) > 4096:
            self._by_length.clear()
        if rounded not in self._by_length:
            self._by_length[rounded] = self._needs.of(rounded)
        return self._by_length[rounded]

    def check(self, prompt: int, most: int) -> None:
        """Refuse a request that can never fit.

        Args:
            prompt, most: tokens of its prompt, and with all that may be generated.
        Raises:
            CapacityError: with the bytes needed and available.
        """
        needs, what = self.needs(most), f"a request of {prompt} tokens, and up to {most - prompt} generated ones,"
        if self.gpu_pool is not None and needs.mandatory > self.gpu_pool:
            raise CapacityError(
                f"{what} needs {needs.mandatory} bytes of GPU memory for one step, expected at most {self.gpu_pool}; raise "
                'gpu_memory, lower max_new_tokens, or take a method with smaller summaries, such as "shadowkv"',
                needed_bytes=needs.mandatory, available_bytes=self.gpu_pool,
            )  # fmt: skip
        in_host = self._in_host([needs], self.gpu_pool)
        if self.host_pool is not None and in_host > self.host_pool:
            raise CapacityError(
                f"{what} needs {in_host} bytes of host memory, expected at most {self.host_pool}; raise cpu_memory, lower "
                'max_new_tokens, or take cpu_dtype="int8"',
                needed_bytes=in_host, available_bytes=self.host_pool,
            )  # fmt: skip

    def fits(self, num_tokens: int, held: Sequence[tuple[SpinCache, int]], others: Iterable[SpinCache]) -> bool:
        """Whether a request may hold memory beside those that do.

        Args:
            num_tokens: tokens of the request, with those that are planned for.
            held: cache and tokens of each request that decodes or is read, likewise.
            others: caches that hold memory and are not stepped.
        """
        if not held:
            return True  # `check` has said so
        new, members = self.needs(num_tokens), [self.needs(tokens) for _, tokens in held]
        active, idle = [self._bytes(cache) for cache, _ in held], [self._bytes(cache) for cache in others]
        pool = self._gpu_pool(sum(each[0] for each in (*active, *idle)))
        if pool is not None:
            taken = sum(each[0] for each in idle)
            if taken + new.minimum + sum(each.minimum for each in members) > pool:
                return False
        host = self._host_pool([*active, *idle])
        taken = sum(each[1] for each in idle)
        return host is None or taken + self._in_host([new, *members], pool) <= host

    def _bytes(self, cache: SpinCache) -> tuple[int, int]:
        """As `bytes_held`. By needs where all pages are in GPU memory: counting takes the host long."""
        if self._device.type != "cuda" or cache._passes.gpu.is_paged(self._device):
            return bytes_held(cache)
        return self.needs(cache.get_seq_length()).resident, 0

    def moving_s(self, num_tokens: int) -> float:
        """Seconds that it takes to make room for all pages of a request, by moving others' pages to host memory.

        A cache moves all of its pages, at least as many as are missing.
        """
        return self.needs(num_tokens).resident / _MOVED_BYTES_PER_S

    def fits_whole(self, num_tokens: int, shared: int, held: Sequence[tuple[int, int]]) -> bool:
        """Whether all pages of a request find room in free GPU memory. True with a cap in bytes, and without a GPU.

        Args:
            num_tokens: as for `fits`.
            shared: its first tokens whose pages it shares with others.
            held: tokens that each running request holds now, and those that are planned for.
        """
        free = None if self._options.gpu_memory is not None else watermarks.free_gpu_memory(self._device)
        if free is None:
            return True
        growth = sum(self.needs(planned).resident - self.needs(now).resident for now, planned in held)
        new = self.needs(num_tokens).resident - (self.needs(shared).resident if shared else 0)
        return new <= watermarks.Watermarks(self._options.tuning.margin_bytes).cap_for_prompts(0, max(0, free - growth))

    def divide(self, held: Sequence[tuple[SpinCache, int]]) -> None:
        """Divide the cap in bytes among the caches that decode or are read. Does nothing with "auto"."""
        cap = self._options.gpu_memory
        if cap is not None and held:
            needs = [self.needs(tokens) for _, tokens in held]
            parts = shares(cap, needs)
            # Those that get less give back before others take.
            for (cache, _), part in sorted(
                zip(held, parts, strict=True), key=lambda each: each[1] - _cap_of(each[0][0])
            ):
                set_cap(cache._passes.gpu, part)

    def _in_host(self, needs: list[RequestNeeds], pool: int | None) -> int:
        """Bytes of host memory: of all pages without a GPU, else of those of sequences that do not fit the GPU together."""
        if self._device.type != "cuda" and self._options.gpu_memory is None:
            return sum(each.resident for each in needs)
        fits = pool is None or sum(each.resident for each in needs) <= pool
        return 0 if fits else sum(each.host for each in needs)

    def _gpu_pool(self, held: int) -> int | None:
        if self._options.gpu_memory is not None:
            return self._options.gpu_memory
        free = watermarks.free_gpu_memory(self._device)
        if free is None:
            return None
        return watermarks.Watermarks(self._options.tuning.margin_bytes).cap_for_prompts(held, free)

    def _host_pool(self, caches: Sequence[tuple[int, int]]) -> int | None:
        if self._options.cpu_memory is not None:
            return self._options.cpu_memory
        free = free_host_memory()
        in_host = 0 if self._device.type == "cuda" else sum(each[0] for each in caches)
        held = sum(each[1] for each in caches) + in_host
        return None if free is None else int(_HOST_FRACTION * (free + held))


def _cap_of(cache: SpinCache) -> int:
    return cache._passes.gpu.given or 0


def bytes_held(cache: Any) -> tuple[int, int]:
    """Bytes of pages and summaries of a cache in the compute tier and in the cpu tier."""
    segments = cache._state.sequences.segments_in_use
    stores = [layer.store for layer in cache._state.layers if layer.store is not None]
    return sum(store.held_bytes for store in stores), sum(store.cpu_bytes(segments) for store in stores)
