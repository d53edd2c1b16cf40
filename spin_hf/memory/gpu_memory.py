"""GPU memory caps of one cache: set, checked and reclaimed at run time.

    _place       first tokens of a batch      pages in GPU memory if all fit; else few frames, to leave room for activations
    size_frames  first step after a prefill   frames from the memory that is free once the prompt is indexed
    _check       every 64 steps               shrinks if little memory is free, grows if much is (`memory/watermarks.py`)
    give_back    on request                   of the user, or of another cache that is short of memory

Each device has its own cap. Caches with `gpu_memory="auto"` share a device (`memory/other_caches.py`). A cap in bytes is fixed;
frames given back return at later checks.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress
from copy import copy
from dataclasses import replace
from itertools import count
from typing import Any

import torch

from ..errors import BudgetError, CapacityError
from ..state import CacheState
from ..storage.page_store import PageStore
from ..storage.page_table import SEGMENT_PAGES
from ..storage.tier_budget import TierBudget
from . import other_caches, watermarks
from .layer_budget import LayerShape, tier_budget
from .layer_places import num_layers
from .shared_pages import own_bytes, share_pages

_SEGMENTS_AHEAD = 2
"""Segments per sequence by which a context may grow until the next check, unless a prompt is added."""

_checks = count(1)

Room = tuple[int, int, int]
"""Batch size, segments in the pool, pages per sequence."""


class GpuMemory:
    """The caps of one cache, by device.

    Args:
        state: the cache's state.
        given: the user's cap in bytes, for each device; None for "auto".
    """

    def __init__(self, state: CacheState, given: int | None) -> None:
        self._state, self.given = weakref.ref(state), given
        self.caps: dict[torch.device, int | None] = {}
        """Current cap in bytes by device; None for no cap."""
        self.most_frames: int | None = None
        self.is_sized = True
        """Whether the frames are sized for decoding."""
        self.has_given_back = False
        """Whether there may be fewer frames than the cap allows."""
        self.pending_reclaim: dict[torch.device, int] = {}
        """Bytes by device that other caches requested while this one could not be changed."""
        self.tuning = state.options.tuning
        self.watermarks = watermarks.Watermarks(self.tuning.margin_bytes)
        self.owner = threading.get_ident()
        """The thread that uses the cache."""
        self.streams: dict[torch.device, Any] = {}
        """The stream that uses its memory, by device."""
        self.used = 0
        """Number of its last check, among the checks of all caches."""
        self._steps_left = self.tuning.check_interval_steps

    @property
    def state(self) -> CacheState:
        """The state of the cache."""
        state = self._state()
        assert state is not None
        return state

    # ------------------------------------------------------------------------------------------------------ budgets

    def tier_budget(self, shape: LayerShape, dtype: torch.dtype, device: torch.device, room: Room) -> TierBudget:
        """Budget of a new layer, with the cap of its device. The first layer of a device sets the cap.

        Args:
            room: expected batch size, segments and pages per sequence.
        """
        state, sharing = self.state, num_layers(self.state, device)
        budget = tier_budget(shape, dtype, state.method, state.options, None, sharing, device, len(state.layers))
        if device not in self.caps:
            wanted = budget.resident_bytes(*room[:2])
            least = budget.bytes_with(budget.step_frames(room[2]), *room)
            if self.given is None:
                self._place(device, wanted, least)
            else:
                self.caps[device] = self.given
                other_caches.request_memory(self, device, min(wanted, self.given), least)
        return replace(budget, gpu_memory=self.caps[device], most_frames=self.most_frames)

    def forget_caps(self) -> None:
        """Forget caps that were set for a prompt that did not fit. A later one sets them by what is free then."""
        if not any(map(self.stores_on, self.caps)):
            self.caps.clear()

    def raise_caps(self, needed: int) -> bool:
        """Try to raise caps that are too small for `needed` bytes. Returns whether one was raised. Does not change frames."""
        raised = False
        for device, cap in list(self.caps.items()):
            if cap is None or (self.given is not None and not self.has_given_back):
                continue
            found, stores = self._decoding_cap(device), self.stores_on(device)
            free = watermarks.free_gpu_memory(device)
            if self.given is None and found is not None and free is not None:
                least = self._share(needed, stores) if stores else needed
                if found < least:
                    other_caches.request_bytes(self, device, least - found)
                    free = watermarks.free_gpu_memory(device) or 0
                    # A smaller margin is better than an error.
                    found = max(found, min(least, self.held(device) + free))
            if found is None or found > cap:
                self._set_cap(device, found)
                raised = True
        return raised

    # --------------------------------------------------------------------------------------------------------- the steps

    def before_step(self, batch_size: int, num_tokens: int, checks: bool = False) -> None:
        """Before a step of `num_tokens` tokens: size, reclaim or, if due or `checks`, check frames. Waits for no kernel."""
        if self.given is not None and not self.has_given_back and not self.pending_reclaim:
            return
        if self.owner != threading.get_ident():
            with other_caches.lock:
                self.owner = threading.get_ident()
        if all(cap is None for cap in self.caps.values()) and not self.has_given_back:
            return
        if self.pending_reclaim:
            self._reclaim()
        if not self.state.sequences.length:
            self._replace(batch_size, num_tokens)
        elif not self.state.selects(num_tokens):
            self._leave_room_for_activations()
        elif not self.is_sized:  # else behind indexing, as frames would leave it too little memory
            if any(map(self._is_low, self.caps)):
                self.size_frames()
        else:
            self._steps_left -= 1
            if checks or self._steps_left <= 0:
                self._check()

    def give_back(self, num_bytes: int | None = None) -> int:
        """Give back `num_bytes`, or all that no step needs: evict pages, or move them to the cpu tier. Returns bytes freed."""
        given = 0
        for device in list(self.caps):
            if num_bytes is None or given < num_bytes:
                given += self.give_back_of(device, None if num_bytes is None else num_bytes - given)
        return given

    def short_of_frames(self) -> None:
        """Note that there are fewer frames than the cap allows. Later checks try to grow them again."""
        self.has_given_back, self._steps_left = True, self.tuning.check_interval_steps

    def withdraw(self) -> None:
        """Refuse requests of other caches from now on. So no other thread changes this one."""
        with other_caches.lock:
            other_caches.live.discard(self)

    def before_copy(self) -> None:
        """Called before the cache is copied, with its frames: gives back memory to make room for the copy."""
        for device, cap in self.caps.items():
            free = None if cap is None or self.given is not None else watermarks.free_gpu_memory(device)
            if free is not None:
                held = self.held(device)
                missing = held - (free - self.watermarks.margin(held + free))
                if missing > 0:
                    self.give_back_of(device, missing // 2)

    def __deepcopy__(self, memo: dict[int, Any]) -> GpuMemory:
        twin = copy(self)
        twin._state, twin.caps, twin.pending_reclaim = weakref.ref(memo[id(self.state)]), dict(self.caps), {}
        memo[id(self)] = twin
        if self in other_caches.live:
            other_caches.live.add(twin)
        return twin

    # ---------------------------------------------------------------------------------------------------------- by device

    def _place(self, device: torch.device, wanted: int, least: int) -> None:
        """Set the cap for a prefill, after requesting memory from other caches; arguments as for `_request_memory`."""
        self.caps[device] = self._prompt_cap(device)
        if self.caps[device] is None:
            return
        self._remember(device)
        self.is_sized, self.most_frames = False, self.tuning.prompt_frames
        other_caches.request_memory(self, device, wanted, least)
        self.caps[device] = self._prompt_cap(device)

    def _replace(self, batch_size: int, num_tokens: int) -> None:
        """`_place` for a cache that has held tokens before."""
        room = self.state.sequences.first_room(batch_size, num_tokens)
        for device in list(self.caps):
            budgets = {store.budget for store in self.stores_on(device)}
            wanted = max((budget.resident_bytes(*room[:2]) for budget in budgets), default=0)
            least = max((b.bytes_with(b.step_frames(room[2]), *room) for b in budgets), default=0)
            if self.given is None:
                self._place(device, wanted, least)
            self._set_cap(device, self.caps[device] if self.given is None else self.given)

    def _leave_room_for_activations(self) -> None:
        for device, cap in list(self.caps.items()):
            free = watermarks.free_gpu_memory(device)
            if cap is None or free is None or self.given is not None:
                continue
            self._remember(device)
            held = self.held(device)
            if self.watermarks.is_low(held, free) or (
                self.is_paged(device) and not self.watermarks.is_ample(held, free)
            ):
                self.resize(device, self.watermarks.cap_for_prompts(held, free))
                self.is_sized = False

    def size_frames(self) -> None:
        """Size the frames for decoding from free memory. Pages in the compute tier stay there unless memory is low.

        Requests memory from other caches again, as a chunked prefill did so for its first chunk only.
        """
        if self.is_sized or not any(map(self.stores_on, self.caps)):  # a short first call comes before its storage
            return
        self.is_sized, self.most_frames, self._steps_left = True, None, self.tuning.check_interval_steps
        for device in list(self.caps):
            self._remember(device)
            if self._is_low(device) or self.is_paged(device):
                least = self.least(self.stores_on(device))
                other_caches.request_memory(self, device, self.resident_bytes(device), least)
            cap, free = self._decoding_cap(device), watermarks.free_gpu_memory(device)
            if cap is not None and free is not None and not self.watermarks.is_low(self.held(device), free):
                cap = max(cap, self._resident(device))
            self.resize(device, cap)

    def _check(self) -> None:
        self._steps_left = self.tuning.check_interval_steps
        complete = True
        for device in list(self.caps):
            self._remember(device)
            free, held = watermarks.free_gpu_memory(device), self.held(device)
            stores, cap = self.stores_on(device), self.caps[device]
            lacks = any(store.lacks_frames for store in stores)
            complete &= not lacks or cap == self.given
            if self._is_low(device) or (lacks and (free is None or self.watermarks.is_ample(held, free))):
                self.resize(device, self._decoding_cap(device))
            elif cap is not None and self.least(stores) > cap:  # the context has grown
                self.resize(device, cap)
        if complete:
            self.has_given_back = False

    def give_back_of(self, device: torch.device, num_bytes: int | None) -> int:
        """As `give_back`, of one device."""
        sequences = self.state.sequences
        if self.state.unfinished is None:
            sequences.settle_forks()
        held = own_bytes(self.stores_on(device))
        if not sequences.length:
            sequences.release()
        elif not share_pages(self.stores_on(device)):
            before = self.caps[device]
            cap = max(1 if num_bytes is None else held - num_bytes, self.least(self.stores_on(device)))
            if before is None or cap < before:
                self.short_of_frames()
                self.resize(device, cap)
                if not self.is_paged(device):  # with a lower cap its next segment would move all pages
                    self._set_cap(device, before)
        return max(0, held - own_bytes(self.stores_on(device)))

    def _reclaim(self) -> None:
        with other_caches.lock:
            pending_reclaim, self.pending_reclaim = self.pending_reclaim, {}
        for device, num_bytes in pending_reclaim.items():
            self.give_back_of(device, num_bytes)

    def resize(self, device: torch.device, cap: int | None) -> None:
        """Set a cap and fit the frames to it. If memory runs out, restore the old cap."""
        before = self.caps[device]
        with torch.inference_mode(False), torch.no_grad():
            try:
                self._set_cap(device, cap)
                self.state.sequences.fit()
            except (BudgetError, CapacityError, torch.OutOfMemoryError):
                self._set_cap(device, before)
                # If even that has no memory, this cache's next step raises, not the one that the resize is for.
                with suppress(BudgetError, CapacityError, torch.OutOfMemoryError):
                    self.state.sequences.fit()

    def _set_cap(self, device: torch.device, cap: int | None) -> None:
        """Set the budgets of a device's layers to a cap, or to what a step needs if that is more."""
        stores = self.stores_on(device)
        if cap is not None and self.state.sequences.batch_size:
            least, free = self.least(stores), watermarks.free_gpu_memory(device) if self.given is None else None
            if least > cap and free is not None:  # room for growth only if memory is free
                least = min(least, self.held(device) + max(0, free))
            cap = max(cap, least)
        self.caps[device] = cap = cap if cap is None or self.given is None else min(cap, self.given)
        count = num_layers(self.state, device) if stores else 0
        for store in stores:
            store.budget = replace(store.budget, gpu_memory=cap, num_layers=count, most_frames=self.most_frames)

    def _is_low(self, device: torch.device) -> bool:
        """Whether the cache must shrink."""
        free = None if self.given is not None else watermarks.free_gpu_memory(device)
        return free is not None and self.watermarks.is_low(self.held(device), free)

    def is_paged(self, device: torch.device) -> bool:
        """Whether a layer's pages are in host memory, and some of them in frames."""
        return any(store.frames is not None for store in self.stores_on(device))

    def resident_bytes(self, device: torch.device) -> int:
        """Bytes with all pages in the compute tier."""
        room, stores = (self.state.sequences.batch_size, self.state.sequences.segments_in_use), self.stores_on(device)
        return self._share(max((store.budget.resident_bytes(*room) for store in stores), default=0), stores)

    def _resident(self, device: torch.device) -> int:
        """Cap in bytes with which pages in the compute tier can stay there; 0 if no layer of the device has any."""
        room, stores = (self.state.sequences.batch_size, self.state.sequences.num_segments), self.stores_on(device)
        inside = [store.budget.resident_bytes(*room) for store in stores if store.frames is None]
        return self._share(max(inside), stores) if inside else 0

    def least(self, stores: list[PageStore]) -> int:
        """Bytes that layers need until the next check: the frames of one step, or the current ones if fewer."""
        sequences, needed = self.state.sequences, [0]
        batch_size, segments, pages = sequences.room
        room = batch_size, segments + _SEGMENTS_AHEAD * batch_size, pages + _SEGMENTS_AHEAD * SEGMENT_PAGES
        for store in stores:
            frames = store.budget.step_frames(sequences.num_pages)
            if store.frames is not None and store.num_frames:
                frames = min(frames, max(store.num_frames, store.budget.min_frames))
            needed.append(self._share(store.budget.bytes_with(frames, *room), stores))
        return max(needed)

    def _share(self, of_all: int, stores: list[PageStore]) -> int:
        """Bytes of the layers in `stores`, given the bytes of all layers on their device."""
        return -(-of_all * len(stores) // stores[0].budget.num_layers)

    def _prompt_cap(self, device: torch.device) -> int | None:
        free = watermarks.free_gpu_memory(device)
        return None if free is None else self.watermarks.cap_for_prompts(self.held(device), free)

    def _decoding_cap(self, device: torch.device) -> int | None:
        free = watermarks.free_gpu_memory(device)
        if self.given is not None or free is None:
            return self.given
        return self.watermarks.cap_for_decoding(self.held(device), free)

    def held(self, device: torch.device) -> int:
        """Bytes that the cache holds on a device."""
        return sum(store.held_bytes for store in self.stores_on(device))

    def stores_on(self, device: torch.device) -> list[PageStore]:
        """The cache's layers on a device; none once the cache is freed."""
        state = self._state()
        stores = [] if state is None else [layer.store for layer in state.layers]
        return [store for store in stores if store is not None and store.device == device]

    def _remember(self, device: torch.device) -> None:
        """Register this cache for requests of other caches, and note when and on which stream its memory is used."""
        self.used = next(_checks)
        if device.type == "cuda":
            self.streams[device] = torch.cuda.current_stream(device)
        if self.given is None:
            with other_caches.lock:
                other_caches.live.add(self)
