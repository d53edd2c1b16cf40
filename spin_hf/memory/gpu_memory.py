"""What one cache may take of GPU memory, and when it gives some back.

    place     first tokens of a batch      do all pages fit?  few page frames: activations of the prompt need the room
    size      first step behind a prompt   page frames from what is really free
    look      every 64 steps               gives back where little is free, grows where much is (`storage/watermarks.py`)
    give_back a request                    of the user, or of another cache that begins and finds too little

Caches with `gpu_memory="auto"` of one device share it: who begins gets what it needs, in proportion to the tokens of all; who
has buffer pages gives in proportion to what it can. No cache goes below the pages of one step. A cache in the middle of a
step, or of another thread that lives, is not touched from outside: it pays at its next step.

A cap in bytes stays what it is; frames that were given back on request return with the looks.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import ExitStack
from copy import copy
from dataclasses import replace
from typing import Any

import torch

from ..errors import BudgetError, CapacityError
from ..kernels.descriptor_fields import MAX_QUERIES
from ..state import CacheState, Phase
from ..storage.page_store import PageStore
from ..storage.page_table import SEGMENT_PAGES
from ..storage.tier_budget import TierBudget
from . import watermarks
from .layer_budget import LayerShape, tier_budget

CHECK_INTERVAL_STEPS = 64
"""Steps between two looks at the memory that is free, which ask the driver."""
PROMPT_FRAMES = 2048
"""Page frames of a KV head while nothing is decoded: what is attended to at a time when a prompt goes on."""
_SEGMENTS_AHEAD = 2
"""Segments of each sequence that what is kept has room for: until the next look a context grows by no more, but for prompts."""

_live: weakref.WeakSet[GpuMemory] = weakref.WeakSet()
"""Those of caches that share a device by "auto"."""
_lock = threading.RLock()
"""Held while frames are changed from outside, and while another thread takes up a cache."""


class GpuMemory:
    """The caps of one cache, by device.

    Args:
        state: the cache's state.
        given: the user's cap in bytes; None for "auto".
    """

    def __init__(self, state: CacheState, given: int | None) -> None:
        self._state, self.given = weakref.ref(state), given
        self.caps: dict[torch.device, int | None] = {}
        """What the budgets of the layers on each device were last made with; None for no cap."""
        self.most_frames: int | None = None
        self.is_sized = True
        """Whether frames are those for decoding."""
        self.has_given_back = False
        """Whether there may be fewer frames than a cap in bytes allows."""
        self.pending_reclaim: dict[torch.device, int] = {}
        """Bytes that others asked for while this cache could not be touched."""
        self._owner, self._steps_left = threading.get_ident(), CHECK_INTERVAL_STEPS
        self._streams: dict[torch.device, Any] = {}

    @property
    def state(self) -> CacheState:
        """The cache's state, which this is part of."""
        state = self._state()
        assert state is not None
        return state

    # ---------------------------------------------------------------------------------------------- what a layer may take

    def tier_budget(
        self, shape: LayerShape, dtype: torch.dtype, device: torch.device, room: tuple[int, int, int]
    ) -> TierBudget:  # fmt: skip
        """What a layer with keys and values of this shape and dtype has; `room` as for `limit`."""
        method, options, num_layers = self.state.method, self.state.options, len(self.state.layers)
        return self.limit(tier_budget(shape, dtype, method, options, None, num_layers, device), device, room)

    def limit(self, budget: TierBudget, device: torch.device, room: tuple[int, int, int]) -> TierBudget:
        """`budget` of a new layer with the cap of its device, which is settled by the first one.

        Args:
            room: batch size, segments and pages per sequence to come.
        """
        if device not in self.caps:
            wanted = budget.resident_bytes(room[1])
            least = budget.bytes_with(budget.step_frames(room[2]), *room)
            if self.given is None:
                self._place(device, wanted, least)
            else:
                self.caps[device] = self.given
                self._request_memory(device, min(wanted, self.given), least)
        return replace(budget, gpu_memory=self.caps[device], most_frames=self.most_frames)

    def raise_caps(self, needed: int) -> bool:
        """A cap is too small for `needed` bytes: whether it is larger now. Frames are not changed."""
        risen = False
        for device, cap in list(self.caps.items()):
            if cap is None or (self.given is not None and not self.has_given_back):
                continue
            found, stores = self._decoding_cap(device), self._stores(device)
            free = watermarks.free_gpu_memory(device)
            if self.given is None and found is not None and free is not None:
                least = self._share(needed, stores) if stores else needed
                if found < least:
                    self._ask_others(device, least - found)
                    free = watermarks.free_gpu_memory(device) or 0
                    # Rather less of a margin than a refusal.
                    found = max(found, min(least, self._held(device) + free))
            if found is None or found > cap:
                self._set_cap(device, found)
                risen = True
        return risen

    # --------------------------------------------------------------------------------------------------------- the steps

    def before_step(self, batch_size: int, num_tokens: int) -> None:
        """A step of so many tokens begins: size, look or pay, if it is time for that. No kernel waits for a look."""
        if self.given is not None and not self.has_given_back and not self.pending_reclaim:
            return
        if self._owner != threading.get_ident():
            with _lock:
                self._owner = threading.get_ident()
        if all(cap is None for cap in self.caps.values()) and not self.has_given_back:
            return
        if self.pending_reclaim:
            self._reclaim()
        sequences = self.state.sequences
        if not sequences.length:
            self._replace(batch_size, num_tokens)
        elif num_tokens > MAX_QUERIES:
            self._leave_room_for_activations()
        elif not self.is_sized:
            self._size()
        else:
            self._steps_left -= 1
            if self._steps_left <= 0:
                self._check()

    def give_back(self, num_bytes: int | None = None) -> int:
        """Give back so many bytes, or all that no step needs: buffer pages, and pages that are in no frame but could be loaded.

        Returns:
            how many bytes it was, on all devices.
        """
        given = 0
        for device in list(self.caps):
            if num_bytes is None or given < num_bytes:
                given += self._give_back(device, None if num_bytes is None else num_bytes - given)
        return given

    def short_of_frames(self) -> None:
        """There are fewer frames than a cap allows, given back or for lack of a block large enough: the looks try again."""
        self.has_given_back, self._steps_left = True, CHECK_INTERVAL_STEPS

    def before_copy(self) -> None:
        """The cache is copied, frames too: have room for that, as far as half of them can make it."""
        for device, cap in self.caps.items():
            free = None if cap is None or self.given is not None else watermarks.free_gpu_memory(device)
            if free is not None:
                held = self._held(device)
                missing = held - (free - watermarks.margin(held + free))
                if missing > 0:
                    self._give_back(device, missing // 2)

    def __deepcopy__(self, memo: dict[int, Any]) -> GpuMemory:
        twin = copy(self)
        twin._state, twin.caps, twin.pending_reclaim = weakref.ref(memo[id(self.state)]), dict(self.caps), {}
        memo[id(self)] = twin
        if self in _live:
            _live.add(twin)
        return twin

    # ---------------------------------------------------------------------------------------------------------- by device

    def _place(self, device: torch.device, wanted: int, least: int) -> None:
        """The cap while a prompt is read.

        Args:
            wanted: bytes of all pages; least: with the frames of one step.
        """
        self.caps[device] = self._prompt_cap(device)
        if self.caps[device] is None:
            return
        self._remember(device)
        self.is_sized, self.most_frames = False, PROMPT_FRAMES
        self._request_memory(device, wanted, least)
        self.caps[device] = self._prompt_cap(device)

    def _replace(self, batch_size: int, num_tokens: int) -> None:
        """As `_place`, for a cache that has held tokens before."""
        room = self.state.sequences.first_room(batch_size, num_tokens)
        for device in list(self.caps):
            budgets = {store.budget for store in self._stores(device)}
            wanted = max((budget.resident_bytes(room[1]) for budget in budgets), default=0)
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
            held = self._held(device)
            paged = any(store.frames is not None for store in self._stores(device))
            if watermarks.is_low(held, free) or (paged and not watermarks.is_ample(held, free)):
                self._resize(device, watermarks.cap_for_prompts(held, free))
                self.is_sized = False

    def _size(self) -> None:
        """Page frames for decoding, from what is free now. What is resident stays so unless little is free.

        Of a prompt that was read in parts, others were asked for the first one only.
        """
        self.is_sized, self.most_frames, self._steps_left = True, None, CHECK_INTERVAL_STEPS
        for device in list(self.caps):
            self._remember(device)
            self._request_memory(device, self._wanted(device), self._least(self._stores(device)))
            cap, free = self._decoding_cap(device), watermarks.free_gpu_memory(device)
            if cap is not None and free is not None and not watermarks.is_low(self._held(device), free):
                cap = max(cap, self._resident(device))
            self._resize(device, cap)

    def _check(self) -> None:
        self._steps_left = CHECK_INTERVAL_STEPS
        complete = True
        for device in list(self.caps):
            self._remember(device)
            free, held = watermarks.free_gpu_memory(device), self._held(device)
            stores, cap = self._stores(device), self.caps[device]
            lacks = any(store.lacks_frames for store in stores)
            complete &= not lacks or cap == self.given
            too_little = free is not None and self.given is None and watermarks.is_low(held, free)
            if too_little or (lacks and (free is None or watermarks.is_ample(held, free))):
                self._resize(device, self._decoding_cap(device))
            elif cap is not None and self._least(stores) > cap:  # the context has grown
                self._resize(device, cap)
        if complete:
            self.has_given_back = False

    def _give_back(self, device: torch.device, num_bytes: int | None) -> int:
        held, sequences = self._held(device), self.state.sequences
        if not sequences.length:
            sequences.release()
        else:
            before = self.caps[device]
            cap = max(1 if num_bytes is None else held - num_bytes, self._least(self._stores(device)))
            if before is None or cap < before:
                self.short_of_frames()
                self._resize(device, cap)
        return max(0, held - self._held(device))

    def _reclaim(self) -> None:
        with _lock:
            pending_reclaim, self.pending_reclaim = self.pending_reclaim, {}
        for device, num_bytes in pending_reclaim.items():
            self._give_back(device, num_bytes)

    def _resize(self, device: torch.device, cap: int | None) -> None:
        """Set a cap and fit the frames to it; where there is no memory to do that, all stays as it was."""
        before = self.caps[device]
        with torch.inference_mode(False), torch.no_grad():
            try:
                self._set_cap(device, cap)
                self.state.sequences.fit()
            except (BudgetError, CapacityError, torch.OutOfMemoryError):
                self._set_cap(device, before)
                self.state.sequences.fit()

    def _set_cap(self, device: torch.device, cap: int | None) -> None:
        """Give the layers of a device budgets with a cap, or with what a step needs if that is more."""
        stores = self._stores(device)
        if cap is not None and self.state.sequences.batch_size:
            least, free = self._least(stores), watermarks.free_gpu_memory(device) if self.given is None else None
            if least > cap and free is not None:  # room for what is to come only where there is some
                least = min(least, self._held(device) + max(0, free))
            cap = max(cap, least)
        if cap is not None and self.given is not None:
            cap = min(cap, self.given)
        self.caps[device] = cap
        for store in stores:
            scaled = None if cap is None else cap * store.budget.num_layers // len(stores)  # as if all were here
            store.budget = replace(store.budget, gpu_memory=scaled, most_frames=self.most_frames)

    def _resident(self, device: torch.device) -> int:
        """Bytes that the pages which never went to the cpu tier take."""
        segments, stores = len(self.state.sequences.refcounts), self._stores(device)
        inside = [store.budget.resident_bytes(segments) for store in stores if store.frames is None]
        return self._share(max(inside), stores) if inside else 0

    def _least(self, stores: list[PageStore]) -> int:
        """Bytes that layers cannot do without until the next look: frames of one step, or those there are if that is less."""
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
        """Bytes of the layers in `stores`, where those of all layers are given."""
        return -(-of_all * len(stores) // stores[0].budget.num_layers)

    def _prompt_cap(self, device: torch.device) -> int | None:
        free = watermarks.free_gpu_memory(device)
        return None if free is None else watermarks.cap_for_prompts(self._held(device), free)

    def _decoding_cap(self, device: torch.device) -> int | None:
        free = watermarks.free_gpu_memory(device)
        if self.given is not None or free is None:
            return self.given
        return watermarks.cap_for_decoding(self._held(device), free)

    def _held(self, device: torch.device) -> int:
        return sum(store.held_bytes for store in self._stores(device))

    def _stores(self, device: torch.device) -> list[PageStore]:
        """The cache's layers on a device; none once it is gone."""
        state = self._state()
        stores = [] if state is None else [layer.store for layer in state.layers]
        return [store for store in stores if store is not None and store.device == device]

    def _remember(self, device: torch.device) -> None:
        """Note whose memory this is, for others of the device: the stream it is used on, and that it may be asked for."""
        if device.type == "cuda":
            self._streams[device] = torch.cuda.current_stream(device)
        if self.given is None:
            with _lock:
                _live.add(self)

    # ---------------------------------------------------------------------------------------------------------- the others

    def _request_memory(self, device: torch.device, wanted: int, least: int) -> None:
        """Ask others to give back what is missing, if they have it."""
        others = _others(self, device)
        free = watermarks.free_gpu_memory(device) if others else None
        if free is None:
            return
        held = self._held(device)
        cap = watermarks.cap_for_prompts(held, free)
        if wanted <= cap:
            return
        if self.given is None:
            available = cap + sum(other._givable(device) for other in others)
            wanted = max(
                least, watermarks.fair_share(wanted, available, sum(other._wanted(device) for other in others))
            )
        if wanted > cap:
            self._ask_others(device, wanted - cap)

    def _ask_others(self, device: torch.device, missing: int) -> None:
        with _lock:
            others = _others(self, device)
            # Of what is free then, a part stays free.
            shares = watermarks.split_fairly(missing * 5 // 4, [other._givable(device) for other in others])
            for other, share in zip(others, shares, strict=True):
                if share and other._may_be_touched():
                    with ExitStack() as stack:
                        if device.type == "cuda":  # behind what it has launched, and before what it will
                            stack.enter_context(torch.cuda.stream(other._streams.get(device)))
                        other._give_back(device, share)
                elif share:
                    other.pending_reclaim[device] = max(share, other.pending_reclaim.get(device, 0))

    def _givable(self, device: torch.device) -> int:
        """Bytes that no step needs."""
        stores = self._stores(device)
        if not stores or not self.state.sequences.length:
            return self._held(device)
        return max(0, self._held(device) - self._least(stores))

    def _wanted(self, device: torch.device) -> int:
        """Bytes if no page were in the cpu tier."""
        segments, stores = self.state.sequences.segments_in_use, self._stores(device)
        return self._share(max((store.budget.resident_bytes(segments) for store in stores), default=0), stores)

    def _may_be_touched(self) -> bool:
        state, ident = self.state, threading.get_ident()
        between = state.phase is Phase.IDLE
        alive = any(thread.ident == self._owner for thread in threading.enumerate())
        return between and (self._owner == ident or not alive)


def _others(one: GpuMemory, device: torch.device) -> list[GpuMemory]:
    """Other caches with memory on a device."""
    with _lock:
        return [other for other in list(_live) if other is not one and other._stores(device)]
