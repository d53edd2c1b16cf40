"""Makes memory run out at any place, and counts the memory that was allocated meanwhile and is still in use.

    points     every operation that returns a new tensor, in the package and in the model;  of a slab: map, touch, register
    armed(n)   the n-th point in the block fails: alone, or with all later ones until the block ends (`lasting`)
    held()     bytes of the tensors that were made while armed and are still alive

It is a dispatch mode: no operation is patched, and it works for the reference operations and for interpreted kernels.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import spin_hf
from spin_hf.errors import CapacityError
from spin_hf.storage import chunked_array, pinned_slab, slab_prefetch

PACKAGE = str(Path(spin_hf.__file__).parent)
_TRACED = {torch.ops.aten.lift_fresh.default}
"""Operations that by their schema return their argument, and in fact make a tensor from Python numbers."""


class Faults(TorchDispatchMode):
    """See the module's head."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.armed_at: int | None = None
        self.lasting = False
        self.count = 0
        self.failed: list[str] = []
        """The places that have failed since it was armed."""
        self.made: list[tuple[StorageWeakRef, int]] = []

    @contextmanager
    def armed(self, point: int | None, lasting: bool = False) -> Iterator[None]:
        """Let point number `point` fail, None for none; counts points, and keeps track of tensors."""
        self.armed_at, self.lasting, self.count, self.failed = (
            sys.maxsize if point is None else point,
            lasting,
            0,
            [],
        )
        try:
            with self:
                yield
        finally:
            self.armed_at = None

    def reach(self, what: str) -> bool:
        """A point has been reached; returns whether it has to fail."""
        if self.armed_at is None or threading.get_ident() != self.thread:
            return False
        self.count += 1
        fails = self.count > self.armed_at if self.lasting else self.count == self.armed_at + 1
        if fails:
            self.failed.append(f"{what} {_place()}")
        return fails

    def held(self) -> int:
        """Bytes of tensors that were made while it was armed and are alive."""
        self.made = [(storage, size) for storage, size in self.made if not storage.expired()]
        return sum(size for _, size in self.made)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        makes = self.armed_at is not None and threading.get_ident() == self.thread and _makes(func)
        if makes and not _interpreting() and self.reach(func.name()):
            raise torch.OutOfMemoryError(f"CUDA out of memory (injected at {func.name()})")
        out = func(*args, **kwargs)
        if makes:
            for tensor in pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    self.made.append((StorageWeakRef(storage), storage.nbytes()))
        return out


_KNOWN: dict[Any, bool] = {}


def _makes(func: Any) -> bool:
    """Whether an operation returns a tensor that is no view."""
    if func not in _KNOWN:
        fresh = [r for r in func._schema.returns if r.alias_info is None and "Tensor" in str(r.type)]
        _KNOWN[func] = bool(fresh) or func in _TRACED
    return _KNOWN[func]


def _frames() -> Iterator[Any]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


def _interpreting() -> bool:
    """Whether a kernel is being interpreted. On a GPU it would allocate nothing."""
    return any("triton" in frame.f_code.co_filename for frame in _frames())


def _place() -> str:
    """The innermost functions of the package on the stack, or "model"."""
    inner = [f for f in _frames() if f.f_code.co_filename.startswith(PACKAGE)][:3]
    names = [f"{Path(f.f_code.co_filename).stem}.{f.f_code.co_name}:{f.f_lineno}" for f in inner]
    return " < ".join(names) or "model"


# --------------------------------------------------------------------------------------------------------------- slabs


class SlabFaults:
    """Replaces the system and the driver for slabs. Each call is a point of `faults`.

    Attributes:
        registered: address -> bytes of memory that is page-locked.
        mapped: every mapping made.
    """

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.registered: dict[int, int] = {}
        self.mapped: list[mmap.mmap] = []

    def map(self, fileno: int, num_bytes: int, **flags: Any) -> mmap.mmap:
        if self.faults.reach("mmap"):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        self.mapped.append(mmap.mmap(fileno, num_bytes, **flags))
        return self.mapped[-1]

    def madvise(self, address: Any, num_bytes: Any, advice: int) -> int:
        """The system call: populates the pages, or has no memory left."""
        if self.faults.reach("touch"):
            ctypes.set_errno(errno.ENOMEM)
            return -1
        ctypes.memset(address, 0, num_bytes.value)
        return 0

    def register(self, address: int, num_bytes: int) -> None:
        if self.faults.reach("register"):
            raise CapacityError(
                f"page-locking {num_bytes} bytes was refused (injected); raise the limit on locked memory"
            )
        assert address not in self.registered
        self.registered[address] = num_bytes

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def capturing(self) -> bool:
        return False

    @property
    def open_bytes(self) -> int:
        return sum(len(mapping) for mapping in self.mapped if not mapping.closed)


class _FakeMmap:
    """Replaces the module `mmap`; `SlabFaults` makes its mappings."""

    def __init__(self, slabs: SlabFaults) -> None:
        self.mmap = slabs.map

    def __getattr__(self, name: str) -> Any:
        return getattr(mmap, name)


class _FakeCtypes:
    """Replaces the module `ctypes`; `SlabFaults` is its C library."""

    def __init__(self, slabs: SlabFaults) -> None:
        self.CDLL = lambda *args, **named: slabs

    def __getattr__(self, name: str) -> Any:
        return getattr(ctypes, name)


def chunks_in_slabs(faults: Faults, monkeypatch: pytest.MonkeyPatch) -> SlabFaults:
    """Let all chunks be registered slabs, prefetched ones too, as in the cpu tier of a machine with a GPU."""
    slabs = SlabFaults(faults)
    monkeypatch.setattr(pinned_slab, "CudaRegistrar", lambda device: slabs)
    monkeypatch.setattr(pinned_slab, "mmap", _FakeMmap(slabs))
    monkeypatch.setattr(pinned_slab, "ctypes", _FakeCtypes(slabs))
    allocate = pinned_slab.allocate_rows

    def in_slab(count: int, shape: Any, dtype: Any, *, compute_device: Any) -> list[torch.Tensor]:
        return allocate(count, shape, dtype, compute_device=torch.device("cuda"))

    monkeypatch.setattr(chunked_array, "allocate_rows", in_slab)
    monkeypatch.setattr(slab_prefetch.PREFETCHER, "_allocate", in_slab)
    monkeypatch.setattr(chunked_array.ChunkedArray, "registers", lambda array, device: True)
    return slabs


def tally(places: list[str]) -> str:
    """How often each place failed, for a failing test's message."""
    return "\n".join(f"{count:5} {place}" for place, count in Counter(places).most_common())
