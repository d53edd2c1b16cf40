"""Files of gates that are damaged, made for something else or made to do harm: each is refused, with what to do instead.

Nothing is allocated or launched for them; what was read before stays what it was.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_hf import OptionError, SeerAttention, SpinCache, plan
from spin_hf.attention.methods import seer_gate_file
from spin_hf.attention.methods.seer_gate_file import load_gates
from spin_hf.attention.methods.seer_gates import FORMAT, Gates, LayerGate, describe
from tests.support.cache_driver import CacheDriver, RandomKV, Shape
from tests.support.seer_gates import random_gates

SHAPE = Shape(layers=2, kv_heads=2, group=2)
REFUSED = r"(?s)gates: expected .+, got .+ in .*; make some with `python -m spin_hf\.distill"


@pytest.fixture(autouse=True)
def _no_gates_in_memory() -> None:
    seer_gate_file._kept.clear()


def good(folder: Path, seed: int = 0) -> Path:
    random_gates(SHAPE.config(), SHAPE.layers, SHAPE.kv_heads, SHAPE.group, SHAPE.key_dim, folder, seed=seed)
    return folder / "gates.safetensors"


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a file."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(file: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def with_about(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what the metadata say, in place or by what `change` returns."""
    header, data = parts(file)
    about = json.loads(header["__metadata__"]["about"])
    made = change(about)
    header["__metadata__"]["about"] = made if isinstance(made, str) else json.dumps(about if made is None else made)
    write(file, header, data)


