"""Files of gates that are damaged, made for another model or made to do harm: each is refused, and the error says what to do.

Nothing is allocated or launched for them. Gates that were read before do not change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spin_hf import OptionError, SeerAttention, SpinCache, plan
from spin_hf.attention.methods import seer_gate_file
from spin_hf.attention.methods.seer_gate_file import load_gates
from spin_hf.attention.methods.seer_gates import FORMAT
from tests.support.cache_driver import CacheDriver, RandomKV
from tests.support.gate_files import (
    SHAPE,
    good_gates,
    header_and_tensors,
    refused,
    with_about,
    with_tensors,
    write_parts,
)
from tests.support.inspection import state_of
from tests.support.seer_gates import random_gates


@pytest.fixture(autouse=True)
def _no_gates_in_memory() -> None:
    seer_gate_file._cached.clear()


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
    file = good_gates(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    refused(file)


def test_bytes_that_are_too_many(tmp_path: Path) -> None:
    file = good_gates(tmp_path)
    file.write_bytes(file.read_bytes() + b"\0" * 4)
    refused(file, r"bytes of tensors, got \d+")


@pytest.mark.parametrize("position", range(0, 40))
def test_any_byte_changed(position: int, tmp_path: Path) -> None:
    """Read or refused, nothing else."""
    file = good_gates(tmp_path)
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
    file = good_gates(tmp_path)
    header, data = header_and_tensors(file)
    header["layers.0.key"] = {**header["layers.0.key"], **change} if isinstance(change, dict) else change
    write_parts(file, header, data)
    refused(file)


def test_two_tensors_in_one_place(tmp_path: Path) -> None:
    """A small file would else be read into as much memory as it likes."""
    file = good_gates(tmp_path)
    header, data = header_and_tensors(file)
    header["layers.1.key"]["data_offsets"] = header["layers.0.key"]["data_offsets"]
    write_parts(file, header, data)
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
    file = good_gates(tmp_path)
    with_about(file, change)
    refused(file)


@pytest.mark.parametrize(
    "metadata", [None, {}, [], "x", {"format": FORMAT}, {"format": FORMAT, "about": 3}, {"format": ["x"]}]
)
def test_metadata_that_are_none(metadata: Any, tmp_path: Path) -> None:
    file = good_gates(tmp_path)
    header, data = header_and_tensors(file)
    header["__metadata__"] = metadata
    write_parts(file, header, data)
    refused(file)


def test_long_metadata_are_cut_in_messages(tmp_path: Path) -> None:
    file = good_gates(tmp_path)
    for key, value in [("model_type", "x" * 10**6), ("rope", {"rope_type": "y" * 10**6}), ("hidden_size", [7] * 10**5)]:
        good_gates(tmp_path)
        with_about(file, lambda about, key=key, value=value: about.update({key: value}))  # type: ignore[misc]
        with pytest.raises(OptionError) as raised:
            SpinCache(SHAPE.config(), SeerAttention(file))
        assert len(str(raised.value)) < 2000


# ------------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("name", ["key", "query", "frequencies", "gate_frequencies"])
def test_numbers(name: str, number: float, tmp_path: Path) -> None:
    file = good_gates(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"layers.1.{name}"].view(-1)[-1] = number

    with_tensors(file, change)
    refused(file, f"expected layers.1.{name}: finite numbers of at most")


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.complex64]
)
def test_dtypes_that_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    file = good_gates(tmp_path)
    with_tensors(file, lambda tensors: tensors.update({"layers.0.query": tensors["layers.0.query"].to(dtype)}))
    refused(file, r"expected layers\.0\.query of dtype F64, F32, F16, BF16, got")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_that_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    file = good_gates(tmp_path)
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
    file = good_gates(tmp_path)
    with_tensors(file, change)
    refused(file)


@pytest.mark.parametrize("sizes", [(2, 1, 8), (2, 3, 8), (2, 64, 8), (4, 2, 8), (1, 4, 8), (2, 2, 16), (2, 2, 4)])
def test_gates_whose_matrices_are_for_another_model(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    """The metadata fit, the matrices do not: the kernel would read queries of another group, or past them."""
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
    bound = state_of(driver.cache).method
    states = torch.zeros((1, 2, 2, 8))
    with pytest.raises(
        OptionError, match="layer 0: expected a gate for 2 KV heads with 2 query heads each, of 8 numbers"
    ):
        bound.project_queries(states, torch.zeros(1, dtype=torch.int64), 0)
    kv = RandomKV.random(SHAPE, 1, 121, 0)
    with pytest.raises(OptionError, match=r"expected (a gate|gates) for 2 KV heads"):
        driver.step(kv, 0, 120)
        driver.step(kv, 120, 121)


# ------------------------------------------------------------------------------------------------------------------ paths
