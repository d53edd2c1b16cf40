"""The calls to CUDA for registering memory, on a fake runtime that records them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spin_hf.errors import CapacityError
from spin_hf.storage import host_register
from spin_hf.storage.host_register import CudaRegistrar

CUDA = torch.device("cuda", 0)


class FakeRuntime:
    """torch.cuda.cudart(), as far as it is used."""

    cudaError = int  # noqa: N815

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.calls: list[tuple[Any, ...]] = []

    def cudaHostRegister(self, *arguments: int) -> int:  # noqa: N802
        self.calls.append(("register", *arguments))
        return self.code

    def cudaHostUnregister(self, *arguments: int) -> int:  # noqa: N802
        self.calls.append(("unregister", *arguments))
        return self.code

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802
        return {2: "out of memory", 712: "resource already mapped"}[code]

    def synchronize(self, device: torch.device) -> None:
        self.calls.append(("synchronize", device))

    def function(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append((name,))
            return 0

        return call


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setattr(
        torch, "cuda", SimpleNamespace(cudart=lambda: fake, synchronize=fake.synchronize, device=nullcontext)
    )
    monkeypatch.setattr(host_register, "_runtime_function", fake.function)
    return fake


def test_registers_for_all_devices_and_mapped(runtime: FakeRuntime) -> None:
    CudaRegistrar(CUDA).register(4096, 8192)
    exchange = ("cudaThreadExchangeStreamCaptureMode",)
    assert runtime.calls == [exchange, ("register", 4096, 8192, 3), exchange]


@pytest.mark.parametrize(("code", "reason"), [(2, "out of memory"), (712, "resource already mapped")])
def test_refusal_says_what_and_what_to_do(runtime: FakeRuntime, code: int, reason: str) -> None:
    runtime.code = code
    with pytest.raises(CapacityError) as caught:
        CudaRegistrar(CUDA).register(4096, 3 << 30)
    for part in (str(3 << 30), "3.00 GiB", reason, str(code), "ulimit -l", "shorten the context"):
        assert part in str(caught.value)
    assert ("cudaGetLastError",) in runtime.calls


@pytest.mark.parametrize("code", [0, 712])
def test_waits_for_the_device_before_unregistering(runtime: FakeRuntime, code: int) -> None:
    runtime.code = code
    CudaRegistrar(CUDA).unregister(4096)
    calls = [call for call in runtime.calls if "Exchange" not in call[0]]
    assert calls[:2] == [("synchronize", CUDA), ("unregister", 4096)]
    assert calls[2:] == ([("cudaGetLastError",)] if code else [])


def test_runtime_function_that_is_not_there() -> None:
    assert host_register._runtime_function("cudaNoSuchFunction") is None
    with host_register.allowed_during_capture():
        host_register._clear_last_error()