def with_tensors(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change tensors in place."""
    from safetensors.torch import load_file, save_file

    tensors, metadata = load_file(file), parts(file)[0]["__metadata__"]
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)


def refused(file: Path, message: str = REFUSED) -> str:
    """By whoever reads it, with the same words; the text."""
    for made in (
        lambda: load_gates(file),
        lambda: SpinCache(SHAPE.config(), SeerAttention(file)),
        lambda: plan(SHAPE.config(), context_length=100, method=SeerAttention(file)),
    ):
        with pytest.raises(OptionError, match=message) as raised:
            made()
    assert len(str(raised.value)) < 3000
    return str(raised.value)


# ------------------------------------------------------------------------------------------------------ bytes and header

HEADERS: dict[str, bytes] = {
    "empty": b"", "short": b"1234567", "a header beyond the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "the largest length": b"\xff" * 8 + b"{}", "no header": (0).to_bytes(8, "little"),
    "broken JSON": (2).to_bytes(8, "little") + b"{x", "no text": (2).to_bytes(8, "little") + b"\xff\xfe",
    "no object": (2).to_bytes(8, "little") + b"[]", "null": (4).to_bytes(8, "little") + b"null",
    "nested": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "nested objects": (500_000).to_bytes(8, "little") + b'{"a":' * 100_000,
    "a huge int": (6004).to_bytes(8, "little") + b'{"":' + b"9" * 6000,
    "twice one name": (14).to_bytes(8, "little") + b'{"a":1,"a":2 }',
}  # fmt: skip


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_headers(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "gates.safetensors").write_bytes(content)
    refused(tmp_path / "gates.safetensors", "expected a safetensors file")
    refused(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_files_that_were_cut(share: float, tmp_path: Path) -> None:
    file = good(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    refused(file)


def test_bytes_that_are_too_many(tmp_path: Path) -> None:
    file = good(tmp_path)
    file.write_bytes(file.read_bytes() + b"\0" * 4)
    refused(file, r"bytes of tensors, got \d+")


@pytest.mark.parametrize("position", range(0, 40))
def test_any_byte_changed(position: int, tmp_path: Path) -> None:
    """Read or refused, nothing else."""
    file = good(tmp_path)
    content = bytearray(file.read_bytes())
    generator = torch.Generator().manual_seed(position)
    for _ in range(12):
        at = int(torch.randint(2000 if position % 2 else len(content), (), generator=generator))
        changed = bytearray(content)
        changed[at] = int(torch.randint(256, (), generator=generator))
        file.write_bytes(changed)
        try:
            SpinCache(SHAPE.config(), SeerAttention(file))
        except OptionError as error:
            assert "; " in str(error)


ENTRIES: dict[str, Any] = {
    "no entry": None, "a list": [], "no dtype": {"dtype": None}, "integers": {"dtype": "I32"}, "bool": {"dtype": "BOOL"},
    "a dtype that is none": {"dtype": "X9"}, "a list as dtype": {"dtype": ["F32"]}, "negative": {"shape": [-2, -24, 6]},
    "floats": {"shape": [2.0, 24, 6]}, "true": {"shape": [True, 24, 6]}, "huge": {"shape": [2**62, 2**62, 6]},
    "no shape": {"shape": None}, "a nested shape": {"shape": [[2], 24, 6]}, "backwards": {"data_offsets": [1152, 0]},
    "beyond": {"data_offsets": [2**60, 2**60 + 1152]}, "negative offsets": {"data_offsets": [-1152, 0]},
    "one offset": {"data_offsets": [0]}, "texts": {"data_offsets": ["0", "1152"]},
}  # fmt: skip


@pytest.mark.parametrize("change", ENTRIES.values(), ids=ENTRIES)
def test_entries(change: Any, tmp_path: Path) -> None:
    file = good(tmp_path)
    header, data = parts(file)
    header["layers.0.key"] = {**header["layers.0.key"], **change} if isinstance(change, dict) else change
    write(file, header, data)
    refused(file)


def test_two_tensors_in_one_place(tmp_path: Path) -> None:
    """A small file would else be read into as much memory as it likes."""
    file = good(tmp_path)
    header, data = parts(file)
    header["layers.1.key"]["data_offsets"] = header["layers.0.key"]["data_offsets"]
    write(file, header, data)
    refused(file, "tensors one behind the other")


# -------------------------------------------------------------------------------------------------------------- metadata


def says(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    """Other metadata."""
    return lambda about: {**about, **fields}


ABOUT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "broken": lambda about: "{", "a list": lambda about: "[]", "nothing": lambda about: "",
    "nested": lambda about: "[" * 100_000, "no page_size": says(page_size=None), "page_size 0": says(page_size=0),
    "page_size true": says(page_size=True), "page_size text": says(page_size="32"), "a fraction": says(page_size=32.0),
    "no layers": says(interleaved={}), "layers as a list": says(interleaved=[True]),
    "no number": says(interleaved={"x": True}), "negative": says(interleaved={"-1": True}),
    "another digit": says(interleaved={"٣": True}), "a zero": says(interleaved={"00": True}),
    "many digits": says(interleaved={"9" * 5000: True}), "1 for true": says(interleaved={"0": 1, "1": 0}),
    "more layers": says(interleaved={"0": False, "1": False, "2": False}), "fewer layers": says(interleaved={"0": False}),
    "rope of depth": says(rope=json.loads('{"a":' * 200 + "1" + "}" * 200)),
}  # fmt: skip


@pytest.mark.parametrize("change", ABOUT.values(), ids=ABOUT)
def test_metadata(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    file = good(tmp_path)
    with_about(file, change)
    refused(file)


@pytest.mark.parametrize(
    "metadata", [None, {}, [], "x", {"format": FORMAT}, {"format": FORMAT, "about": 3}, {"format": ["x"]}]
)
def test_metadata_that_are_none(metadata: Any, tmp_path: Path) -> None:
    file = good(tmp_path)
    header, data = parts(file)
    header["__metadata__"] = metadata
    write(file, header, data)
    refused(file)


def test_long_metadata_are_cut_in_messages(tmp_path: Path) -> None:
    file = good(tmp_path)
    for key, value in [("model_type", "x" * 10**6), ("rope", {"rope_type": "y" * 10**6}), ("hidden_size", [7] * 10**5)]:
        good(tmp_path)
        with_about(file, lambda about, key=key, value=value: about.update({key: value}))  # type: ignore[misc]
        with pytest.raises(OptionError) as raised:
            SpinCache(SHAPE.config(), SeerAttention(file))
        assert len(str(raised.value)) < 2000


# ------------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("name", ["key", "query", "frequencies", "gate_frequencies"])
def test_numbers(name: str, number: float, tmp_path: Path) -> None:
    file = good(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"layers.1.{name}"].view(-1)[-1] = number

    with_tensors(file, change)
    refused(file, f"expected layers.1.{name}: finite numbers of at most")


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.complex64]
)
def test_dtypes_that_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    file = good(tmp_path)
    with_tensors(file, lambda tensors: tensors.update({"layers.0.query": tensors["layers.0.query"].to(dtype)}))
    refused(file, r"expected layers\.0\.query of dtype F64, F32, F16, BF16, got")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_that_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    file = good(tmp_path)
    expected = load_gates(file).layers[0].query
    with_tensors(file, lambda tensors: tensors.update({"layers.0.query": tensors["layers.0.query"].to(dtype)}))
    assert load_gates(file).layers[0].query.equal(expected.to(dtype).float())


def shaped(**shapes: tuple[int, ...]) -> Callable[[dict[str, Tensor]], Any]:
    """Other shapes of layer 1's tensors."""
    return lambda tensors: tensors.update({f"layers.1.{name}": torch.ones(shape) for name, shape in shapes.items()})


FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "no heads": shaped(key=(0, 24, 6), query=(0, 2, 8, 6)), "no group": shaped(query=(2, 0, 8, 6)),
    "no channels": shaped(key=(2, 0, 6), query=(2, 2, 0, 6), frequencies=(0,)),
    "no gate": shaped(key=(2, 24, 0), query=(2, 2, 8, 0), gate_frequencies=(0,)), "a vector": shaped(key=(24,)),
    "other heads of the query": shaped(query=(1, 2, 8, 6)), "other sizes of the query": shaped(query=(2, 2, 7, 6)),
    "turns more than there is": shaped(frequencies=(5,)), "turns half of the gate": shaped(gate_frequencies=(2,)),
    "an odd gate": shaped(key=(2, 24, 5), query=(2, 2, 8, 5), gate_frequencies=(2,)),
    "another gate": shaped(key=(2, 24, 8), query=(2, 2, 8, 8), gate_frequencies=(4,)),
    "one missing": lambda tensors: tensors.pop("layers.1.query"),
    "one more": lambda tensors: tensors.update(extra=torch.zeros(3)),
}  # fmt: skip


