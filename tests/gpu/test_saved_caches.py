"""Saved on a GPU and loaded there, and in the other memory: the same tokens go on."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from spin_hf import SavedCacheError, SpinCache
from spin_hf.persistence import opened
from spin_hf.persistence.checksum import checksums_of, piece_checksum, row_sums
from spin_hf.persistence.shards import bytes_of
from tests.support.memory import SMALL_ZONES, with_tight_gpu_memory
from tests.support.zoo import build_model, random_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
METHODS = ["bisection", "fitted", "shadowkv", "retroinfer", "quest"]


def on_gpu(family: str) -> Any:
    return build_model(family).to("cuda", torch.bfloat16)


@pytest.mark.parametrize("cpu_dtype", ["auto", "int8"])
@pytest.mark.parametrize("tiers", ["one", "two"])
@pytest.mark.parametrize("method", METHODS)
def test_goes_on(method: str, tiers: str, cpu_dtype: str, tmp_path: Path) -> None:
    def run(gpu_memory: Any) -> None:
        goes_on(method, gpu_memory, cpu_dtype, tmp_path)

    run("auto") if tiers == "one" else with_tight_gpu_memory(run)


def goes_on(method: str, gpu_memory: Any, cpu_dtype: str, tmp_path: Path) -> None:
    model = on_gpu("llama")
    cache = SpinCache(model, method, budget=32, gpu_memory=gpu_memory, cpu_dtype=cpu_dtype, **SMALL_ZONES)
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    ids = random_tokens(2, 400).cuda()
    held = model.generate(ids, past_key_values=cache, max_new_tokens=9, **options).sequences
    cache.save_pretrained(tmp_path, held)
    restored = SpinCache.from_pretrained(tmp_path, model, gpu_memory=gpu_memory)
    restored.check_integrity()
    ours, theirs = (
        model.generate(held, past_key_values=each, max_new_tokens=20, **options).sequences for each in (restored, cache)
    )
    assert torch.equal(ours, theirs)
    assert restored.layers[0].device.type == "cuda"


@pytest.mark.parametrize("family", ["qwen3_next", "gemma3_text"])
def test_other_layers_are_on_the_gpu(family: str, tmp_path: Path) -> None:
    model = on_gpu(family)
    cache = SpinCache(model, budget=32, **SMALL_ZONES)
    with torch.no_grad():
        model(random_tokens(2, 90).cuda(), past_key_values=cache)
    twin = copy.deepcopy(cache)
    cache.save_pretrained(tmp_path)
    restored = SpinCache.from_pretrained(tmp_path, model)
    new = random_tokens(2, 1, seed=1).cuda()
    with torch.no_grad():
        ours, theirs = (model(new, past_key_values=each).logits for each in (restored, twin))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)


def test_from_a_gpu_to_a_cpu_and_back(tmp_path: Path) -> None:
    """The fingerprint does not depend on the device."""
    model = build_model("llama")
    cache = SpinCache(model, budget=32, **SMALL_ZONES)
    with torch.no_grad():
        model(random_tokens(1, 90), past_key_values=cache)
    keys = cache.layers[1].keys.clone()
    cache.save_pretrained(tmp_path)
    del cache
    model.cuda()
    there = SpinCache.from_pretrained(tmp_path, model)
    assert torch.equal(there.layers[1].keys.cpu(), keys)
    there.save_pretrained(tmp_path)
    del there
    model.cpu()
    assert torch.equal(SpinCache.from_pretrained(tmp_path, model).layers[1].keys, keys)


def test_checksums_of_gpu_memory() -> None:
    """They are those of the same bytes in host memory, also where sums of 64 bits wrap."""
    content = torch.randint(-(2**63), 2**63 - 1, (3 << 18,), dtype=torch.int64)
    on_gpu, piece_bytes = content.cuda(), 1 << 20
    expected = [piece_checksum([bytes_of(piece)]) for piece in content.split(piece_bytes // 8)]
    for cut in ([1 << 20] * 6, [800_008, content.nbytes - 800_008]):
        sums = row_sums(on_gpu.view(torch.uint8).split(cut), piece_bytes).cpu()
        assert list(checksums_of(bytes_of(sums), content.nbytes, piece_bytes)) == expected


@pytest.mark.parametrize("method", METHODS)
def test_damage_of_pages_on_the_gpu_is_found(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their checksums are made there, and not by the threads that read."""
    model, on_host = on_gpu("llama"), list[int]()

    def noted(buffers: list[memoryview], *before: bytes) -> bytes:
        on_host.append(sum(buffer.nbytes for buffer in buffers))
        return piece_checksum(buffers, *before)

    monkeypatch.setattr(opened, "piece_checksum", noted)
    cache = SpinCache(model, method, budget=32, **SMALL_ZONES)
    with torch.no_grad():
        model(random_tokens(1, 4000).cuda(), past_key_values=cache)
    cache.save_pretrained(tmp_path)
    SpinCache.from_pretrained(tmp_path, model).check_integrity()
    (file,) = tmp_path.glob("*.safetensors")
    assert sum(on_host) < file.stat().st_size // 10
    whole, draw = file.read_bytes(), random.Random(0)
    begin = 8 + int.from_bytes(whole[:8], "little") + sum(on_host)
    for at in [begin, len(whole) - 1, *(draw.randrange(begin, len(whole)) for _ in range(6))]:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(SavedCacheError, match="was it altered"):
            SpinCache.from_pretrained(tmp_path, model)