@pytest.mark.parametrize("change", FORMS.values(), ids=FORMS)
def test_shapes(change: Callable[[dict[str, Tensor]], Any], tmp_path: Path) -> None:
    file = good(tmp_path)
    with_tensors(file, change)
    refused(file)


@pytest.mark.parametrize("sizes", [(2, 1, 8), (2, 3, 8), (2, 64, 8), (4, 2, 8), (1, 4, 8), (2, 2, 16), (2, 2, 4)])
def test_gates_whose_matrices_are_for_another_model(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    """What the file says of its model fits; the kernel would read queries of another group, or past them."""
    random_gates(SHAPE.config(), 2, *sizes, tmp_path)
    words = r"layer 0: expected a gate for 2 KV heads with 2 query heads each, of 8 numbers, got one for"
    for make in (
        lambda: SpinCache(SHAPE.config(), SeerAttention(tmp_path)),
        lambda: plan(SHAPE.config(), context_length=100, method=SeerAttention(tmp_path)),
    ):
        with pytest.raises(OptionError, match=words):
            make()


@pytest.mark.parametrize("sizes", [(2, 1, 8), (2, 4, 8), (2, 2, 16)])
def test_where_the_config_does_not_say(
    sizes: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first states do: refused before a kernel reads anything, whichever computes."""
    random_gates(SHAPE.config(), 2, *sizes, tmp_path)
    monkeypatch.setattr("spin_hf.attention.methods.seer_gates.layer_shapes", lambda config, layers: None)
    driver = CacheDriver(SHAPE, method=SeerAttention(tmp_path), budget=32, recent_window=8)
    bound = driver.cache._shared.method
    states = torch.zeros((1, 2, 2, 8))
    with pytest.raises(
        OptionError, match="layer 0: expected a gate for 2 KV heads with 2 query heads each, of 8 numbers"
    ):
        bound.kernel_queries(states, torch.zeros(1, dtype=torch.int64), 0)
    world = RandomKV.random(SHAPE, 1, 121, 0)
    with pytest.raises(OptionError, match=r"expected (a gate|gates) for 2 KV heads"):
        driver.step(world, 0, 120)
        driver.step(world, 120, 121)


# ------------------------------------------------------------------------------------------------------------------ paths


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "folder" / "gates.safetensors").mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    good(tmp_path)
    wrong = ["", "x" * 5000, "a\0b", "~nobody-of-this-name/x", "/dev/zero", "/dev/null"]
    wrong += [str(tmp_path / name) for name in ("none", "folder", "loop", "pipe", "gates.safetensors/x", "y" * 300)]
    for path in wrong:
        with pytest.raises(
            OptionError, match=r"expected a file of gates or a folder with gates\.safetensors, got"
        ) as raised:
            SpinCache(SHAPE.config(), SeerAttention(path))
        assert len(str(raised.value)) < 800

    class Bytes:
        def __fspath__(self) -> bytes:
            return os.fsencode(tmp_path)

    assert load_gates(Bytes()).page_size == 32  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "message"), [(5, "Input/output error"), (13, "Permission denied"), (24, "Too many open files")]
)
def test_errors_of_the_system(number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = good(tmp_path)

    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(number, message)

    monkeypatch.setattr(Path, "open", fail)
    refused(file, f"expected a file that can be read, got {message}")


# ----------------------------------------------------------------------------------------------------------- other content


def settled(file: Path, seconds: int = 100) -> None:
    """As if the file had been written long ago; its inode's time cannot be set, so the clock goes on instead."""
    then = time.time_ns() - seconds * 10**9
    os.utime(file, ns=(then, then))


def first_weight(file: Path) -> float:
    return float(load_gates(file).layers[0].key.flatten()[0])


def replaced(file: Path, number: float) -> None:
    other = file.with_name("other.safetensors")
    other.write_bytes(file.read_bytes())
    with_tensors(other, lambda tensors: tensors["layers.0.key"].view(-1)[:1].fill_(number))
    other.replace(file)


def rewritten(file: Path, number: float) -> None:
    other = file.with_name("other.safetensors")
    other.write_bytes(file.read_bytes())
    with_tensors(other, lambda tensors: tensors["layers.0.key"].view(-1)[:1].fill_(number))
    with file.open("r+b") as opened:
        opened.write(other.read_bytes())


@pytest.mark.parametrize("change", [replaced, rewritten])
@pytest.mark.parametrize("old", [False, True])
def test_another_file_of_the_same_size_and_time(
    change: Callable[[Path, float], None], old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved over it or written into it, its times put back; just made, or read when it was old and kept."""
    file, now = good(tmp_path), time.time_ns
    settled(file)
    before = file.stat()
    if old:
        monkeypatch.setattr(seer_gate_file.time, "time_ns", lambda: now() + 10**11)
    first = first_weight(file)
    assert bool(seer_gate_file._kept) == old
    for number in (0.25, 0.5, 0.75):
        change(file, number)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        if old:
            time.sleep(0.02)  # the inode's time comes in steps; a file this young is not kept
        assert first_weight(file) == number != first


def test_gates_are_kept_while_the_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, now = good(tmp_path), time.time_ns
    assert load_gates(file) is not load_gates(file), "it was written a moment ago"
    monkeypatch.setattr(seer_gate_file.time, "time_ns", lambda: now() + 10**11)
    assert load_gates(file) is load_gates(tmp_path)
    for number in range(6):
        (tmp_path / str(number)).mkdir()
        load_gates(good(tmp_path / str(number), seed=number))
    assert len(seer_gate_file._kept) == 4


def test_gates_stay_what_they_were(tmp_path: Path) -> None:
    """While the file is cut or written over: a mapping would show it, or end the process."""
    file = good(tmp_path)
    gates = load_gates(file)
    before = {number: gate.key.clone() for number, gate in gates.layers.items()}
    with file.open("r+b") as opened:
        opened.write(b"\0" * file.stat().st_size)
        opened.truncate(0)
    assert all(gate.key.equal(before[number]) for number, gate in gates.layers.items())


def test_what_cannot_be_read_is_not_written(tmp_path: Path) -> None:
    file = good(tmp_path)
    before, gates = file.read_bytes(), load_gates(file)
    wrong: list[LayerGate] = [
        replace(gates.layers[0], key=torch.full_like(gates.layers[0].key, number)) for number in (float("nan"), 1e9)
    ]
    wrong += [
        replace(gates.layers[0], query=torch.zeros((2, 2, 7, 6))),
        replace(gates.layers[0], key=gates.layers[0].key.long()),
    ]
    for gate in wrong:
        with pytest.raises(OptionError, match=r"gates: expected layer 1.*, got .*; train"):
            Gates({0: gates.layers[0], 1: gate}, 32, describe(SHAPE.config())).save(file)
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gates.safetensors"]
